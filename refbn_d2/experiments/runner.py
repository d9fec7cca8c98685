"""Runs a matrix of experiments: skips finished runs, and continues if a run fails."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, Dict, List, Optional

import torch
from detectron2.data import MetadataCatalog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import load_config
from ..engine.signals import PARENT, handle, restore
from ..errors import UserError
from ..io.atomic import atomic_write
from ..io.json import read_json
from ..io.lock import folder_lock, holder
from .matrix import RunSpec

__all__ = ["is_finished", "is_pretrained", "record_of", "run_matrix"]

_BACKBONE = "backbone.pth"

# By default glibc returns the memory of large tensors to the system, which then clears it again in
# every step. On a CPU that takes a tenth of the time. 32 MB is the largest threshold of glibc.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


def is_pretrained(spec: RunSpec, output: Path) -> bool:
    """Whether the backbone from which a run starts has been trained and converted."""
    return (output / spec.classifier_folder / _BACKBONE).exists()


def is_finished(spec: RunSpec, output: Path) -> bool:
    """Whether a run has been trained and evaluated."""
    file = output / spec.folder / "run.json"
    return file.exists() and _read(file).get("status") == "finished"


class _Failed(Exception):
    """A training of a run failed; the message is one line."""


class _Runner:
    def __init__(self, output: Path, num_gpus: int, jobs: int, progress: Progress):
        self._output, self._num_gpus, self._progress = output, num_gpus, progress
        threads = max(1, (os.cpu_count() or 1) // jobs)
        # By PARENT, child processes end when this process ends, even if it is killed.
        self._env = {**_KEEP_MEMORY, **os.environ, PARENT: str(os.getpid())}
        self._env["OMP_NUM_THREADS"] = str(threads)
        self._gpus = _gpu_sets(num_gpus, jobs)
        self._children: List[subprocess.Popen] = []
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()
        for child in self._children:
            if child.poll() is None:
                child.terminate()

    def check(self, spec: RunSpec) -> None:
        """Raises a UserError if the output folder contains this run with other settings."""
        settings = record_of(spec)["settings"]
        for file, keys in (
            (self._output / spec.folder / "run.json", ("detector", "pretraining")),
            (self._output / spec.classifier_folder / "pretraining.json", ("pretraining",)),
        ):
            before = _read(file).get("settings") if file.exists() else settings
            if not isinstance(before, dict) or any(before.get(k) != settings[k] for k in keys):
                raise UserError(
                    f"{file.parent} holds a run of another config: choose another --output"
                )

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
            raise _Failed("stopped before it began")

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
                    done = _last_iteration(folder / "metrics.json")
                    self._progress.update(task, completed=done)
        if child.returncode != 0:
            raise _Failed(f"{_reason(child.returncode, log, begin)} (see {log})")

    def pretrain(self, spec: RunSpec) -> None:
        folder = self._output / spec.classifier_folder
        if self._stop.is_set() or is_pretrained(spec, self._output):
            return
        _write(folder / "pretraining.json", {"settings": spec.settings()})
        label = f"pretraining {spec.pretrained}, seed {spec.classifier_seed}"
        self._train("classify", spec.classifier, folder, spec.classifier_opts(), label)
        from ..weights.convert import convert  # which stands above the engine

        try:
            convert(str(folder / "model_final.pth"), str(folder / _BACKBONE))
        except UserError as e:
            raise _Failed(str(e)) from None

    def detect(self, spec: RunSpec, pretraining_error: Optional[str]) -> Dict[str, Any]:
        folder = self._output / spec.folder
        file = folder / "run.json"
        record = record_of(spec)
        if is_finished(spec, self._output):
            return _read(file)
        if self._stop.is_set():
            return {**record, "status": "interrupted"}
        seconds = _read(file).get("seconds", 0.0) if file.exists() else 0.0
        _write(file, {**record, "status": "running", "seconds": seconds})
        opts = spec.detector_opts()
        if spec.classifier:
            weights = self._output / spec.classifier_folder / _BACKBONE
            opts += ["MODEL.WEIGHTS", str(weights)]
        begin = time.monotonic()
        try:
            if pretraining_error:
                raise _Failed(pretraining_error)
            protocol = f"{spec.protocol}, " if spec.protocol else ""
            label = f"{protocol}{spec.name}, batch {spec.ims_per_batch}, grouping {spec.grouping:g}"
            self._train("train", spec.config, folder, opts, f"{label}, seed {spec.seed}")
            record["status"] = "finished"
        except _Failed as e:
            stopped = self._stop.is_set()
            error = "stopped; the same command goes on from the last checkpoint"
            record.update(
                status="interrupted" if stopped else "failed", error=error if stopped else str(e)
            )
        record["seconds"] = round(seconds + time.monotonic() - begin, 1)
        _write(file, record)
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


def _reason(status: int, log: Path, begin: int) -> str:
    """Describes in one line why a process failed.

    Args:
        status: Return code of ``subprocess``, negative for a signal.
        log: Path of the file with the output of the process.
        begin: Offset in the file at which the output of this process begins, in bytes.
    """
    number = -status if status < 0 else status - 128
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


def _last_iteration(metrics: Path) -> int:
    try:
        last = metrics.read_text().strip().splitlines()[-1]
        return json.loads(last)["iteration"]
    except (OSError, IndexError, KeyError, json.JSONDecodeError):  # no file yet, or a partial line
        return 0


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
        "settings": spec.settings(),
    }


def _read(file: Path) -> Dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: is not a record of a run, but a {type(content).__name__}")
    return content


def _write(path: Path, record: Dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(str(path)) as f:
            json.dump(record, f, indent=1)
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}") from None


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
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with ExitStack() as stack:
        # Runs of different seeds share no files, so several machines can run different seeds.
        for seed in sorted({spec.seed for spec in specs}):
            stack.enter_context(folder_lock(output, name=f".lock_seed{seed}"))
        progress = stack.enter_context(Progress(*columns, console=console))
        runner = _Runner(output, num_gpus, jobs, progress)
        for spec in specs:
            runner.check(spec)
        stages = {s.classifier_folder: s for s in specs if s.classifier}
        overall = progress.add_task("all runs", total=len(specs) + len(stages))

        def pretrain(spec: RunSpec) -> Optional[str]:
            try:
                runner.pretrain(spec)
            except _Failed as e:
                return f"pretraining failed: {e}"
            finally:
                progress.advance(overall)
            return None

        def detect(spec: RunSpec, error: Optional[str]) -> Dict[str, Any]:
            record = runner.detect(spec, error)
            progress.advance(overall)
            _say(console, f"{record['status']}: {spec.folder} {record.get('error', '')}")
            return record

        previous = handle(_stopped)
        try:
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    errors = dict(zip(stages, pool.map(pretrain, stages.values())))
                    of_each = [errors.get(s.classifier_folder) for s in specs]
                    return list(pool.map(detect, specs, of_each))
                except BaseException:
                    runner.stop()  # the pool waits until the children have saved
                    raise
        finally:
            restore(previous)


def _stopped(signum: int, frame: Optional[FrameType]) -> None:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)
