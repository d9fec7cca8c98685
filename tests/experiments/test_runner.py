"""The runner and the processes of its runs: failures, GPUs, unusual names, and how it ends."""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import processes
import pytest
import tiny
import torch
import yaml

from refbn_d2.commands import compare
from refbn_d2.errors import UserError
from refbn_d2.experiments import process, runner
from refbn_d2.experiments.matrix import load_matrix
from refbn_d2.experiments.runner import run_matrix
from refbn_d2.io.lock import folder_lock, holder

BASE = str(tiny.ROOT / "configs/Quick/Base-mask_rcnn_R_50_C4_quick.yaml")


def _specs(folder, **content):
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({"DETECTOR": BASE, "NORMS": ["BN"], **content}))
    return load_matrix(str(path))


def _run(action, *args):
    """What a process of a run does, with ``action(folder, opts)`` for the training itself."""
    process._train = lambda t, output, num_gpus: action(output / t.folder, t.opts())
    process.run_training(*args)


@pytest.fixture
def child(monkeypatch):
    """Replaces the training in the processes that the runner starts."""

    def use(action) -> None:
        monkeypatch.setattr(runner, "run_training", functools.partial(_run, action))

    return use


def _nothing(folder, opts):
    pass


def _record(output, spec):
    return json.loads((output / spec.folder / "run.json").read_text())


def _fail_with_seed_1(folder, opts):
    if opts[opts.index("SEED") + 1] == "1":
        raise UserError("no [/such] thing in [red")


@pytest.mark.parametrize("name", ["BN [/x]", "[bold]BN", "[link=http://x]", "$x$"])
def test_names_and_messages_are_no_markup(tmp_path, child, capfd, name):
    """A run that fails with brackets in its message does not end the others."""
    child(_fail_with_seed_1)
    specs = _specs(tmp_path, NORMS=[{"name": name, "norm": "BN"}], SEEDS=[1, 2])
    first, second = run_matrix(specs, tmp_path / "out", 0, 1)
    assert (first["status"], second["status"]) == ("failed", "finished")
    assert "no [/such] thing in [red" in capfd.readouterr().err.replace("\n", " ")
    assert _record(tmp_path / "out", specs[0])["error"] == "no [/such] thing in [red"


def _users_error(folder, opts):
    print("begin")
    raise UserError("the reason")


def _crash(folder, opts):
    print(1 / 0)


def _two_lines(folder, opts):
    raise RuntimeError("first\nlast\n\n")


def _send(signum, folder, opts):
    os.kill(os.getpid(), signum)


def _exit(status, folder, opts):
    os._exit(status)


@pytest.mark.parametrize(
    "action, reason",
    [
        (_users_error, "the reason"),
        (_crash, "ZeroDivisionError: division by zero (see LOG)"),
        (_two_lines, "last (see LOG)"),
        (functools.partial(_exit, 3), "ended with status 3 (see LOG)"),
        (
            functools.partial(_send, signal.SIGKILL),
            "ended by signal 9 (Killed), out of memory? (see LOG)",
        ),
        (
            functools.partial(_send, signal.SIGSEGV),
            "ended by signal 11 (Segmentation fault) (see LOG)",
        ),
    ],
)
def test_the_reason_of_a_failure(tmp_path, child, action, reason):
    specs = _specs(tmp_path)
    child(action)
    (record,) = run_matrix(specs, tmp_path / "out", 0, 1)
    log = tmp_path / "out" / specs[0].folder / "console.txt"
    assert record["status"] == "failed" and record["error"] == reason.replace("LOG", str(log))
    assert record == _record(tmp_path / "out", specs[0])
    assert ("Traceback" in log.read_text()) == (action in (_crash, _two_lines))
    # A second call tries again, and says nothing of the first.
    child(_nothing)
    (again,) = run_matrix(specs, tmp_path / "out", 0, 1)
    assert again["status"] == "finished" and "error" not in again
    assert again["seconds"] >= record["seconds"]


def _exit_after_sigterm(folder, opts):
    sys.exit(128 + signal.SIGTERM)


def _end_by_sigterm(folder, opts):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "action", [_exit_after_sigterm, _end_by_sigterm, functools.partial(_send, signal.SIGINT)]
)
def test_a_training_that_somebody_told_to_end_was_stopped(tmp_path, child, action):
    """A scheduler tells all processes of a job, and a training may end before its runner."""
    child(action)
    records = run_matrix(_specs(tmp_path, SEEDS=[1, 2]), tmp_path / "out", 0, 1)
    assert [r["status"] for r in records] == ["interrupted"] * 2
    assert records[0]["error"] == "stopped; the same command goes on from the last checkpoint"


def _write_threads(folder, opts):
    (folder / "threads").write_text(
        f"{torch.get_num_threads()} {multiprocessing.get_start_method()}"
    )


def test_runs_share_the_cores(tmp_path, child):
    """Threads that wait for a core spin; and a loader's workers are forked, as in a command."""
    child(_write_threads)
    specs = _specs(tmp_path, SEEDS=[1, 2])
    run_matrix(specs, tmp_path / "out", 0, 2)
    threads = max(1, os.cpu_count() // 2)
    for spec in specs:
        assert (tmp_path / "out" / spec.folder / "threads").read_text() == f"{threads} fork"


def _show_gpus(folder, opts):
    (folder / "gpus").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    while not (folder.parents[3] / "GO").exists():
        time.sleep(0.02)


def test_each_run_has_gpus_of_its_own(tmp_path, child, monkeypatch):
    """Two at a time on GPUs 4 to 7: never do two that overlap in time share one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    child(_show_gpus)
    specs = _specs(tmp_path, SEEDS=[1, 2])

    def go():
        files = [tmp_path / "out" / s.folder / "gpus" for s in specs]
        while not all(f.exists() and f.read_text() for f in files):
            time.sleep(0.02)
        (tmp_path / "GO").touch()

    threading.Thread(target=go, daemon=True).start()
    run_matrix(specs, tmp_path / "out", 2, 2)
    used = {(tmp_path / "out" / s.folder / "gpus").read_text() for s in specs}
    assert used == {"4,5", "6,7"} and os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    with pytest.raises(UserError, match="--jobs 3 with --num-gpus 2: there are 4 GPUs"):
        run_matrix(specs, tmp_path / "out", 2, 3)


def _save_when_told(folder, opts):
    try:
        (folder / "started").touch()
        time.sleep(60)
    except SystemExit as e:
        time.sleep(1.5)  # by now it was told again
        (folder / "saved").write_text(str(e.code))
        raise


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_told_to_end_it_lets_its_runs_save(tmp_path, child, signum, status):
    child(_save_when_told)
    specs = _specs(tmp_path, SEEDS=[1, 2])
    folder = tmp_path / "out" / specs[0].folder

    def tell():
        while not (folder / "started").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signum)

    threading.Thread(target=tell, daemon=True).start()
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as e:
        run_matrix(specs, tmp_path / "out", 0, 1)
    assert e.value.code == status and signal.getsignal(signum) == before
    assert (folder / "saved").read_text() == "143"
    assert _record(tmp_path / "out", specs[1])["status"] == "queued"  # it never began
    record = _record(tmp_path / "out", specs[0])
    assert record["status"] == "interrupted" and record["error"].startswith("stopped; ")
    child(_nothing)
    records = run_matrix(specs, tmp_path / "out", 0, 1)
    assert [r["status"] for r in records] == ["finished"] * 2 and "error" not in records[0]


def _run_matrix_in_a_group(folder):
    os.setpgrp()
    runner.run_training = functools.partial(_run, _save_when_told)
    run_matrix(_specs(folder), folder / "out", 0, 1)


def test_a_signal_to_all_processes_is_waited_for(tmp_path):
    """As a scheduler, or a terminal that is closed, sends it."""
    call = processes.start(_run_matrix_in_a_group, tmp_path)
    (spec,) = _specs(tmp_path)
    folder = tmp_path / "out" / spec.folder
    while not (folder / "started").exists() and call.is_alive():
        time.sleep(0.02)
    os.killpg(call.pid, signal.SIGTERM)
    call.join()
    assert call.exitcode == 143 and (folder / "saved").read_text() == "143"
    assert _record(tmp_path / "out", spec)["status"] == "interrupted"


def _write_for_a_while(folder):
    with folder_lock(folder):
        (folder / "writing").touch()
        while '"running"' not in (folder / "run.json").read_text():
            time.sleep(0.02)
        time.sleep(0.5)
        (folder / "written").touch()


def _needs_what_was_written(folder, opts):
    assert (folder / "written").exists()


def test_a_run_that_an_orphan_still_has_is_waited_for(tmp_path, child):
    specs = _specs(tmp_path)
    folder = tmp_path / "out" / specs[0].folder
    child(_nothing)
    run_matrix(specs, tmp_path / "out", 0, 1)
    record = _record(tmp_path / "out", specs[0])
    (folder / "run.json").write_text(json.dumps({**record, "status": "queued"}))
    orphan = processes.start(_write_for_a_while, folder)
    while not (folder / "writing").exists():
        time.sleep(0.02)
    child(_needs_what_was_written)
    (record,) = run_matrix(specs, tmp_path / "out", 0, 1)
    orphan.join()
    assert record["status"] == "finished", record


def test_killed_its_training_ends_and_keeps_its_state(tmp_path, tiny_data):
    """Really: kill -9 of the command while it trains; before that, a second one is refused."""
    opts = tiny.opts(
        DATASETS__TRAIN="('coco_2017_train',)",
        DATASETS__TEST="('coco_2017_val',)",
        SOLVER__MAX_ITER=100000,
    )
    (spec,) = _specs(tmp_path, NORMS=["RefBN"], OPTS=opts)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "refbn_d2", "compare", "run", str(tmp_path / "matrix.yaml")]
    command += ["--output", str(output)]
    env = tiny.environment(DETECTRON2_DATASETS=str(tiny_data))
    options = {"env": env, "cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, **options)
    while not (output / spec.folder / "reference.json").exists() and first.poll() is None:
        time.sleep(0.05)
    assert first.poll() is None, first.communicate()
    assert holder(output / spec.folder)
    second = subprocess.run(command, **options)
    assert second.returncode == 1
    assert f"error: {output} is in use by process {first.pid} on" in second.stderr
    first.kill()
    first.communicate()
    for _ in range(3000):
        if holder(output / spec.folder) is None:
            break
        time.sleep(0.02)
    assert holder(output / spec.folder) is None
    log = (output / spec.folder / "console.txt").read_text()
    assert "SIGTERM: stopped after iteration" in log and list(
        (output / spec.folder).glob("model_*")
    )


def test_a_matrix_without_an_evaluation_is_refused(tmp_path):
    with pytest.raises(UserError, match="BN: DATASETS.TEST is ..: name the one data set"):
        run_matrix(_specs(tmp_path, OPTS=["DATASETS.TEST", "()"]), tmp_path / "out", 0, 1)


def test_options_of_the_command_that_would_have_no_effect(tmp_path, monkeypatch, capsys):
    arguments = ["compare", "run", "Matrix/quickstart.yaml", "--output", str(tmp_path / "out")]
    for option, message in (
        (["--max-seeds", "4"], "--max-seeds belongs to --until-decided"),
        (["--margin", "1"], "--margin belongs to --until-decided"),
        (["--baseline", "BN"], "--baseline belongs to --until-decided"),
        (["--until-decided", "--margin", "inf"], "--margin inf: must be a number above 0"),
        (["--num-gpus", "-1"], "--num-gpus -1: use a number from 0"),
    ):
        monkeypatch.setattr(sys, "argv", [*arguments, *option])
        with pytest.raises(SystemExit):
            compare.main()
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_two_calls_may_take_different_seeds_of_one_output(tmp_path, child):
    """As on two machines; those that share a seed are refused (see above, with real processes)."""
    child(_nothing)
    output = tmp_path / "out"
    with folder_lock(output, name=".lock_seed2"):
        records = run_matrix(_specs(tmp_path, SEEDS=[1]), output, 0, 1)
    assert [r["status"] for r in records] == ["finished"]
    locks = {p.name for p in output.glob(".lock*")}
    assert locks == {".lock_seed1", ".lock_seed2"}
