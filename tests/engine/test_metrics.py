"""metrics.json after a kill and a resume: valid lines, each iteration once."""

import json

import pytest
from detectron2.utils.events import CommonMetricPrinter, EventStorage

from refbn_d2.engine.metrics import MetricsWriter, ProgressPrinter


def _line(iteration: int) -> str:
    return json.dumps({"iteration": iteration, "loss": iteration / 7}) + "\n"


def _write(path, *iterations, resume=False):
    writer = MetricsWriter(str(path))
    if resume:
        writer.rewind(iterations[0])
    with EventStorage(iterations[0]) as storage:
        for iteration in iterations:
            storage.iter = iteration
            storage.put_scalar("loss", iteration / 7, smoothing_hint=False)
            writer.write()
    writer.close()


@pytest.mark.parametrize("torn", ["", '{"iteration": 59, "lo', "\0\0\0\0", "{}\n", _line(59)[:-1]])
def test_resumed_lines_replace_what_came_after_the_checkpoint(tmp_path, torn):
    path = tmp_path / "metrics.json"
    path.write_text("".join(map(_line, (19, 25, 39, 59))) + torn)
    _write(path, 30, 39, 59, resume=True)
    assert path.read_text() == "".join(map(_line, (19, 25, 30, 39, 59)))


def test_a_run_that_has_no_checkpoint_yet_starts_over(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(_line(19) + _line(39))
    _write(path, 0, 19, resume=True)
    assert path.read_text() == _line(0) + _line(19)


def test_without_resume_only_a_torn_line_goes(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(_line(19) + _line(39)[:9])
    _write(path, 0)
    assert path.read_text() == _line(19) + _line(0)


def test_lines_of_the_past_are_not_written_again(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(_line(19) + _line(29) + _line(39))
    writer = MetricsWriter(str(path))
    writer.rewind(30)
    assert writer.last_iteration == 29
    with EventStorage(29) as storage:
        storage.put_scalar("bbox/AP", 1.0, smoothing_hint=False)
        storage.iter = 30
        storage.put_scalar("loss", 30 / 7, smoothing_hint=False)
        writer.write()
    writer.close()
    assert path.read_text() == _line(19) + _line(29) + _line(30)


def test_the_log_of_a_run_that_ends_in_its_first_steps():
    """Upstream divides by zero when an iteration is written again before it has been timed."""
    with EventStorage(19) as storage:
        storage.put_scalar("total_loss", 1.0)
        upstream, ours = CommonMetricPrinter(40), ProgressPrinter(40)
        upstream.write()
        with pytest.raises(ZeroDivisionError):
            upstream.write()
        ours.write()
        ours.write()
