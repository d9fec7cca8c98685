"""A matrix on a real SLURM on this machine; skipped if there is none (`make slurm-test`)."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from dev import slurm
from refbn_d2.errors import UserError
from refbn_d2.experiments.matrix import load_matrix
from refbn_d2.experiments.records import last_metrics, read_record
from refbn_d2.experiments.slurm import submit_matrix
from refbn_d2.experiments.status import (
    cancel,
    find_stages,
    is_live,
    job_of,
    scheduler,
    summary,
)

reason = slurm.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason), reason=str(reason))]

BASE = str(tiny.ROOT / "configs/Quick/Base-mask_rcnn_R_50_C4_quick.yaml")
# Long enough for a notice to come in between; a checkpoint is 0.5 MB.
STEPS = 120


@pytest.fixture(scope="module")
def cluster():
    with slurm.cluster() as env:
        yield env


@pytest.fixture
def env(cluster, tiny_data, monkeypatch):
    """The environment of its commands, here and for processes."""
    env = {**tiny.environment(DETECTRON2_DATASETS=str(tiny_data)), **cluster}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return env


def _matrix(folder, steps, **content):
    opts = tiny.opts(
        DATASETS__TRAIN="('coco_2017_train',)",
        DATASETS__TEST="('coco_2017_val',)",
        SOLVER__MAX_ITER=steps,
    )
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({"DETECTOR": BASE, "NORMS": ["RefBN"], "OPTS": opts, **content}))
    return load_matrix(str(path))


def _wait(condition, seconds=200):
    """Until it is true. SLURM waits two minutes before a requeued job; here it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
        for job in _ask("squeue", "--noheader", "--states=PD", "--format=%i %r").splitlines():
            if job.endswith("BeginTime"):
                _ask("scontrol", "update", f"job={job.split()[0]}", "starttime=now")


def _has_ended(output):
    return all(x.status not in ("queued", "running") for x in find_stages(output))


def _ask(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _show(folder):
    """What SLURM says of the job of a run."""
    words = _ask("scontrol", "show", "job", job_of(folder)).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def _parent(process):
    return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_four_runs_by_the_commands(env, tmp_path):
    specs = _matrix(tmp_path, STEPS, NORMS=["BN", "RefBN"], SEEDS=[1, 2])
    output = tmp_path / "out"
    compare = [sys.executable, "-m", "refbn_d2", "compare"]
    command = [*compare, "run", str(tmp_path / "matrix.yaml"), "--output", str(output)]
    said = _ask(*command, "--executor", "slurm", "--slurm", "partition=main", "time=5")
    assert "4 submitted now" in said
    live = _ask(*compare, "status", str(output))
    assert live.startswith("4 trainings: 0 done") and "job 1" in live
    submit_matrix(specs, output, 0, {})  # those that wait or run are not submitted again
    assert [job_of(output / spec.folder) for spec in specs] == ["1", "2", "3", "4"]
    _wait(lambda: _has_ended(output))
    said = summary(find_stages(output))
    assert said.startswith("4 trainings: 4 done, 0 running, 0 queued, 0 failed"), said
    for spec in specs:
        assert (output / spec.folder / "inference/coco_instances_results.json").is_file()


def test_interrupted_three_times_it_ends_bit_identical(env, tmp_path):
    """By a notice, by a preemption, and because its machine is gone."""
    (spec,) = specs = _matrix(tmp_path, STEPS)
    submit_matrix(specs, tmp_path / "out", 0, {})
    folder = tmp_path / "out" / spec.folder
    console, last = folder / "console.txt", [0]

    def trains(attempt):
        text = console.read_text() if console.exists() else ""
        if text.count("Starting training from iteration") < attempt:
            last[0] = last_metrics(folder).get("iteration", 0)
        return last_metrics(folder).get("iteration", 0) > last[0]

    _wait(lambda: trains(1))
    _ask("scancel", "--signal=TERM", "--batch", job_of(folder))
    _wait(lambda: trains(2))
    assert _show(folder)["Restarts"] == "1"
    _ask("scontrol", "requeue", job_of(folder))
    _wait(lambda: trains(3))
    node = _show(folder)["NodeList"]
    # From the machine's daemon down to the training, so that nobody can tell anybody.
    training = int((folder / ".lock").read_text().split()[0])
    daemon = int((Path(env["SLURM_CONF"]).parent / f"slurmd.{node}.pid").read_text())
    for process in (daemon, _parent(training), training):
        os.kill(process, signal.SIGKILL)
    _wait(lambda: _show(folder)["Restarts"] == "3")  # SLURM has missed the machine
    assert "down" in _ask("sinfo", "--noheader", "--format=%t", f"--nodes={node}")
    _wait(lambda: _has_ended(tmp_path / "out"))
    slurm.start_node(node, env)
    (stage,) = find_stages(tmp_path / "out")
    assert (stage.status, _show(folder)["Restarts"]) == ("done", "3"), stage
    assert "error" not in read_record(folder / "run.json")
    # A job has one core here: rounding depends on the number of threads.
    command = [sys.executable, "-m", "refbn_d2", "compare", "run", str(tmp_path / "matrix.yaml")]
    _ask(*command, "--output", str(tmp_path / "local"), "--jobs", str(os.cpu_count()))
    ours, theirs = (
        torch.load(x / spec.folder / "model_final.pth", weights_only=True)
        for x in (tmp_path / "out", tmp_path / "local")
    )
    assert ours["iteration"] == theirs["iteration"] == STEPS - 1
    for name, tensor in theirs["model"].items():
        assert torch.equal(ours["model"][name], tensor), name


def test_the_script_of_the_documents(env, tmp_path):
    """docs/scaling.md, with one process on each of two machines."""
    page = (tiny.ROOT / "docs/scaling.md").read_text()
    script = re.search(r"```sh\n(#SBATCH.*?)```", page, re.DOTALL)[1]
    opts = tiny.opts(
        DATASETS__TRAIN="('coco_2017_train',)", DATASETS__TEST="()", OUTPUT_DIR=tmp_path / "out"
    )
    arguments = shlex.join(["--config-file", tiny.CONFIG, *opts])
    for old, new in {
        "--ntasks-per-node=8 --gpus-per-node=8": "--ntasks-per-node=1",
        "refbn-d2": f"{shlex.quote(sys.executable)} -m refbn_d2",
        "--config-file …": arguments,
        # Both machines are this one: their names are no addresses.
        "srun": "export MASTER_ADDR=localhost; srun",
    }.items():
        assert old in script
        script = script.replace(old, new)
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n{script}true\n")
    subprocess.run(["sbatch", "--wait", str(tmp_path / "job.sh")], cwd=tmp_path, check=True)
    log = "".join(p.read_text() for p in tmp_path.glob("slurm-*.out"))
    assert (tmp_path / "out/model_final.pth").is_file(), log
    assert "Environment info" in log and "Rank of current process: 0. World size: 2" in log


def test_a_job_that_takes_too_much_memory(env, tmp_path):
    (spec,) = specs = _matrix(tmp_path, 2)
    submit_matrix(specs, tmp_path / "out", 0, {"mem": "50M"})
    _wait(lambda: _has_ended(tmp_path / "out"))
    (stage,) = find_stages(tmp_path / "out")
    assert stage.status == "failed" and stage.detail.startswith("killed by SLURM for its memory")


def test_a_detector_without_its_pretraining(env, tmp_path):
    specs = _matrix(
        tmp_path,
        2,
        CLASSIFIER=str(tiny.ROOT / "configs/Quick/Base-classifier.yaml"),
        CLASSIFIER_OPTS=["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "('nothing',)"],
    )
    submit_matrix(specs, tmp_path / "out", 0, {})
    waiting = [x for x in find_stages(tmp_path / "out") if x.detail == "Dependency"]
    assert [x.folder for x in waiting] == [specs[0].folder]
    _wait(lambda: _has_ended(tmp_path / "out"))
    pretraining, detector = find_stages(tmp_path / "out")
    assert pretraining.status == detector.status == "failed"
    assert "unknown data set 'nothing'" in pretraining.detail
    assert detector.detail == f"pretraining failed: {pretraining.detail}"


def test_what_slurm_refuses(env, tmp_path):
    specs = _matrix(tmp_path, 2)
    with pytest.raises(UserError, match="sbatch: error: .*nvalid partition"):
        submit_matrix(specs, tmp_path / "out", 0, {"partition": "no-such"})
    with pytest.raises(UserError, match="unrecognized option '--no-such=1'"):
        submit_matrix(specs, tmp_path / "out", 0, {"no-such": "1"})
    assert not is_live(scheduler(["1000"]).get("1000"))


def test_cancelled_it_saves_and_stays_cancelled(env, tmp_path):
    (spec,) = specs = _matrix(tmp_path, 100_000)
    submit_matrix(specs, tmp_path / "out", 0, {})
    folder = tmp_path / "out" / spec.folder
    _wait(lambda: last_metrics(folder))
    (stage,) = find_stages(tmp_path / "out")
    assert stage.status == "running" and stage.left > 0 and "of 100000" in stage.detail
    assert cancel(tmp_path / "out") == [f"job {job_of(folder)}"]
    _wait(lambda: _has_ended(tmp_path / "out"))
    (stage,) = find_stages(tmp_path / "out")
    assert stage.status == "stopped" and stage.detail.startswith("stopped; "), stage
    assert list(folder.glob("model_*.pth")) and _show(folder)["JobState"] == "CANCELLED"
