"""Finds what to compare: results named on the command line, or run folders below a folder."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from ..errors import UserError
from ..io.coco import is_number
from ..io.json import read_json

__all__ = ["Run", "common_ground_truth", "find_runs", "named_results", "training_log"]

RESULTS = "inference/coco_instances_results.json"


@dataclass(frozen=True)
class Run:
    """One training run, or one results file that stands for it.

    Attributes:
        name: of the norm; runs of one name under one condition are seeds of each other.
        seed: of the training, or the place of the file among those of its name.
        results: detections in COCO format.
        ims_per_batch: images a batch, if known.
        grouping: how far batches are from i.i.d., 0 (i.i.d.) to 1, if known.
        protocol: how norms are compared, in words, if there is more than one way.
        pretraining_seed: SEED of the pretraining that runs of all seeds share, if they share one.
        log: detectron2's metrics.json, if any.
        gt, image_root: as the run folder names them.
        error: why there are no results, or ''.
    """

    name: str
    seed: int
    results: Path
    ims_per_batch: Optional[int] = None
    grouping: Optional[float] = None
    protocol: Optional[str] = None
    pretraining_seed: Optional[int] = None
    log: Optional[Path] = None
    gt: Optional[Path] = None
    image_root: Optional[Path] = None
    error: str = ""

    @property
    def condition(self) -> str:
        """What the run has in common with those it may be compared with, in words."""
        parts = [self.protocol] if self.protocol else []
        if self.ims_per_batch is not None:
            parts.append(f"{self.ims_per_batch} image{'s' * (self.ims_per_batch != 1)} a batch")
        if self.grouping is not None:
            parts.append(f"grouping {self.grouping:g}" if self.grouping else "i.i.d.")
        return ", ".join(parts)


def named_results(arguments: Sequence[str]) -> List[Run]:
    """Runs from ``NAME=a.json,b.json`` arguments; several files of a name are seeds.

    Raises:
        UserError: for a malformed argument, a repeated name, or one file given as two seeds.
    """
    runs: List[Run] = []
    for argument in arguments:
        name, equals, files = argument.partition("=")
        name, paths = name.strip(), [Path(f) for f in files.split(",") if f]
        if not name or not equals or not paths:
            raise UserError(f"--results {argument}: write NAME=file.json or NAME=a.json,b.json")
        if any(run.name == name for run in runs):
            raise UserError(f"--results: the name {name} occurs twice; give seeds as {name}=a,b")
        for seed, path in enumerate(paths, 1):
            if path.resolve() in [p.resolve() for p in paths[: seed - 1]]:
                raise UserError(f"--results: {path} is given twice as a seed of {name}")
            runs.append(Run(name, seed, path))
    return runs


def find_runs(folder: Path) -> List[Run]:
    """Runs of all folders below ``folder`` that have a run.json, finished or not.

    Raises:
        UserError: if there are none, or a run.json lacks something or repeats another.
    """
    if not folder.is_dir():
        raise UserError(f"--runs {folder}: no such folder")
    runs = [_read_run(file) for file in sorted(folder.rglob("run.json"))]
    if not runs:
        raise UserError(f"--runs {folder}: no folder below it has a run.json")
    seen: Dict[Any, Path] = {}
    for run in runs:
        key = run.name, run.condition, run.seed
        where = run.results.parent.parent
        if key in seen:
            raise UserError(f"{where} and {seen[key]} are both {run.name} with seed {run.seed}")
        seen[key] = where
    return runs


def _read_run(file: Path) -> Run:
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: is not a run, but a {type(content).__name__}")

    def field(key, kind, default=None):
        value = content.get(key, default)
        wrong = not isinstance(value, kind) or isinstance(value, bool)
        if value is not None and (wrong or (isinstance(value, float) and not math.isfinite(value))):
            raise UserError(f"{file}: {key} {value!r} is not of the right kind")
        return value

    name, seed = field("name", str), field("seed", int)
    if not name or seed is None:
        raise UserError(f"{file}: a run needs a name and an integer seed")
    if content.get("grouping") is None and "iid" in content:
        if isinstance(content["iid"], bool):
            content["iid"] = float(content["iid"])
        iid = field("iid", (int, float))
        content["grouping"] = None if iid is None else 1 - iid
    grouping = field("grouping", (int, float))
    if grouping is not None and not 0 <= grouping <= 1:
        raise UserError(f"{file}: grouping {grouping} is not within 0 and 1")
    results, log = file.parent / RESULTS, file.parent / "metrics.json"
    error = ""
    if content.get("status") != "finished":
        words = f"{content.get('status', 'not finished')}: {content.get('error', '')}"
        error = " ".join(words.split()).rstrip(": ")
    elif not results.exists():
        error = f"finished, but has no {RESULTS}"
    paths = {k: Path(content[k]) for k in ("gt", "image_root") if field(k, str)}
    return Run(
        name=name,
        seed=seed,
        results=results,
        ims_per_batch=field("ims_per_batch", int),
        grouping=grouping,
        protocol=field("protocol", str),
        pretraining_seed=field("pretraining_seed", int),
        log=log if log.exists() else None,
        error=error,
        **paths,
    )


def training_log(path: Path) -> Dict[str, List[List[float]]]:
    """Curves of a detectron2 metrics.json: name -> [[iteration, value], ...].

    The last line of an interrupted run may be cut off; such lines are left out.
    """
    curves: Dict[str, List[List[float]]] = {"total_loss": [], "bbox/AP": [], "segm/AP": []}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            iteration = entry["iteration"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        for name, points in curves.items():
            if is_number(iteration) and is_number(entry.get(name)):
                points.append([iteration, entry[name]])
    return curves


def common_ground_truth(runs: Sequence[Run]) -> Path:
    """The ground truth that all finished runs name.

    Raises:
        UserError: if they name none, or different ones, or none has finished.
    """
    if all(run.error for run in runs):
        raise UserError(f"none of the {len(runs)} runs has finished; nothing to report")
    named = {str(run.gt) for run in runs if run.gt and not run.error}
    if len(named) != 1:
        what = (
            "different ground truths: " + ", ".join(sorted(named)) if named else "no ground truth"
        )
        raise UserError(f"the run folders name {what}; give the right one with --gt")
    return Path(named.pop())
