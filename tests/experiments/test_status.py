"""`compare status` and `cancel` without SLURM, and their errors if SLURM is not installed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny
import yaml

from refbn_d2.errors import UserError
from refbn_d2.experiments import process, runner
from refbn_d2.experiments.matrix import load_matrix
from refbn_d2.experiments.runner import run_matrix
from refbn_d2.experiments.slurm import submit_matrix
from refbn_d2.experiments.status import Stage, cancel, find_stages, scheduler, summary

BASE = str(tiny.ROOT / "configs/Quick/Base-mask_rcnn_R_50_C4_quick.yaml")


@pytest.fixture
def specs(tmp_path):
    path = tmp_path / "matrix.yaml"
    path.write_text(yaml.safe_dump({"DETECTOR": BASE, "NORMS": ["BN"], "SEEDS": [1, 2]}))
    return load_matrix(str(path))


def _wait(*args):
    """What a process of a run does, with a pause for the training itself."""
    process._train = lambda *_: time.sleep(60)
    process.run_training(*args)


def test_a_local_matrix_is_seen_and_cancelled_from_outside(tmp_path, specs, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(runner, "run_training", _wait)
    # Another process asks: this one has the locks, and would lose them by asking.
    code = (
        "import sys; from pathlib import Path; from refbn_d2.experiments.status import *\n"
        "print(summary(find_stages(Path(sys.argv[1])))); print(*cancel(Path(sys.argv[1])))"
    )
    said = []

    def ask():
        file = output / specs[0].folder / "run.json"
        while not file.exists() or '"running"' not in file.read_text():
            time.sleep(0.02)
        (output / specs[0].folder / "metrics.json").write_text(
            '{"iteration": 19, "eta_seconds": 7}'
        )
        command = [sys.executable, "-c", code, str(output)]
        said.append(subprocess.run(command, capture_output=True, text=True, env=tiny.environment()))
        if said[0].returncode:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(SystemExit) as e:
        run_matrix(specs, output, 0, 1)
    thread.join()
    assert e.value.code == 128 + signal.SIGTERM
    first, running, queued, ended = said[0].stdout.splitlines() or said
    assert first == "2 trainings: 0 done, 1 running, 1 queued, 0 failed"
    assert running.split()[:2] == ["running", "BN/batch4_grouping0/seed1"]
    assert "iteration 19 of 450, 0:00:07 left" in running
    assert queued == "queued   BN/batch4_grouping0/seed2"
    assert ended.startswith(f"process {os.getpid()} on ")
    assert [x.status for x in find_stages(output)] == ["stopped", "stopped"]
    assert summary(find_stages(output)).startswith("2 trainings: 0 done, 0 running, 0 queued, 2 st")
    assert cancel(output) == []


def test_the_time_left_is_that_of_what_waits_too(tmp_path):
    """One has taken 100 s; two run, with 40 and 60 s left, and three wait: (100 + 300) / 2."""
    stages = [Stage(tmp_path, "done", seconds=100)]
    stages += [Stage(tmp_path, "running", left=40), Stage(tmp_path, "running", left=60)]
    stages += [Stage(tmp_path, "queued")] * 3
    assert "about 0:03:20 (h:mm:ss) left" in summary(stages)
    assert "left" not in summary(stages[1:]).splitlines()[0]  # nobody knows how long one takes


# What SLURM 22.05 has written into the logs of jobs that it killed.
TIME = "slurmstepd: error: *** JOB 7 ON node1 CANCELLED AT 2026-11-26T02:00 DUE TO TIME LIMIT ***"
MEMORY = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.batch. Some of your processes"


@pytest.mark.parametrize(
    "log, record, detail",
    [
        (TIME, {"status": "running"}, "killed by SLURM at its time limit"),
        (MEMORY, {"status": "failed", "error": "ended by SIGKILL"}, "killed by SLURM for its mem"),
        (TIME, {"status": "failed", "error": "error: no such thing"}, "error: no such thing"),
        ("one\ntwo\n", {"status": "running"}, "two (see "),
        (None, {"status": "queued"}, "no output in "),
    ],
)
def test_why_a_job_has_ended(tmp_path, monkeypatch, log, record, detail):
    """SLURM has forgotten the job, as it does after minutes; its log is all there is."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "squeue").write_text(
        "#!/bin/sh\necho error: Invalid job id specified >&2; exit 1"
    )
    (bin_folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    folder = tmp_path / "out/BN/seed1"
    (tmp_path / "out/slurm").mkdir(parents=True)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"seed": 1, **record}))
    (folder / "slurm.json").write_text('{"job": "7"}')
    if log is not None:
        (tmp_path / "out/slurm/7_0_log.out").write_text(log)
    (stage,) = find_stages(tmp_path / "out")
    assert stage.status == "failed" and stage.detail.startswith(detail)


def test_what_is_not_installed_is_named(tmp_path, specs, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get install slurm-client"):
        submit_matrix(specs, tmp_path / "out", 0, {})
    with pytest.raises(UserError, match="squeue is not installed"):
        scheduler(["1"])
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'refbn_d2\[slurm\]'"):
        submit_matrix(specs, tmp_path / "out", 0, {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nothing", "."])
def test_a_folder_without_runs(tmp_path, name):
    with pytest.raises(UserError, match="no such folder|no run was begun in it"):
        find_stages(tmp_path / name)
