"""Shared by all tests: the number of threads, the data, and running the training command."""

import functools
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Callable, List, NamedTuple

import pytest
import torch

# Threads of several workers on the same core wait for each other, which takes longer than the work.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // _WORKERS)))
# nohup and some schedulers start this process with SIGHUP ignored, and processes that tests start
# inherit that; a command under nohup is right to survive it, but tests send it to ask for an end.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# What takes more than a few seconds by --durations: these start processes or train. A test
# elsewhere that does is marked by hand, @pytest.mark.slow.
_SLOW = (
    "tests/benchmarks/",
    "tests/classification/test_trainer.py",
    "tests/commands/",
    "tests/corpus/test_annotations.py",
    "tests/corpus/test_images.py",
    "tests/engine/test_command.py",
    "tests/engine/test_launcher.py",
    "tests/engine/test_resume.py",
    "tests/engine/test_signals.py",
    "tests/engine/test_trainer.py",
    "tests/experiments/test_matrix.py::test_run_",
    "tests/experiments/test_runner.py",
    "tests/experiments/test_status.py::test_a_local_",
    "tests/norms/kernels/test_cpu_cpp.py",
    "tests/norms/kernels/test_kernels.py::test_triton_",
    "tests/norms/kernels/test_library.py",
    "tests/norms/test_sync_ref_batch_norm.py",
    "tests/statistics/",
    "tests/test_deployment.py",
    "tests/test_wheel.py",
    "tests/weights/test_convert.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Number of workers of ``-n auto``: some slow tests wait. Twice as many took longer."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(_SLOW):
            item.add_marker(pytest.mark.slow)
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Files with slow tests first: started last, one would run alone at the end.
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A failure can be repeated: every test draws the same numbers each time."""
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """``torch.set_num_threads``; the number is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _real_data() -> Path:
    return Path(os.getenv("REFBN_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real COCO, MNIST and COCOeval data; tests that need it skip without it."""
    folder = _real_data()
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set REFBN_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """The folder of the tiny data set, registered as tiny_train and tiny_val."""
    import tiny

    folder = tiny.write(tmp_path_factory.mktemp("tiny"))
    tiny.register(folder)
    return folder


class Result(NamedTuple):
    """What a command did: exit status, standard output and standard error."""

    status: int
    out: str
    err: str


@pytest.fixture
def train_net(monkeypatch, capfd) -> Callable[..., Result]:
    """``tools/train_net.py`` with these arguments, but in this process: starting one takes long."""
    from refbn_d2.engine import Trainer

    return _command(Trainer, monkeypatch, capfd)


@pytest.fixture
def train_classifier(monkeypatch, capfd) -> Callable[..., Result]:
    """``tools/train_classifier.py``, likewise."""
    from refbn_d2.classification import ClassificationTrainer

    return _command(ClassificationTrainer, monkeypatch, capfd)


def _command(trainer_class, monkeypatch, capfd) -> Callable[..., Result]:
    from detectron2.utils import logger

    from refbn_d2.engine import train_command

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["train.py", "--num-gpus", "0", *map(str, args)])
        state = torch.random.get_rng_state()
        capfd.readouterr()
        status = 0
        try:
            train_command(trainer_class, "")
        except SystemExit as e:
            status = e.code
        finally:
            # detectron2 adds handlers, each with the stdout of the time, and keeps them.
            for name in ("detectron2", "fvcore"):
                found = logging.getLogger(name)
                found.propagate = True  # else pytest's caplog sees no later line
                for handler in list(found.handlers):
                    handler.close()
                    found.removeHandler(handler)
            _clear_cache(logger.setup_logger)
            torch.random.set_rng_state(state)
        return Result(status, *capfd.readouterr())

    return run


def _clear_cache(function: Callable) -> None:
    while function is not None and not isinstance(function, functools._lru_cache_wrapper):
        function = getattr(function, "__wrapped__", None)
    if function is not None:
        function.cache_clear()
