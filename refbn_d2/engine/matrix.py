"""Running a matrix of experiments: norms x seeds x images per batch x grouping of batches."""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml
from detectron2.data import MetadataCatalog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import load_config
from ..errors import UserError

__all__ = ["Cell", "load_matrix", "run_matrix"]

TOOLS = Path(__file__).parents[2] / "tools"
_KEYS = {"DETECTOR", "CLASSIFIER", "NORMS", "SEEDS", "IMS_PER_BATCH", "GROUPING_STRENGTH", "OPTS"}


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: under which its results are reported.
        norm: as in the names of the config files.
        pretrained: the norm that the backbone was pretrained with.
        seed: SEED of pretraining and training.
        config: config file of the detector.
        classifier: config file of the pretraining, or None to start from MODEL.WEIGHTS.
        ims_per_batch: SOLVER.IMS_PER_BATCH, over all processes.
        grouping: DATALOADER.GROUPING_STRENGTH, 0 for i.i.d. batches.
        opts: further KEY VALUE pairs for the detector.
    """

    name: str
    norm: str
    pretrained: str
    seed: int
    config: str
    classifier: Optional[str]
    ims_per_batch: int
    grouping: float
    opts: Tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Below the output folder."""
        name = re.sub(r"[^\w.=-]+", "_", self.name)
        return Path(
            name, f"batch{self.ims_per_batch}_grouping{self.grouping:g}", f"seed{self.seed}"
        )

    @property
    def classifier_folder(self) -> Path:
        return Path("pretraining", self.pretrained, f"seed{self.seed}")

    def detector_opts(self) -> List[str]:
        """KEY VALUE pairs for the detector's config.

        Another batch size than the config's scales the learning rate in proportion and the schedule
        inversely, as SOLVER.REFERENCE_WORLD_SIZE does: every run sees the same number of images.
        """
        solver = load_config(self.config, list(self.opts)).SOLVER
        scale = self.ims_per_batch / solver.IMS_PER_BATCH
        opts = ["SEED", self.seed, "SOLVER.IMS_PER_BATCH", self.ims_per_batch]
        opts += ["SOLVER.BASE_LR", solver.BASE_LR * scale]
        for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
            opts += [f"SOLVER.{key}", max(1, round(solver[key] / scale))]
        opts += ["SOLVER.STEPS", tuple(round(s / scale) for s in solver.STEPS)]
        if self.grouping > 0:
            opts += ["DATALOADER.SAMPLER_TRAIN", "GroupedTrainingSampler"]
            opts += ["DATALOADER.GROUPING_STRENGTH", self.grouping]
        return [*self.opts, *map(str, opts)]


def load_matrix(path: str) -> List[Cell]:
    """Reads a matrix file: the product of the axes below, or a list of such products.

    Their keys, config paths relative to the file: DETECTOR and CLASSIFIER (optional), with {norm}
    in lower case; NORMS, a list of norm types or of {name, norm, pretrained, opts}; lists SEEDS,
    IMS_PER_BATCH, GROUPING_STRENGTH; OPTS, KEY VALUE pairs for all runs.

    Raises:
        UserError: the file is missing, malformed, or names a config that does not exist.
    """
    try:
        with open(path) as f:
            matrix = yaml.safe_load(f)
    except OSError as e:
        raise UserError(f"matrix {path}: {e.strerror}") from None
    except yaml.YAMLError as e:
        raise UserError(f"matrix {path}: not YAML: {e}") from None
    cells = []
    for part in matrix if isinstance(matrix, list) else [matrix]:
        if not isinstance(part, dict) or not {"DETECTOR", "NORMS"} <= set(part) <= _KEYS:
            keys = ", ".join(sorted(_KEYS))
            raise UserError(f"matrix {path}: needs DETECTOR and NORMS, and may have {keys}")
        cells += _cells(path, part)
    folders = [c.folder for c in cells]
    if len(set(folders)) < len(folders):
        raise UserError(f"matrix {path}: two runs have the same name, seed, batch and grouping")
    return cells


def _cells(path: str, matrix: Dict[str, Any]) -> List[Cell]:
    folder = Path(path).parent
    cells = []
    axes = itertools.product(
        matrix.get("SEEDS", [1]),
        matrix.get("GROUPING_STRENGTH", [0.0]),
        matrix.get("IMS_PER_BATCH", [None]),
        matrix["NORMS"],
    )
    for seed, grouping, ims_per_batch, entry in axes:
        entry = {"name": entry, "norm": entry} if isinstance(entry, str) else entry
        norm = entry["norm"]
        pretrained = entry.get("pretrained", norm)
        files = {}
        for key, kind in (("DETECTOR", norm), ("CLASSIFIER", pretrained)):
            if key in matrix:
                file = folder / matrix[key].format(norm=kind.lower())
                if not file.is_file():
                    raise UserError(f"matrix {path}: {key} of norm {kind}: {file} does not exist")
                files[key] = str(file)
        opts = tuple(str(o) for o in [*matrix.get("OPTS", []), *entry.get("opts", [])])
        default = load_config(files["DETECTOR"], list(opts)).SOLVER.IMS_PER_BATCH
        cells.append(
            Cell(
                name=entry.get("name", norm),
                norm=norm,
                pretrained=pretrained,
                seed=int(seed),
                config=files["DETECTOR"],
                classifier=files.get("CLASSIFIER"),
                ims_per_batch=int(ims_per_batch or default),
                grouping=float(grouping),
                opts=opts,
            )
        )
    return cells


class _Failed(Exception):
    """A command of a cell failed; the message is the last line it printed."""


class _Runner:
    def __init__(self, output: Path, num_gpus: int, jobs: int, progress: Progress):
        self._output, self._num_gpus, self._progress = output, num_gpus, progress
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self._env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._children: List[subprocess.Popen] = []
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()
        for child in self._children:
            if child.poll() is None:
                child.terminate()

    def _command(self, log: Path, tool: str, *args: str, watch: Optional[Path] = None, task=None):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as f:
            child = subprocess.Popen(
                [sys.executable, str(TOOLS / tool), *args],
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
                    if watch is not None:
                        self._progress.update(task, completed=_last_iteration(watch))
        if status != 0:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise _Failed(f"{lines[-1] if lines else 'no output'} (see {log})")

    def _train(self, tool: str, config: str, folder: Path, opts: List[str], label: str) -> None:
        device = [] if self._num_gpus else ["MODEL.DEVICE", "cpu"]
        max_iter = load_config(config, opts).SOLVER.MAX_ITER
        task = self._progress.add_task(label, total=max_iter)
        try:
            self._command(
                folder / "log.txt",
                tool,
                *("--config-file", config, "--num-gpus", str(self._num_gpus), "--resume"),
                *("OUTPUT_DIR", str(folder), *device, *opts),
                watch=folder / "metrics.json",
                task=task,
            )
        finally:
            self._progress.remove_task(task)

    def pretrain(self, cell: Cell) -> None:
        folder = self._output / cell.classifier_folder
        weights = folder / "backbone.pth"
        if self._stop.is_set() or weights.exists():
            return
        label = f"pretraining {cell.pretrained}, seed {cell.seed}"
        self._train("train_classifier.py", cell.classifier, folder, ["SEED", str(cell.seed)], label)
        final = str(folder / "model_final.pth")
        self._command(folder / "log.txt", "convert_backbone.py", final, str(weights))

    def detect(self, cell: Cell, pretraining_error: Optional[str]) -> Dict[str, Any]:
        folder = self._output / cell.folder
        opts = cell.detector_opts()
        if cell.classifier:
            weights = self._output / cell.classifier_folder / "backbone.pth"
            opts += ["MODEL.WEIGHTS", str(weights)]
        record = _record(cell, opts)
        file = folder / "run.json"
        if file.exists():
            before = json.loads(file.read_text())
            if before.get("settings") != record["settings"]:
                raise UserError(
                    f"{folder} holds a run with other settings: choose another --output"
                )
            if before["status"] == "finished":
                return before
        if self._stop.is_set():
            return {**record, "status": "interrupted"}
        _write(file, {**record, "status": "running"})
        try:
            if pretraining_error:
                raise _Failed(pretraining_error)
            label = f"{cell.name}, batch {cell.ims_per_batch}, grouping {cell.grouping:g}"
            self._train("train_net.py", cell.config, folder, opts, f"{label}, seed {cell.seed}")
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


def _record(cell: Cell, opts: List[str]) -> Dict[str, Any]:
    cfg = load_config(cell.config, opts)
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    return {
        "name": cell.name,
        "norm": cell.norm,
        "seed": cell.seed,
        "ims_per_batch": cell.ims_per_batch,
        "grouping": cell.grouping,
        "gt": metadata.json_file,
        "image_root": metadata.image_root,
        "settings": {**asdict(cell), "opts": opts},
    }


def _write(path: Path, record: Dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1))
    os.replace(partial, path)


def run_matrix(cells: List[Cell], output: Path, num_gpus: int, jobs: int) -> List[Dict[str, Any]]:
    """Runs what is not finished yet, ``jobs`` runs at a time, each in a process of its own.

    Interrupted, it can be called again and goes on: finished cells are skipped, started ones
    resume from their last checkpoint. A cell that fails is recorded as failed, the others go on.

    Args:
        cells: see :func:`load_matrix`.
        output: folder; each cell has one of its own below it, with a ``run.json``.
        num_gpus: per run; 0 for the CPU.
        jobs: runs at a time, which share the cores.

    Returns:
        The record of each cell, as in its ``run.json``.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        runner = _Runner(output, num_gpus, jobs, progress)
        stages = {c.classifier_folder: c for c in cells if c.classifier}
        overall = progress.add_task("all runs", total=len(cells) + len(stages))

        def pretrain(cell: Cell) -> Optional[str]:
            try:
                runner.pretrain(cell)
            except _Failed as e:
                return f"pretraining failed: {e}"
            finally:
                progress.advance(overall)
            return None

        def detect(cell: Cell, error: Optional[str]) -> Dict[str, Any]:
            record = runner.detect(cell, error)
            progress.advance(overall)
            console.print(f"{record['status']}: {cell.folder} {record.get('error', '')}")
            return record

        try:
            errors = dict(zip(stages, pool.map(pretrain, stages.values())))
            return list(pool.map(detect, cells, [errors.get(c.classifier_folder) for c in cells]))
        except BaseException:
            runner.stop()
            raise
