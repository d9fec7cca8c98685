"""A run killed and resumed ends with the weights of one that never stopped, bit for bit."""

import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from torch import multiprocessing as mp
from torch.utils.data._utils import worker

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer, train_command
from refbn_d2.engine.checkpoint import Checkpointer

ITERATIONS = 8


def _train(data: Path, output: Path, resume: bool, options: dict) -> None:
    torch.set_num_threads(1)
    # A forked process inherits the server's way of starting workers, which imports all again.
    mp.set_start_method("fork", force=True)
    # Orphaned workers notice after this many seconds and hold up what waits for the process.
    worker.MP_STATUS_CHECK_INTERVAL = 0.2
    tiny.register(data)
    args = ["--config-file", tiny.CONFIG, "--num-gpus", "0", *(["--resume"] if resume else [])]
    settings = tiny.opts(
        OUTPUT_DIR=output, SOLVER__MAX_ITER=ITERATIONS, SOLVER__CHECKPOINT_PERIOD=3, **options
    )
    sys.argv = ["train_net.py", *args, *settings]
    output.mkdir(exist_ok=True)
    with open(output / "output.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    train_command(Trainer, "")


def _start(*args):
    # One server imports torch and detectron2, which takes seconds, and the processes fork from it.
    mp.set_forkserver_preload(["refbn_d2.engine", "tiny"])
    process = mp.get_context("forkserver").Process(target=_train, args=args)
    process.start()
    return process


def _finish(data: Path, output: Path, resume: bool, options: dict) -> None:
    process = _start(data, output, resume, options)
    process.join()
    assert process.exitcode == 0, (output / "output.txt").read_text()[-2000:]


def _kill_after_checkpoint(data: Path, output: Path, options: dict) -> None:
    process = _start(data, output, False, options)
    deadline = time.monotonic() + 120
    while not (output / "last_checkpoint").exists() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (output / "output.txt").read_text()[-2000:]
    assert not (output / "model_final.pth").exists()


def _load(file: Path):
    return torch.load(file, weights_only=True)


def _assert_same(actual, expected, where=""):
    """Equal to the bit, whatever the checkpoint holds."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            _assert_same(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for n, (a, b) in enumerate(zip(actual, expected)):
            _assert_same(a, b, f"{where}[{n}]")
    else:
        assert actual == expected, where


@pytest.mark.parametrize(
    "options, workers",
    [
        # Not even the number of workers matters.
        ({"MODEL__RESNETS__NORM": "BN"}, [0, 2]),
        ({}, [0, 2]),
        # The checkpoint lies at an iteration before which the reference is taken again.
        ({"MODEL__REFBN__REFERENCE__REFRESH_PERIOD": 3}, [0]),
    ],
    ids=["BN", "RefBN", "RefBN, refreshed"],
)
def test_killed_and_resumed_equals_uninterrupted(tiny_data, tmp_path, options, workers):
    whole = tmp_path / "whole"
    _finish(tiny_data, whole, False, options)
    for n in workers:
        output, changed = tmp_path / f"workers{n}", {**options, "DATALOADER__NUM_WORKERS": n}
        _kill_after_checkpoint(tiny_data, output, changed)
        _finish(tiny_data, output, True, changed)
        _assert_same(_load(output / "model_final.pth"), _load(whole / "model_final.pth"))
        reference = output / "reference.json"
        if reference.exists():
            assert reference.read_bytes() == (whole / "reference.json").read_bytes()


def test_without_a_seed_the_run_resumes_with_the_one_it_drew(tiny_data, tmp_path):
    options = {
        "SEED": -1,
        "MODEL__WEIGHTS": tmp_path / "start.pth",
        # A sampler that draws a seed itself where detectron2 does not give it one.
        "DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
        "DATALOADER__REPEAT_THRESHOLD": 0.9,
    }
    model = Trainer.build_model(load_config(tiny.CONFIG, tiny.opts()))
    torch.save({"model": model.state_dict()}, options["MODEL__WEIGHTS"])
    output, whole = tmp_path / "resumed", tmp_path / "whole"
    _kill_after_checkpoint(tiny_data, output, options)
    seed = _load(output / "model_0000002.pth")["trainer"]["hooks"]["ExactResume"]["seed"]
    _finish(tiny_data, output, True, options)
    _finish(tiny_data, whole, False, {**options, "SEED": seed})
    expected, actual = _load(whole / "model_final.pth"), _load(output / "model_final.pth")
    _assert_same(actual, expected)


def test_killed_while_the_mark_of_the_last_checkpoint_is_written(tiny_data, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupted(*args):
        raise Interrupted

    checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("first")
    with mock.patch.object(os, "replace", interrupted), pytest.raises(Interrupted):
        checkpointer.save("second")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "first.pth")
    checkpointer.save("third")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "third.pth")
