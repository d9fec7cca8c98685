"""Finds the runs to compare: results named on the command line, or run folders in a folder."""

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
        name: Name of the norm. Runs with the same name and condition differ only in the seed.
        seed: Seed of the training, or the position of the file among those of its name.
        results: Path of the detections in COCO format.
        ims_per_batch: Number of images per batch, if known.
        grouping: Grouping strength of the batches, from 0 (i.i.d.) to 1, if known.
        protocol: Name of the protocol of the comparison, if there are several.
        seed_is_known: Whether ``seed`` is the SEED of the training.
        pretraining_seed: SEED of the pretraining that runs of all seeds share, if they share one.
        log: Path of detectron2's metrics.json, if it exists.
        gt, image_root: Paths of the ground truth and the images, if the run folder names them.
        error: Reason why there are no results, or ''.
    """

    name: str
    seed: int
    results: Path
    ims_per_batch: Optional[int] = None
    grouping: Optional[float] = None
    protocol: Optional[str] = None
    seed_is_known: bool = False
    pretraining_seed: Optional[int] = None
    log: Optional[Path] = None
    gt: Optional[Path] = None
    image_root: Optional[Path] = None
    error: str = ""

    @property
    def condition(self) -> str:
        """Description of the settings that must be equal in runs that are compared."""
        parts = [self.protocol] if self.protocol else []
        if self.ims_per_batch is not None:
            parts.append(f"{self.ims_per_batch} image{'s' * (self.ims_per_batch != 1)} a batch")
        if self.grouping is not None:
            parts.append(f"grouping {self.grouping:g}" if self.grouping else "i.i.d.")
        return ", ".join(parts)


def named_results(arguments: Sequence[str]) -> List[Run]:
    """Parses ``NAME=a.json,b.json`` arguments; several files of a name are runs with other seeds.

    Args:
        arguments: Arguments of --results.

    Raises:
        UserError: For a malformed argument, a repeated name, or one file given as two seeds.
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
    """Finds the runs in all subfolders that have a run.json, finished or not.

    Args:
        folder: Folder to search, including its subfolders.

    Raises:
        UserError: If there are no runs, or if a run.json is invalid or describes the same run as
            another one.
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


# Types of values in run.json, in words.
_KINDS: Dict[Any, str] = {str: "text", int: "a whole number", (int, float): "a finite number"}


def _read_run(file: Path) -> Run:
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: is not a run, but a {type(content).__name__}")

    def field(key, kind, default=None):
        value = content.get(key, default)
        wrong = not isinstance(value, kind) or isinstance(value, bool)
        if value is not None and (wrong or (isinstance(value, float) and not math.isfinite(value))):
            raise UserError(f"{file}: {key} {value!r:.80} is not {_KINDS[kind]}")
        return value

    name, seed = field("name", str), field("seed", int)
    if not name:
        raise UserError(f"{file}: a run needs a name, which is that of its norm")
    if seed is None:
        raise UserError(f"{file}: a run needs a seed")
    if content.get("grouping") is None and "iid" in content:
        if isinstance(content["iid"], bool):
            content["iid"] = float(content["iid"])
        iid = field("iid", (int, float))
        if iid is not None and not 0 <= iid <= 1:
            raise UserError(f"{file}: iid {iid} is not within 0 and 1")
        content["grouping"] = None if iid is None else 1 - iid
    grouping = field("grouping", (int, float))
    if grouping is not None and not 0 <= grouping <= 1:
        raise UserError(f"{file}: grouping {grouping} is not within 0 and 1")
    batch = field("ims_per_batch", int)
    if batch is not None and not 1 <= batch < 2**31:
        raise UserError(f"{file}: ims_per_batch {batch!r:.80} is not a number of images")
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
        ims_per_batch=batch,
        grouping=grouping,
        protocol=field("protocol", str),
        seed_is_known=True,
        pretraining_seed=field("pretraining_seed", int),
        log=log if log.exists() else None,
        error=error,
        **paths,
    )


def training_log(path: Path) -> Dict[str, List[List[float]]]:
    """Reads the curves of a detectron2 metrics.json.

    Incomplete lines, which an interrupted run may leave, are skipped.

    Args:
        path: Path of metrics.json.

    Returns:
        A dict from the name of a value to its [[iteration, value], ...].
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
    """Returns the path of the ground truth that all finished runs name.

    Raises:
        UserError: If they name none or different ones, if it does not exist here, or if no run has
            finished.
    """
    if all(run.error for run in runs):
        raise UserError(f"none of the {len(runs)} runs has finished; nothing to report")
    named = {str(run.gt) for run in runs if run.gt and not run.error}
    if len(named) != 1:
        what = (
            "different ground truths: " + ", ".join(sorted(named)) if named else "no ground truth"
        )
        raise UserError(f"the run folders name {what}; give the right one with --gt")
    path = Path(named.pop())
    if not path.exists():
        raise UserError(
            f"{path}: no such file, and the runs were evaluated on it; go to the folder where they "
            "were started, or give it with --gt"
        )
    return path
