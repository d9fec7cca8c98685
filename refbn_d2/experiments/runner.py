"""Runs a matrix of experiments: skips finished runs, and continues if a run fails."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Dict, Iterator, List, Optional

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..engine.signals import PARENT, SIGNALS, handle, restore
from ..errors import UserError
from ..io.lock import folder_lock, holder
from ..weights.convert import convert
from .matrix import RunSpec
from .records import BACKBONE, last_metrics, read_record, seed_lock, write_record
from .training import Training, trainings_of

__all__ = ["prepare", "run_matrix", "run_trainings", "seed_locks"]

_GPUS = "CUDA_VISIBLE_DEVICES"
# By default glibc returns the memory of large tensors to the system, which then clears it again in
# every step. On a CPU that takes a tenth of the time. 32 MB is the largest threshold of glibc.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


class _Failed(Exception):
    """A training of a run failed; the message is one line."""


class _Stopped(Exception):
    """A training of a run was stopped by a signal, from this or another process, and has saved."""


class _Runner:
    def __init__(self, output: Path, num_gpus: int, jobs: int, progress: Progress):
        self._output, self._num_gpus, self._progress = output, num_gpus, progress
        # By PARENT, child processes end when this process ends, even if it is killed.
        self._env = {**_KEEP_MEMORY, **os.environ, PARENT: str(os.getpid())}
        # A job of SLURM may have fewer cores than its machine.
        cores = int(os.environ.get("SLURM_CPUS_ON_NODE") or os.cpu_count() or 1)
        self._env["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
        self._gpus = _gpu_sets(num_gpus, jobs)
        self._children: List[subprocess.Popen] = []
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()
        for child in self._children:
            if child.poll() is None:
                child.terminate()

    def run(self, training: Training) -> Dict[str, Any]:
        """Runs a training unless it is finished; returns its record, which says why it failed."""
        file = self._output / training.record_file
        before = read_record(file) if file.exists() else {}
        if training.is_finished(self._output):
            return {**before, "status": "finished"}
        record = training.record()
        if self._stop.is_set():
            return {**record, "status": "interrupted"}
        seconds = before.get("seconds", 0.0)  # of earlier attempts
        write_record(file, {**record, "status": "running", "seconds": seconds})
        begin = time.monotonic()
        try:
            self._train(training, record["iterations"])
            record["status"] = "finished"
        except (_Failed, _Stopped, UserError) as e:
            if isinstance(e, _Stopped) or self._stop.is_set():
                error = "stopped; the same command goes on from the last checkpoint"
                record.update(status="interrupted", error=error)
            else:
                record.update(status="failed", error=str(e))
        record["seconds"] = round(seconds + time.monotonic() - begin, 1)
        write_record(file, record)
        return record

    def _train(self, training: Training, iterations: int) -> None:
        """Trains in a new process with ``refbn-d2 train`` or ``classify``; converts a backbone."""
        folder, opts = self._output / training.folder, training.opts()
        start = training.pretraining
        if start:
            if not start.is_finished(self._output):
                error = read_record(self._output / start.record_file).get("error", "did not finish")
                raise _Failed(f"pretraining failed: {error}")
            opts += ["MODEL.WEIGHTS", str(self._output / start.folder / BACKBONE)]
        device = [] if self._num_gpus else ["MODEL.DEVICE", "cpu"]
        arguments = ["classify" if training.is_pretraining else "train"]
        arguments += ["--config-file", training.config, "--num-gpus", str(self._num_gpus)]
        arguments += ["--resume", "OUTPUT_DIR", str(folder), *device, *opts]
        task = self._progress.add_task(training.label, total=iterations)
        gpus = self._gpus.get()
        try:
            self._wait_until_free(folder)
            env = self._env if gpus is None else {**self._env, _GPUS: gpus}
            self._command(folder, arguments, env, task)
        finally:
            self._gpus.put(gpus)
            self._progress.remove_task(task)
        if training.is_pretraining:
            convert(str(folder / "model_final.pth"), str(folder / BACKBONE))

    def _wait_until_free(self, folder: Path) -> None:
        """Waits for a child of an earlier, killed call, which may still write its checkpoint."""
        who = holder(folder)
        if who:
            _say(self._progress.console, f"waiting: {folder} is in use by {who}")
        while who and not self._stop.is_set():
            time.sleep(1)
            who = holder(folder)
        if self._stop.is_set():
            raise _Stopped

    def _command(self, folder: Path, arguments: List[str], env: Dict[str, str], task) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "console.txt"
        with open(log, "a") as f:
            begin = f.tell()
            child = subprocess.Popen(
                [sys.executable, "-m", "refbn_d2", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=subprocess.STDOUT,
                env=env,
            )
            self._children.append(child)
            if self._stop.is_set():  # stop() may not have seen this child
                child.terminate()
            while child.poll() is None:
                try:
                    child.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    done = last_metrics(folder).get("iteration", 0)
                    self._progress.update(task, completed=done)
        if _signal(child.returncode) in SIGNALS:
            raise _Stopped  # a scheduler signals all processes, and this one may be the last
        if child.returncode != 0:
            raise _Failed(f"{_reason(child.returncode, log, begin)} (see {log})")


def _gpu_sets(num_gpus: int, jobs: int) -> "queue.Queue[Optional[str]]":
    """Returns a queue with CUDA_VISIBLE_DEVICES for each simultaneous run; None if unchanged."""
    sets: "queue.Queue[Optional[str]]" = queue.Queue()
    visible = os.environ.get(_GPUS)
    gpus = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
    if jobs * num_gpus > len(gpus):
        raise UserError(
            f"--jobs {jobs} with --num-gpus {num_gpus}: there are {len(gpus)} GPUs, use fewer"
        )
    for n in range(jobs):
        sets.put(",".join(gpus[n * num_gpus : (n + 1) * num_gpus]) if num_gpus else None)
    return sets


def _say(console: Console, line: str) -> None:
    """Prints a line without rich's markup, which names and messages might contain."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _signal(status: int) -> int:
    """Number of the signal that ended a process, 0 or less if none did.

    Args:
        status: Return code of ``subprocess``: negative for a signal that was not handled, and
            128 + signal for one that was.
    """
    return -status if status < 0 else status - 128


def _reason(status: int, log: Path, begin: int) -> str:
    """Describes in one line why a process failed.

    Args:
        status: Return code of ``subprocess``, as in :func:`_signal`.
        log: Path of the file with the output of the process.
        begin: Offset in the file at which the output of this process begins, in bytes.
    """
    number = _signal(status)
    if number > 0:
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    with open(log, "rb") as f:
        f.seek(begin)
        text = f.read().decode(errors="replace")
    # A progress bar uses \r to rewrite its line.
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]


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
            runs one of the seeds in it, or if there are not enough GPUs.
    """
    _gpu_sets(num_gpus, jobs)  # raises an error for too few GPUs, before anything is written
    trainings = trainings_of(specs)
    with seed_locks(specs, output):
        prepare(trainings, output)
        return run_trainings(trainings, output, num_gpus, jobs)[-len(specs) :]


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


def run_trainings(
    trainings: List[Training], output: Path, num_gpus: int, jobs: int
) -> List[Dict[str, Any]]:
    """Runs pretrainings, then detectors; as :func:`run_matrix`, without its locks and checks.

    Args:
        trainings: Trainings to run, with the pretrainings first.
        output, num_gpus, jobs: As in :func:`run_matrix`.

    Returns:
        The record of each training.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        runner = _Runner(output, num_gpus, jobs, progress)
        overall = progress.add_task("all runs", total=len(trainings))

        def run(training: Training) -> Dict[str, Any]:
            record = runner.run(training)
            progress.advance(overall)
            _say(console, f"{record['status']}: {training.folder} {record.get('error', '')}")
            return record

        previous = handle(_stopped)
        try:
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    # Detectors start from the result of a pretraining.
                    first = list(pool.map(run, [t for t in trainings if t.is_pretraining]))
                    return first + list(pool.map(run, trainings[len(first) :]))
                except BaseException:
                    runner.stop()  # the pool waits until the children have saved
                    raise
        finally:
            restore(previous)


def _stopped(signum: int, frame: Optional[FrameType]) -> None:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)
