"""Runs a matrix of experiments: skips finished runs, and continues if a run fails."""

import os
import signal
from contextlib import ExitStack, contextmanager
from multiprocessing import forkserver, get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TaskID

from ..engine.signals import SIGNALS, handle, restore
from ..errors import UserError
from ..io.lock import folder_lock
from .matrix import RunSpec
from .process import run_training
from .records import STOPPED, last_metrics, read_record, seed_lock, write_record
from .training import Training, trainings_of

__all__ = ["prepare", "run_matrix", "seed_locks"]

_GPUS = "CUDA_VISIBLE_DEVICES"
# Modules that a training needs, some of them only later. Importing them takes seconds.
_MODULES = ["refbn_d2.experiments.process", "torch.utils.tensorboard", "hotcoco"]


class _Runner:
    """Runs trainings at the same time, each in its own process.

    Args:
        output: Output folder of the matrix.
        num_gpus: Number of GPUs of each training; 0 for the CPU.
        gpus: CUDA_VISIBLE_DEVICES of each simultaneous training.
        progress: Shows how far they are.
    """

    def __init__(self, output: Path, num_gpus: int, gpus: List[str], progress: Progress):
        self._output, self._num_gpus, self._jobs = output, num_gpus, len(gpus)
        self._progress, self._gpus = progress, gpus
        self._running: Dict[Training, Tuple[BaseProcess, str, TaskID]] = {}
        # A process that is forked from one with all imports starts at once. If one of the imports
        # has looked for a GPU, the fork cannot use it.
        self._context = get_context("spawn") if num_gpus else get_context("forkserver")
        if not num_gpus:
            forkserver.set_forkserver_preload(_MODULES)
            # A terminal or a scheduler signals all processes. The server reports how the others
            # end, so it must outlive them.
            previous = handle(signal.SIG_IGN)
            with _environment(_GPUS, ""):
                forkserver.ensure_running()
            restore(previous)

    def run(self, trainings: Sequence[Training], signals: Sequence[int]) -> None:
        """Runs unfinished trainings. After a signal it starts no more, and waits until they saved.

        Args:
            trainings: Trainings to run.
            signals: Numbers of the signals that this process has received; it may grow.
        """
        waiting = list(trainings)
        try:
            while self._running or (waiting and not signals):
                while waiting and self._gpus and not signals:
                    self._start(waiting.pop(0))
                if signals:
                    self._stop()
                wait([process.sentinel for process, *_ in self._running.values()], timeout=1)
                self._update()
        finally:
            self._stop()

    def _start(self, training: Training) -> None:
        total = read_record(self._output / training.record_file)["iterations"]
        arguments = training, self._output, self._num_gpus, self._jobs
        process = self._context.Process(target=run_training, args=arguments)  # type: ignore
        gpus = self._gpus.pop()
        with _environment(_GPUS, gpus):
            process.start()
        task = self._progress.add_task(escape(training.label), total=total)
        self._running[training] = process, gpus, task

    def _stop(self) -> None:
        for process, *_ in self._running.values():
            process.terminate()

    def _update(self) -> None:
        for training, (process, gpus, task) in list(self._running.items()):
            done = last_metrics(self._output / training.folder).get("iteration", 0)
            self._progress.update(task, completed=done)
            if process.exitcode is not None:
                del self._running[training]
                self._gpus.append(gpus)
                self._progress.remove_task(task)
                self._end(self._output / training.record_file, process.exitcode)

    def _end(self, file: Path, status: int) -> None:
        record = read_record(file)
        if record["status"] in ("queued", "running"):  # it was killed before it could record that
            if -status in SIGNALS:
                record.update(status="interrupted", error=STOPPED)
            else:
                error = f"{_reason(status)} (see {file.parent / 'console.txt'})"
                record.update(status="failed", error=error)
            write_record(file, record)
        folder = file.parent.relative_to(self._output)
        self._progress.advance(self._progress.task_ids[0])
        self._progress.console.print(f"{record['status']}: {folder} {record.get('error', '')}")


def _gpu_sets(num_gpus: int, jobs: int) -> List[str]:
    """Returns the CUDA_VISIBLE_DEVICES of each simultaneous training."""
    if num_gpus < 0:
        raise UserError(f"--num-gpus {num_gpus}: use a number from 0")
    visible = os.environ.get(_GPUS)
    gpus = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
    if jobs * num_gpus > len(gpus):
        raise UserError(
            f"--jobs {jobs} with --num-gpus {num_gpus}: there are {len(gpus)} GPUs, use fewer"
        )
    return [",".join(gpus[n * num_gpus : (n + 1) * num_gpus]) for n in range(jobs)]


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Context manager in which an environment variable has another value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _reason(status: int) -> str:
    """Describes the exit code of a process of ``multiprocessing``: -N after signal N."""
    if status >= 0:
        return f"ended with status {status}"
    reason = f"ended by signal {-status} ({signal.strsignal(-status)})"
    return reason + (", out of memory?" if -status == signal.SIGKILL else "")


def run_matrix(
    specs: List[RunSpec], output: Path, num_gpus: int, jobs: int
) -> List[Dict[str, Any]]:
    """Runs the unfinished runs, ``jobs`` at a time, each in its own process.

    After an interruption, call it again with the same arguments: finished runs are skipped, started
    runs resume from their last checkpoint. If a run fails, it is recorded as failed and the other
    runs continue.

    Args:
        specs: Runs of the matrix, from :func:`load_matrix`.
        output: Output folder. Each run has a subfolder with a ``run.json``.
        num_gpus: Number of GPUs per run; 0 for the CPU.
        jobs: Number of simultaneous runs. They share the CPU cores; each has its own GPUs.

    Returns:
        The record of each run, as in its ``run.json``.

    Raises:
        UserError: If ``output`` contains one of the runs with another config, if another process
            runs one of the seeds in it, or if there are not as many GPUs.
    """
    gpus = _gpu_sets(num_gpus, jobs)  # before anything is written, because there may be too few
    trainings = trainings_of(specs)
    with seed_locks(specs, output):
        prepare(trainings, output)
        _run(trainings, output, num_gpus, gpus)
    return [read_record(output / Training(spec).record_file) for spec in specs]


@contextmanager
def seed_locks(specs: List[RunSpec], output: Path) -> Iterator[None]:
    """Locks the seeds of a matrix: several machines can run different seeds of one output.

    Raises:
        UserError: If another process has locked one of them.
    """
    with ExitStack() as stack:
        for seed in sorted({spec.seed for spec in specs}):
            stack.enter_context(folder_lock(output, name=seed_lock(seed)))
        yield


def prepare(trainings: List[Training], output: Path) -> None:
    """Records the unfinished trainings as queued.

    Args:
        trainings: Trainings of the matrix.
        output: Output folder of the matrix.

    Raises:
        UserError: If ``output`` contains one of them with other settings; nothing is written then.
    """
    queued = {}
    for training in trainings:
        file, record = output / training.record_file, training.record()
        before = read_record(file) if file.exists() else {}
        settings = before.get("settings", {} if before else record["settings"])
        if not isinstance(settings, dict) or any(
            settings.get(key) != value for key, value in record["settings"].items()
        ):
            raise UserError(f"{file.parent} holds a run of another config: choose another --output")
        if not training.is_finished(output):
            seconds = before.get("seconds", 0.0)
            queued[file] = {**record, "status": "queued", "seconds": seconds}
    for file, record in queued.items():
        write_record(file, record)


def _run(trainings: List[Training], output: Path, num_gpus: int, gpus: List[str]) -> None:
    """Runs the pretrainings that are not finished, then the detectors, which start from them."""
    # Messages might contain rich's markup.
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    columns = *Progress.get_default_columns(), MofNCompleteColumn()
    received: List[int] = []
    previous = handle(lambda signum, frame: received.append(signum))
    try:
        with Progress(*columns, console=console) as progress:
            todo = [t for t in trainings if not t.is_finished(output)]
            done = len(trainings) - len(todo)
            progress.add_task("all runs", total=len(trainings), completed=done)
            runner = _Runner(output, num_gpus, gpus, progress)
            runner.run([t for t in todo if t.is_pretraining], received)
            runner.run([t for t in todo if not t.is_pretraining], received)
    finally:
        restore(previous)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:
        raise SystemExit(128 + received[0])
