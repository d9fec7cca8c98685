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
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from detectron2.data import MetadataCatalog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import load_config
from ..engine.signals import PARENT, SIGNALS, handle, restore
from ..errors import UserError
from ..io.lock import folder_lock, holder
from ..weights.convert import convert
from .matrix import RunSpec
from .records import BACKBONE, PRETRAINING, RUN, last_metrics, read_record, seed_lock, write_record

__all__ = ["is_finished", "is_pretrained", "prepare", "record_of", "run_matrix", "run_stages"]
__all__ += ["seed_locks"]

# By default glibc returns the memory of large tensors to the system, which then clears it again in
# every step. On a CPU that takes a tenth of the time. 32 MB is the largest threshold of glibc.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


def is_pretrained(spec: RunSpec, output: Path) -> bool:
    """Whether the backbone from which a run starts has been trained and converted."""
    return (output / spec.classifier_folder / BACKBONE).exists()


def is_finished(spec: RunSpec, output: Path) -> bool:
    """Whether a run has been trained and evaluated."""
    file = output / spec.folder / RUN
    return file.exists() and read_record(file).get("status") == "finished"


class _Failed(Exception):
    """A training of a run failed; the message is one line."""


class _Stopped(Exception):
    """A training of a run was stopped by a signal, from this or another process, and has saved."""


class _Runner:
    def __init__(self, output: Path, num_gpus: int, jobs: int, progress: Progress):
        self._output, self._num_gpus, self._progress = output, num_gpus, progress
        # A job of SLURM may have fewer cores than its machine.
        cores = int(os.environ.get("SLURM_CPUS_ON_NODE") or os.cpu_count() or 1)
        # By PARENT, child processes end when this process ends, even if it is killed.
        self._env = {**_KEEP_MEMORY, **os.environ, PARENT: str(os.getpid())}
        self._env["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
        self._gpus = _gpu_sets(num_gpus, jobs)
        self._children: List[subprocess.Popen] = []
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()
        for child in self._children:
            if child.poll() is None:
                child.terminate()

    def _train(self, command: str, config: str, folder: Path, opts: List[str], label: str) -> None:
        """Runs ``refbn-d2 train`` or ``classify`` in a new process and waits for its end."""
        device = [] if self._num_gpus else ["MODEL.DEVICE", "cpu"]
        arguments = ["--config-file", config, "--num-gpus", str(self._num_gpus), "--resume"]
        arguments += ["OUTPUT_DIR", str(folder), *device, *opts]
        task = self._progress.add_task(label, total=load_config(config, opts).SOLVER.MAX_ITER)
        gpus = self._gpus.get()
        try:
            self._wait_until_free(folder)
            self._command(folder, [command, *arguments], gpus, task)
        finally:
            self._gpus.put(gpus)
            self._progress.remove_task(task)

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

    def _command(self, folder: Path, arguments: List[str], gpus: Optional[str], task) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "console.txt"
        with open(log, "a") as f:
            begin = f.tell()
            child = subprocess.Popen(
                [sys.executable, "-m", "refbn_d2", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=subprocess.STDOUT,
                env={**self._env, **({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})},
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

    def pretrain(self, spec: RunSpec) -> Dict[str, Any]:
        """Pretrains and converts what a detector starts from; returns the record of it."""
        folder = self._output / spec.classifier_folder
        classifier = _classifier(spec)
        record = _pretraining_record(spec)
        if is_pretrained(spec, self._output):
            return {**record, "status": "finished"}

        def work() -> None:
            label = f"pretraining {spec.pretrained}, seed {spec.classifier_seed}"
            self._train("classify", classifier, folder, spec.classifier_opts(), label)
            convert(str(folder / "model_final.pth"), str(folder / BACKBONE))

        return self._recorded(folder / PRETRAINING, record, work)

    def detect(self, spec: RunSpec) -> Dict[str, Any]:
        """Trains and evaluates a detector; returns its record."""
        folder = self._output / spec.folder
        if is_finished(spec, self._output):
            return read_record(folder / RUN)

        def work() -> None:
            opts = spec.detector_opts()
            if spec.classifier:
                pretraining = self._output / spec.classifier_folder
                if not is_pretrained(spec, self._output):
                    error = read_record(pretraining / PRETRAINING).get("error", "did not finish")
                    raise _Failed(f"pretraining failed: {error}")
                opts += ["MODEL.WEIGHTS", str(pretraining / BACKBONE)]
            protocol = f"{spec.protocol}, " if spec.protocol else ""
            label = f"{protocol}{spec.name}, batch {spec.ims_per_batch}, grouping {spec.grouping:g}"
            self._train("train", spec.config, folder, opts, f"{label}, seed {spec.seed}")

        return self._recorded(folder / RUN, record_of(spec), work)

    def _recorded(
        self, file: Path, record: Dict[str, Any], work: Callable[[], None]
    ) -> Dict[str, Any]:
        """Calls ``work``; writes its outcome and the total time of all attempts to ``file``."""
        if self._stop.is_set():
            return {**record, "status": "interrupted"}
        seconds = read_record(file).get("seconds", 0.0) if file.exists() else 0.0
        write_record(file, {**record, "status": "running", "seconds": seconds})
        begin = time.monotonic()
        try:
            work()
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


def _gpu_sets(num_gpus: int, jobs: int) -> "queue.Queue[Optional[str]]":
    """Returns a queue with CUDA_VISIBLE_DEVICES for each simultaneous run; None if unchanged."""
    sets: "queue.Queue[Optional[str]]" = queue.Queue()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
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


def record_of(spec: RunSpec) -> Dict[str, Any]:
    """Returns the content of a run's ``run.json`` without its status and time."""
    cfg = load_config(spec.config, spec.detector_opts())
    if not cfg.DATASETS.TEST:
        raise UserError(f"{spec.name}: DATASETS.TEST is empty: a run of a matrix is evaluated")
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    return {
        "name": spec.name,
        "norm": spec.norm,
        "seed": spec.seed,
        "ims_per_batch": spec.ims_per_batch,
        "grouping": spec.grouping,
        **({"protocol": spec.protocol} if spec.protocol else {}),
        **({} if spec.pretraining_seed is None else {"pretraining_seed": spec.pretraining_seed}),
        "gt": metadata.get("json_file"),
        "image_root": metadata.get("image_root"),
        "iterations": cfg.SOLVER.MAX_ITER,
        "settings": spec.settings(),
    }


def _classifier(spec: RunSpec) -> str:
    assert spec.classifier is not None  # callers have checked that the run has a pretraining
    return spec.classifier


def _pretraining_record(spec: RunSpec) -> Dict[str, Any]:
    cfg = load_config(_classifier(spec), spec.classifier_opts())
    return {"iterations": cfg.SOLVER.MAX_ITER, "settings": spec.settings()}


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
    with seed_locks(specs, output):
        return run_stages(prepare(specs, output), specs, output, num_gpus, jobs)


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


def prepare(specs: List[RunSpec], output: Path) -> List[RunSpec]:
    """Records the unfinished runs as queued.

    Args:
        specs: Runs of the matrix.
        output: Output folder of the matrix.

    Returns:
        For each unfinished pretraining, one of the runs that start from it.

    Raises:
        UserError: If ``output`` contains one of the runs with other settings.
    """
    records = {output / spec.folder / RUN: record_of(spec) for spec in specs}
    stages = {spec.classifier_folder: spec for spec in specs if spec.classifier}
    records.update(
        {output / folder / PRETRAINING: _pretraining_record(s) for folder, s in stages.items()}
    )
    before = {file: read_record(file) for file in records if file.exists()}
    for file, found in before.items():
        settings = records[file]["settings"]
        keys = settings if file.name == RUN else ["pretraining"]
        if not isinstance(found.get("settings"), dict) or any(
            found["settings"].get(k) != settings[k] for k in keys
        ):
            raise UserError(f"{file.parent} holds a run of another config: choose another --output")
    todo = [spec for spec in stages.values() if not is_pretrained(spec, output)]
    for file, record in records.items():
        found = before.get(file, {})
        done = found.get("status") == "finished" or (file.parent / BACKBONE).exists()
        if not done:
            seconds = found.get("seconds", 0.0)
            write_record(file, {**record, "status": "queued", "seconds": seconds})
    return todo


def run_stages(
    pretrainings: List[RunSpec], specs: List[RunSpec], output: Path, num_gpus: int, jobs: int
) -> List[Dict[str, Any]]:
    """Pretrains, then trains detectors; as :func:`run_matrix`, without its locks and checks.

    Args:
        pretrainings: Runs whose pretraining is to be trained.
        specs: Runs whose detector is to be trained.
        output, num_gpus, jobs: As in :func:`run_matrix`.

    Returns:
        The records of the detectors.
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
        overall = progress.add_task("all runs", total=len(specs) + len(pretrainings))

        def pretrain(spec: RunSpec) -> None:
            runner.pretrain(spec)
            progress.advance(overall)

        def detect(spec: RunSpec) -> Dict[str, Any]:
            record = runner.detect(spec)
            progress.advance(overall)
            _say(console, f"{record['status']}: {spec.folder} {record.get('error', '')}")
            return record

        previous = handle(_stopped)
        try:
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    list(pool.map(pretrain, pretrainings))
                    return list(pool.map(detect, specs))
                except BaseException:
                    runner.stop()  # the pool waits until the children have saved
                    raise
        finally:
            restore(previous)


def _stopped(signum: int, frame: Optional[FrameType]) -> None:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)
