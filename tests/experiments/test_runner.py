"""The runner and its child processes: failures, GPUs, unusual names, and how it ends."""

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
from refbn_d2.experiments import runner
from refbn_d2.experiments.matrix import load_matrix
from refbn_d2.experiments.runner import run_matrix
from refbn_d2.io.lock import folder_lock

BASE = str(tiny.ROOT / "configs/Quick/Base-mask_rcnn_R_50_C4_quick.yaml")


def _specs(folder, **content):
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({"DETECTOR": BASE, "NORMS": ["BN"], **content}))
    return load_matrix(str(path))


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Replaces the training that the runner starts by a shell script: its arguments are $@."""

    def use(script: str) -> None:
        file = tmp_path / "python"
        file.write_text(f'#!/bin/bash\nwhile [ "$1" != OUTPUT_DIR ]; do shift; done\n{script}\n')
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))

    return use


def _record(output, spec):
    return json.loads((output / spec.folder / "run.json").read_text())


@pytest.mark.parametrize("name", ["BN [/x]", "[bold]BN", "[link=http://x]", "$x$"])
def test_names_and_messages_are_no_markup(tmp_path, child, capfd, name):
    """A run that fails with brackets in its last line does not end the others."""
    child('case "$*" in *"SEED 1"*) echo "error: no [/such] thing in [red"; exit 1;; esac')
    specs = _specs(tmp_path, NORMS=[{"name": name, "norm": "BN"}], SEEDS=[1, 2])
    first, second = run_matrix(specs, tmp_path / "out", 0, 1)
    assert (first["status"], second["status"]) == ("failed", "finished")
    assert "no [/such] thing in [red" in capfd.readouterr().err.replace("\n", " ")
    assert _record(tmp_path / "out", specs[0])["error"].startswith(
        "error: no [/such] thing in [red ("
    )


@pytest.mark.parametrize(
    "script, reason",
    [
        (
            "echo begin; echo 'error: the reason'; printf ' 10%%\\r 20%%'; exit 1",
            "error: the reason",
        ),
        ("echo first; echo last; exit 3", "last"),
        ("exit 1", "no output"),
        ("echo x; kill -9 $$", "ended by SIGKILL (out of memory?)"),
        ("exit 137", "ended by SIGKILL (out of memory?)"),
        ("kill -SEGV $$", "ended by SIGSEGV"),
    ],
)
def test_the_reason_of_a_failure(tmp_path, child, script, reason):
    specs = _specs(tmp_path)
    child(script)
    (record,) = run_matrix(specs, tmp_path / "out", 0, 1)
    log = tmp_path / "out" / specs[0].folder / "console.txt"
    assert record["error"] == f"{reason} (see {log})"
    # A second call tries again, and says nothing of the first.
    child("echo 'error: another'; exit 1")
    (record,) = run_matrix(specs, tmp_path / "out", 0, 1)
    assert record["error"] == f"error: another (see {log})" and record["seconds"] >= 0


@pytest.mark.parametrize("script", ["exit 143", "kill -TERM $$", "exit 129"])
def test_a_training_that_somebody_told_to_end_was_stopped(tmp_path, child, script):
    """A scheduler tells all processes of a job, and a training may end before its runner."""
    child(script)
    first, second = run_matrix(_specs(tmp_path, SEEDS=[1, 2]), tmp_path / "out", 0, 1)
    assert first["status"] == second["status"] == "interrupted"
    assert first["error"] == "stopped; the same command goes on from the last checkpoint"


def test_each_run_has_gpus_of_its_own(tmp_path, child, monkeypatch):
    """Two at a time on GPUs 4 to 7: never do two that overlap in time share one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    child('echo "$CUDA_VISIBLE_DEVICES" > "$2/gpus"; while [ ! -e GO ]; do sleep 0.02; done')
    monkeypatch.chdir(tmp_path)
    specs = _specs(tmp_path, SEEDS=[1, 2])

    def go():
        files = [tmp_path / "out" / s.folder / "gpus" for s in specs]
        while not all(f.exists() and f.read_text() for f in files):
            time.sleep(0.02)
        (tmp_path / "GO").touch()

    threading.Thread(target=go, daemon=True).start()
    run_matrix(specs, tmp_path / "out", 2, 2)
    used = {(tmp_path / "out" / s.folder / "gpus").read_text().strip() for s in specs}
    assert used == {"4,5", "6,7"}
    with pytest.raises(UserError, match="--jobs 3 with --num-gpus 2: there are 4 GPUs"):
        run_matrix(specs, tmp_path / "out", 2, 3)


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_told_to_end_it_lets_its_children_save(tmp_path, child, signum, status):
    child(
        'trap "echo saved > $2/saved; exit 143" TERM\n'
        'echo "   7%|progress"; touch "$2/started"; while true; do sleep 0.05; done'
    )
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
    assert (folder / "saved").exists()
    assert _record(tmp_path / "out", specs[1])["status"] == "queued"  # it never began
    record = _record(tmp_path / "out", specs[0])
    assert record["status"] == "interrupted" and record["error"].startswith("stopped; ")
    child("exit 0")
    records = run_matrix(specs, tmp_path / "out", 0, 1)
    assert [r["status"] for r in records] == ["finished"] * 2 and "error" not in records[0]


def test_a_run_that_an_orphan_still_has_is_waited_for(tmp_path, child, monkeypatch):
    looks = ["process 7 on node3", "process 7 on node3", None]
    monkeypatch.setattr(runner, "holder", lambda folder: looks.pop(0))
    child("exit 0")
    (record,) = run_matrix(_specs(tmp_path), tmp_path / "out", 0, 1)
    assert record["status"] == "finished" and not looks


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
    assert runner.holder(output / spec.folder)
    second = subprocess.run(command, **options)
    assert second.returncode == 1
    assert f"error: {output} is in use by process {first.pid} on" in second.stderr
    first.kill()
    first.communicate()
    for _ in range(3000):
        if runner.holder(output / spec.folder) is None:
            break
        time.sleep(0.02)
    assert runner.holder(output / spec.folder) is None
    log = (output / spec.folder / "console.txt").read_text()
    assert "SIGTERM: stopped after iteration" in log and list(
        (output / spec.folder).glob("model_*")
    )


def test_a_matrix_without_an_evaluation_is_refused(tmp_path):
    with pytest.raises(UserError, match="BN.*DATASETS.TEST is empty"):
        run_matrix(_specs(tmp_path, OPTS=["DATASETS.TEST", "()"]), tmp_path / "out", 0, 1)


def test_two_calls_may_take_different_seeds_of_one_output(tmp_path, child):
    """As on two machines; those that share a seed are refused (see above, with real processes)."""
    child("exit 0")
    output = tmp_path / "out"
    with folder_lock(output, name=".lock_seed2"):
        records = run_matrix(_specs(tmp_path, SEEDS=[1]), output, 0, 1)
    assert [r["status"] for r in records] == ["finished"]
    locks = {p.name for p in output.glob(".lock*")}
    assert locks == {".lock_seed1", ".lock_seed2"}
