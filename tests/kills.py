#!/usr/bin/env python3
"""Kills a small training run at random moments, resumes it, and compares the end to the bit.

python tests/kills.py --kills 200 [--seed 1]
"""

import argparse
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Dict, List

import processes
import tiny
import torch
from detectron2.engine.hooks import PeriodicWriter
from torch import multiprocessing as mp
from torch.utils.data._utils import worker

from refbn_d2.engine import Trainer, train_command
from refbn_d2.io.atomic import PARTIAL

# Checkpoints, evaluations and lines of metrics.json: at different iterations, and all at 11.
RUN = {"SOLVER__MAX_ITER": 14, "SOLVER__CHECKPOINT_PERIOD": 4, "TEST__EVAL_PERIOD": 6}
LOG_PERIOD = 3
# What a process took, in metrics.json.
TIMES = {"data_time", "eta_seconds", "rank_data_time", "time"}


class _Trainer(Trainer):
    def build_hooks(self):
        hooks = super().build_hooks()
        for hook in hooks:
            if isinstance(hook, PeriodicWriter):
                hook._period = LOG_PERIOD
        return hooks


def _train(
    data: Path, output: Path, resume: bool, options: Dict[str, object], env: Dict[str, str]
) -> None:
    os.setpgrp()  # a signal to the group is for this run alone
    os.environ.update(env)
    torch.set_num_threads(1)
    # A forked process inherits the server's way of starting workers, which imports all again.
    mp.set_start_method("fork", force=True)
    # Orphaned workers notice after this many seconds and hold up what waits for the process.
    worker.MP_STATUS_CHECK_INTERVAL = 0.2
    tiny.register(data)
    args = ["--config-file", tiny.CONFIG, "--num-gpus", "0", *(["--resume"] if resume else [])]
    sys.argv = ["train_net.py", *args, *tiny.opts(OUTPUT_DIR=output, **{**RUN, **options})]
    output.mkdir(exist_ok=True)
    with open(output / "output.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    train_command(_Trainer, "")


def start(data: Path, output: Path, resume: bool, **options: object) -> mp.Process:
    """Starts ``tools/train_net.py``; what it prints goes to output.txt in its OUTPUT_DIR."""
    return processes.start(_train, data, output, resume, options, {})


def start_several(
    data: Path, output: Path, world_size: int, resume: bool, **options: object
) -> List[mp.Process]:
    """Starts processes of one run, as SLURM's srun does on one machine."""
    env = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}
    env["SLURM_STEP_NUM_TASKS"] = env["SLURM_STEP_TASKS_PER_NODE"] = str(world_size)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        env["MASTER_PORT"] = str(s.getsockname()[1])
    envs = [{**env, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)} for r in range(world_size)]
    return [processes.start(_train, data, output, resume, options, env) for env in envs]


def wait_for(file: Path, *writers: mp.Process) -> None:
    """Until the file is there, or one of those that might write it has ended."""
    while not file.exists() and all(p.is_alive() for p in writers):
        time.sleep(0.005)


def finish(data: Path, output: Path, resume: bool, **options: object) -> None:
    """Trains to the end."""
    process = start(data, output, resume, **options)
    process.join()
    assert process.exitcode == 0, (output / "output.txt").read_text()[-2000:]


def load(file: Path):
    """What is in a checkpoint."""
    return torch.load(file, weights_only=True)


def assert_same(actual, expected, where: str = "") -> None:
    """Bitwise equality of any content of a checkpoint."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for n, (a, b) in enumerate(zip(actual, expected)):
            assert_same(a, b, f"{where}[{n}]")
    else:
        assert repr(actual) == repr(expected), where  # an AP may be NaN


def metrics(folder: Path) -> List[str]:
    """The lines of metrics.json, each valid, without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [json.dumps({k: v for k, v in line.items() if k not in TIMES}) for line in lines]


def assert_same_run(actual: Path, expected: Path) -> None:
    """Weights, optimizer, schedule, reference and metrics of two finished runs are the same."""
    final = "model_final.pth"
    assert_same(load(actual / final), load(expected / final))
    assert metrics(actual) == metrics(expected)
    for name in ("reference.json", "last_checkpoint"):
        assert (actual / name).exists() == (expected / name).exists()
        if (actual / name).exists():
            assert (actual / name).read_bytes() == (expected / name).read_bytes()
    assert not list(actual.glob("*" + PARTIAL))


def _wait(process: mp.Process, output: Path, rng: random.Random, seconds: float) -> None:
    """Until a random moment, or until a random file is half written."""
    end, files = time.monotonic() + rng.uniform(0, seconds), rng.randrange(4)
    seen, writing = 0, rng.random() < 0.3
    while process.is_alive() and (writing or time.monotonic() < end):
        time.sleep(0.0005)
        if writing and any(output.glob("*" + PARTIAL)):
            if seen == files:
                return
            seen += 1
            while any(output.glob("*" + PARTIAL)):
                time.sleep(0.0005)


def kill_and_resume(data: Path, folder: Path, kills: int, seed: int = 0) -> Dict[str, int]:
    """Kills runs until there were so many kills; each ends as one that was never interrupted.

    Args:
        data: the tiny data set.
        folder: for the runs.
        kills: SIGKILLs altogether. A run that reaches its end between them is followed by another.
        seed: of the moments.

    Returns:
        How many "kills" there were, how many of them "in a write", and how many "ends".
    """
    rng, found = random.Random(seed), Counter()
    processes.start(time.sleep, 0).join()  # from here on the server has imported everything
    begin = time.monotonic()
    finish(data, folder / "whole", False)
    seconds = time.monotonic() - begin
    while True:
        output = folder / f"run{found['ends']}"
        process = start(data, output, True)
        if found["kills"] < kills:
            _wait(process, output, rng, seconds)
            process.kill()
        process.join()
        if process.exitcode == 0:
            assert_same_run(output, folder / "whole")
            found["ends"] += 1
            if found["kills"] == kills:
                return dict(found)
        else:
            assert process.exitcode == -9, (output / "output.txt").read_text()[-2000:]
            found["kills"] += 1
            found["in a write"] += any(output.glob("*" + PARTIAL))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tiny_data = tiny.write(Path(scratch) / "data")
        counts = kill_and_resume(tiny_data, Path(scratch), arguments.kills, arguments.seed)
    print(", ".join(f"{value} {name}" for name, value in counts.items()) + ": all the same")
