"""OUTPUT_DIR: one writer, one run, the same model, and a one-line error if it is not writable."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess

import kills
import processes
import pytest
import tiny
import torch

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer, run_folder
from refbn_d2.engine.metrics import MetricsWriter
from refbn_d2.engine.run_folder import output_errors
from refbn_d2.errors import UserError

ARGS = ["--config-file", tiny.CONFIG]


def _options(output, **changes):
    return tiny.opts(OUTPUT_DIR=output, DATASETS__TEST="()", **changes)


def _assert_one_line(result, *expected):
    assert result.status == 1 and "Traceback" not in result.out + result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in expected), last


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_writer_is_refused_and_costs_the_first_nothing(tiny_data, tmp_path, resume):
    """A partial checkpoint is a leftover only if no process is writing it."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    kills.finish(tiny_data, whole, False)
    first = kills.start(tiny_data, output, False)
    kills.wait_for(output / "last_checkpoint", first)
    os.kill(first.pid, signal.SIGSTOP)
    first_log = (output / "output.txt").read_text()
    half = output / "model_0000099.pth.partial"
    half.touch()
    second = kills.start(tiny_data, output, resume)
    second.join()
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert (first.exitcode, second.exitcode) == (0, 1)
    log = (output / "output.txt").read_text()[len(first_log) :]
    name = f"process {first.pid} on {socket.gethostname()}"
    assert f"error: {output} is in use by {name}: " in log and "Traceback" not in log
    assert half.exists()
    half.unlink()
    kills.assert_same_run(output, whole)


def test_a_new_run_does_not_go_on_from_an_older_one(tiny_data, train_net, tmp_path):
    """The older one was finished; the new one is killed before its first checkpoint."""
    assert train_net(*ARGS, *_options(tmp_path)).status == 0
    old = kills.load(tmp_path / "model_final.pth")["model"]
    lines = (tmp_path / "metrics.json").read_text()
    process = kills.start(tiny_data, tmp_path, False, SOLVER__CHECKPOINT_PERIOD=1000)
    kills.wait_for(tmp_path / "earlier_run_1", process)
    process.kill()
    process.join()
    assert not list(tmp_path.glob("*.pth")) and not (tmp_path / "last_checkpoint").exists()
    result = train_net(*ARGS, "--resume", *_options(tmp_path, SOLVER__BASE_LR=0.01))
    assert result.status == 0 and "Starting training from iteration 0" in result.out
    kept = tmp_path / "earlier_run_1"
    kills.assert_same(kills.load(kept / "model_final.pth")["model"], old)
    assert (kept / "metrics.json").read_text() == lines and (kept / "last_checkpoint").exists()
    assert not (tmp_path / "earlier_run_2").exists()


def test_a_move_that_was_killed_is_finished_by_any_start(tiny_data, train_net, tmp_path):
    assert train_net(*ARGS, *_options(tmp_path)).status == 0
    partial = tmp_path / "earlier_run_1.partial"
    partial.mkdir()
    (tmp_path / "last_checkpoint").rename(partial / "last_checkpoint")
    result = train_net(*ARGS, "--resume", *_options(tmp_path))
    assert result.status == 0 and "Starting training from iteration 0" in result.out
    names = {p.name for p in (tmp_path / "earlier_run_1").iterdir()}
    assert {"last_checkpoint", "model_final.pth", "metrics.json"} <= names and not partial.exists()


def test_earlier_runs_may_have_been_deleted(tmp_path):
    (tmp_path / "earlier_run_2").mkdir()
    (tmp_path / "earlier_run_2" / "model_final.pth").write_text("oldest")
    for content in ("old", "new"):
        (tmp_path / "model_final.pth").write_text(content)
        with run_folder.run_folder(load_config("", ["OUTPUT_DIR", str(tmp_path)]), resume=False):
            pass
    kept = [tmp_path / f"earlier_run_{n}" / "model_final.pth" for n in (2, 3, 4)]
    assert [file.read_text() for file in kept] == ["oldest", "old", "new"]


def test_a_move_whose_target_exists_takes_another_number(tmp_path):
    for name, content in (("earlier_run_1", "older"), ("earlier_run_1.partial", "newer")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_final.pth").write_text(content)
    with run_folder.run_folder(load_config("", ["OUTPUT_DIR", str(tmp_path)]), resume=True):
        pass
    assert (tmp_path / "earlier_run_1" / "model_final.pth").read_text() == "older"
    assert (tmp_path / "earlier_run_2" / "model_final.pth").read_text() == "newer"


def test_weights_of_the_run_that_would_be_moved_are_refused(tiny_data, train_net, tmp_path):
    assert train_net(*ARGS, *_options(tmp_path)).status == 0
    weights = tmp_path / "model_final.pth"
    result = train_net(*ARGS, *_options(tmp_path, MODEL__WEIGHTS=weights))
    _assert_one_line(result, "MODEL.WEIGHTS", str(weights), "--resume")
    assert weights.exists()


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.ROI_HEADS.NUM_CLASSES", 81),
        ("MODEL.BACKBONE.FREEZE_AT", 2),
        ("MODEL.MASK_ON", False),
        ("MODEL.RESNETS.STRIDE_IN_1X1", False),  # no other weights, another function
        ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]),
        ("MODEL.REFBN.REFERENCE.SEED", 7),
        ("INPUT.FORMAT", "RGB"),
        ("SEED", 77),
    ],
)
def test_a_key_that_makes_another_run_is_named(finished, train_net, key, value):
    before = {p.name: p.read_bytes() for p in finished.glob("[!.]*.*")}
    result = train_net(*ARGS, "--resume", *_options(finished), key, value)
    _assert_one_line(result, str(finished), key, repr(value))
    assert {p.name: p.read_bytes() for p in finished.glob("[!.]*.*")} == before


@pytest.fixture(scope="module")
def finished_once(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    changes = {"SOLVER__MAX_ITER": 2, "SOLVER__CHECKPOINT_PERIOD": 1000, "DATASETS__TEST": "()"}
    kills.finish(tiny_data, folder, False, **changes)
    return folder


@pytest.fixture
def finished(finished_once, tmp_path):
    """A folder with a run of two iterations."""
    return shutil.copytree(finished_once, tmp_path / "finished")


def test_another_schedule_is_taken(finished, train_net):
    """Learning rate, momentum and weight decay are those of the command that resumes."""
    changes = {
        "SOLVER__BASE_LR": 0.004,
        "SOLVER__MAX_ITER": 5,
        "SOLVER__LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "SOLVER__STEPS": "(3,)",
        "SOLVER__MOMENTUM": 0.5,
        "SOLVER__WEIGHT_DECAY": 0.25,
        "SOLVER__WEIGHT_DECAY_NORM": 0.125,
    }
    result = train_net(*ARGS, "--resume", *_options(finished, **changes))
    assert result.status == 0, result.err
    assert "Resuming with SOLVER.BASE_LR 0.004, was 0.2" in result.out
    optimizer = kills.load(finished / "model_final.pth")["trainer"]["_trainer"]["optimizer"]
    groups = optimizer["param_groups"]
    assert {g["initial_lr"] for g in groups} == {0.004} and {g["momentum"] for g in groups} == {0.5}
    assert {g["weight_decay"] for g in groups} == {0.25, 0.125}
    last = json.loads((finished / "metrics.json").read_text().splitlines()[-1])
    assert last["iteration"] == 4 and last["lr"] == pytest.approx(0.0004)  # after the step at 3


def test_the_first_resumed_step_has_the_new_rate(finished, tiny_data):
    options = _options(finished, SOLVER__BASE_LR=0.004, SOLVER__MAX_ITER=4)
    trainer = Trainer(load_config(tiny.CONFIG, options))
    trainer.resume_or_load()
    # Cosine: half of 4 iterations are done.
    rates = [g["lr"] for g in trainer.optimizer.param_groups]
    assert rates == [pytest.approx(0.002)] * len(rates)


def test_evaluating_leaves_the_config_that_resuming_is_checked_by(finished, train_net):
    before = (finished / "config.yaml").read_bytes()
    options = tiny.opts(OUTPUT_DIR=finished, TEST__DETECTIONS_PER_IMAGE=3, SEED=9)
    weights = str(finished / "model_final.pth")
    result = train_net(*ARGS, "--eval-only", *options, "MODEL.WEIGHTS", weights)
    assert result.status == 0, result.err
    assert (finished / "config.yaml").read_bytes() == before
    assert "SEED: 9" in (finished / "inference/config.yaml").read_text()


def test_a_folder_that_cannot_be_made_is_named(tiny_data, train_net, tmp_path):
    (tmp_path / "file").touch()
    result = train_net(*ARGS, *_options(tmp_path / "file/out"))
    _assert_one_line(result, f"{tmp_path}/file/out cannot be written: Not a directory")


@pytest.mark.parametrize(
    "folder, shown", [("", "''"), ("None", "None"), ("s3://a/b", "'s3://a/b'")]
)
def test_an_output_that_is_no_local_folder(
    tiny_data, train_net, tmp_path, monkeypatch, folder, shown
):
    monkeypatch.chdir(tmp_path)
    result = train_net(*ARGS, *_options(folder))
    _assert_one_line(result, f"OUTPUT_DIR is {shown}: use the path of a folder on this machine")
    assert not any(tmp_path.iterdir())


def _delete(folder):
    shutil.rmtree(folder)


def _replace_by_a_file(folder):
    shutil.rmtree(folder)
    folder.touch()


def _protect(folder):
    """Makes the folder read-only. Root may write nevertheless, but not to an immutable folder."""
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        changed = subprocess.run(["chattr", "+i", folder], capture_output=True, text=True)
        if changed.returncode:
            pytest.skip(f"root writes to any folder here: {changed.stderr.strip()}")


def _unprotect(folder):
    subprocess.run(["chattr", "-i", folder], capture_output=True)
    folder.chmod(0o755)


@pytest.mark.parametrize(
    "change, expected",
    [
        (_delete, "OUTPUT_DIR {} was deleted while the run went on"),
        (_replace_by_a_file, "OUTPUT_DIR {} was deleted while the run went on"),
        # Whichever comes next: a checkpoint, or the folder of the evaluation.
        (_protect, r"(checkpoint )?{}/\S+ cannot be written: (Operation not|Permission)"),
    ],
)
def test_a_folder_that_is_lost_while_the_run_goes_on(tiny_data, tmp_path, change, expected):
    """A process of its own, which is stopped for a moment. Open files stay writable in all cases;
    a file system that becomes read-only as a whole is the next test's."""
    output = tmp_path / "out"
    process = kills.start(tiny_data, output, False)
    kills.wait_for(output / "last_checkpoint", process)
    log = (output / "output.txt").open()
    os.kill(process.pid, signal.SIGSTOP)
    try:
        change(output)
        os.kill(process.pid, signal.SIGCONT)
        process.join()
        text = log.read()
    finally:
        process.kill()
        if output.is_dir():
            _unprotect(output)
    assert process.exitcode == 1
    assert "Traceback" not in text
    folder = re.escape(str(output))
    assert re.match(f"error: {expected.format(folder)}", text.splitlines()[-1]), text[-999:]
    if change is not _protect:
        assert not output.is_dir()


def test_a_file_system_that_becomes_read_only(tiny_data, train_net, tmp_path, monkeypatch):
    """The operating system names no file where one that is open cannot be written any more."""

    def write(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(MetricsWriter, "write", write)
    result = train_net(*ARGS, *_options(tmp_path, SOLVER__MAX_ITER=6))
    _assert_one_line(result, f"OUTPUT_DIR {tmp_path} cannot be written: Read-only file system")


def test_only_files_of_the_run_are_blamed_on_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        with output_errors(str(tmp_path / "out")):
            open(tmp_path / "outside")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out/a/x cannot be written: No such file"):
        with output_errors(str(tmp_path / "out")):
            open(tmp_path / "out/a/x", "w")


def test_the_terminal_is_closed(tiny_data, tmp_path):
    """SIGHUP is a notice as SIGTERM is."""
    process = kills.start(tiny_data, tmp_path, False)
    kills.wait_for(tmp_path / "last_checkpoint", process)
    os.kill(process.pid, signal.SIGHUP)
    process.join()
    assert process.exitcode == 128 + signal.SIGHUP
    assert "SIGHUP: stopped after iteration" in (tmp_path / "output.txt").read_text()
    assert torch.load(tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True)


def _two_folders(rank, world_size, folder, shared):
    run_folder._NETWORK_DELAY = 0.5
    cfg = load_config(tiny.CONFIG, ["OUTPUT_DIR", f"{folder}/{0 if shared else rank}"])
    if shared:
        with run_folder.run_folder(cfg, resume=True):
            return
    with pytest.raises(UserError, match=f"is not the one on {socket.gethostname()}: all machines"):
        with run_folder.run_folder(cfg, resume=True):
            pass


@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_that_machines_do_not_share(tmp_path, shared):
    """Each process has another folder of the same name, as on disks of their own."""
    processes.run_group(2, _two_folders, str(tmp_path), shared)
