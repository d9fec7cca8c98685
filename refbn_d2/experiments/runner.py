"""Running a matrix of experiments: what is finished is skipped, what fails is survived."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional

from detectron2.data import MetadataCatalog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import load_config
from ..errors import UserError
from ..io.atomic import atomic_write
from ..io.json import read_json
from .matrix import RunSpec

__all__ = ["is_finished", "is_pretrained", "run_matrix"]

# What the tools of the same names do.
_TRAIN_NET = "from refbn_d2.engine import Trainer, train_command; train_command(Trainer, '')"
_TRAIN_CLASSIFIER = (
    "from refbn_d2.classification import ClassificationTrainer; "
    "from refbn_d2.engine import train_command; train_command(ClassificationTrainer, '')"
)

_BACKBONE = "backbone.pth"

# glibc gives the memory of large tensors back to the system, which clears it anew in every step: a
# tenth of a step's time on a CPU. 32 MB is the largest threshold that glibc takes.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


def is_pretrained(spec: RunSpec, output: Path) -> bool:
    """Whether the backbone that the spec starts from is trained and converted."""
    return (output / spec.classifier_folder / _BACKBONE).exists()


def is_finished(spec: RunSpec, output: Path) -> bool:
    """Whether the spec is trained and evaluated."""
    file = output / spec.folder / "run.json"
    return file.exists() and _read(file).get("status") == "finished"


class _Failed(Exception):
    """A step of a spec failed; the message is one line."""


class _Runner:
    def __init__(self, output: Path, num_gpus: int, jobs: int, progress: Progress):
        self._output, self._num_gpus, self._progress = output, num_gpus, progress
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self._env = {**_KEEP_MEMORY, **os.environ, "OMP_NUM_THREADS": str(threads)}
        self._children: List[subprocess.Popen] = []
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()
        for child in self._children:
            if child.poll() is None:
                child.terminate()

    def check(self, spec: RunSpec) -> None:
        """Raises a UserError if the output folder holds the spec with other settings."""
        settings = spec.settings()
        for file, keys in (
            (self._output / spec.folder / "run.json", ("detector", "pretraining")),
            (self._output / spec.classifier_folder / "pretraining.json", ("pretraining",)),
        ):
            before = _read(file).get("settings") if file.exists() else settings
            if not isinstance(before, dict) or any(before.get(k) != settings[k] for k in keys):
                raise UserError(
                    f"{file.parent} holds a run of another config: choose another --output"
                )

    def _command(self, folder: Path, code: str, *args: str, task=None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "console.txt"
        with open(log, "a") as f:
            child = subprocess.Popen(
                [sys.executable, "-c", code, *args],
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=subprocess.STDOUT,
                env=self._env,
            )
            self._children.append(child)
            while True:
                try:
                    status = child.wait(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    if task is not None:
                        done = _last_iteration(folder / "metrics.json")
                        self._progress.update(task, completed=done)
        if status != 0:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise _Failed(f"{lines[-1] if lines else 'no output'} (see {log})")

    def _train(self, code: str, config: str, folder: Path, opts: List[str], label: str) -> None:
        device = [] if self._num_gpus else ["MODEL.DEVICE", "cpu"]
        task = self._progress.add_task(label, total=load_config(config, opts).SOLVER.MAX_ITER)
        try:
            self._command(
                folder,
                code,
                *("--config-file", config, "--num-gpus", str(self._num_gpus), "--resume"),
                *("OUTPUT_DIR", str(folder), *device, *opts),
                task=task,
            )
        finally:
            self._progress.remove_task(task)

    def pretrain(self, spec: RunSpec) -> None:
        folder = self._output / spec.classifier_folder
        if self._stop.is_set() or is_pretrained(spec, self._output):
            return
        _write(folder / "pretraining.json", {"settings": spec.settings()})
        label = f"pretraining {spec.pretrained}, seed {spec.seed}"
        self._train(_TRAIN_CLASSIFIER, spec.classifier, folder, spec.classifier_opts(), label)
        from ..weights.convert import convert  # which stands above the engine

        try:
            convert(str(folder / "model_final.pth"), str(folder / _BACKBONE))
        except UserError as e:
            raise _Failed(str(e)) from None

    def detect(self, spec: RunSpec, pretraining_error: Optional[str]) -> Dict[str, Any]:
        folder = self._output / spec.folder
        file = folder / "run.json"
        record = _record(spec)
        if is_finished(spec, self._output):
            return _read(file)
        if self._stop.is_set():
            return {**record, "status": "interrupted"}
        _write(file, {**record, "status": "running"})
        opts = spec.detector_opts()
        if spec.classifier:
            weights = self._output / spec.classifier_folder / _BACKBONE
            opts += ["MODEL.WEIGHTS", str(weights)]
        try:
            if pretraining_error:
                raise _Failed(pretraining_error)
            protocol = f"{spec.protocol}, " if spec.protocol else ""
            label = f"{protocol}{spec.name}, batch {spec.ims_per_batch}, grouping {spec.grouping:g}"
            self._train(_TRAIN_NET, spec.config, folder, opts, f"{label}, seed {spec.seed}")
            record["status"] = "finished"
        except _Failed as e:
            record.update(status="interrupted" if self._stop.is_set() else "failed", error=str(e))
        _write(file, record)
        return record


def _last_iteration(metrics: Path) -> int:
    try:
        last = metrics.read_text().strip().splitlines()[-1]
        return json.loads(last)["iteration"]
    except (OSError, IndexError, KeyError, json.JSONDecodeError):  # not there yet, or half a line
        return 0


def _record(spec: RunSpec) -> Dict[str, Any]:
    cfg = load_config(spec.config, spec.detector_opts())
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    return {
        "name": spec.name,
        "norm": spec.norm,
        "seed": spec.seed,
        "ims_per_batch": spec.ims_per_batch,
        "grouping": spec.grouping,
        **({"protocol": spec.protocol} if spec.protocol else {}),
        "gt": metadata.get("json_file"),
        "image_root": metadata.get("image_root"),
        "settings": spec.settings(),
    }


def _read(file: Path) -> Dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: is no record of a run, but a {type(content).__name__}")
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
    """Runs what is not finished yet, ``jobs`` runs at a time, each in a process of its own.

    Interrupted, it can be called again and goes on: finished specs are skipped, started ones
    resume from their last checkpoint. A spec that fails is recorded as failed, the others go on.

    Args:
        specs: see :func:`load_matrix`.
        output: folder; each spec has one of its own below it, with a ``run.json``.
        num_gpus: per run; 0 for the CPU.
        jobs: runs at a time, which share the cores.

    Returns:
        The record of each spec, as in its ``run.json``.

    Raises:
        UserError: ``output`` holds one of the specs with another config, or jobs would share GPUs.
    """
    if jobs > 1 and num_gpus > 0:
        raise UserError(f"--jobs {jobs} with --num-gpus {num_gpus}: with GPUs, one run at a time")
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        runner = _Runner(output, num_gpus, jobs, progress)
        for spec in specs:
            runner.check(spec)
        stages = {c.classifier_folder: c for c in specs if c.classifier}
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
            console.print(f"{record['status']}: {spec.folder} {record.get('error', '')}")
            return record

        try:
            errors = dict(zip(stages, pool.map(pretrain, stages.values())))
            return list(pool.map(detect, specs, [errors.get(c.classifier_folder) for c in specs]))
        except BaseException:
            runner.stop()
            raise
