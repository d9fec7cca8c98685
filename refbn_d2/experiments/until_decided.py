"""Adds seeds to a matrix where a comparison is undecided, at looks that were fixed beforehand."""

import dataclasses
import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence

from ..errors import UserError
from ..evaluation.comparison import baseline_among
from ..evaluation.runs import RESULTS, Run, common_ground_truth, find_runs
from ..evaluation.sequential import Plan, Progress, next_look
from ..io.atomic import atomic_write, write_errors
from ..io.coco import is_number
from ..io.json import read_json
from .matrix import RunSpec

__all__ = ["run_until_decided"]

_FILE = "until_decided.json"


def run_until_decided(
    specs: Sequence[RunSpec],
    output: Path,
    plan: Plan,
    baseline: Optional[str],
    train: Callable[[List[RunSpec]], List[Dict[str, Any]]],
    jobs: int,
) -> Progress:
    """Trains until each comparison of a matrix is decided, or has ``plan.max_seeds`` runs per norm.

    The seeds are those of the matrix, followed by the next whole numbers. After an interruption,
    call this function again: finished runs are not repeated, and the looks at them have the same
    result.

    Args:
        specs: runs of the matrix.
        output: output folder of the matrix.
        plan: plan of the looks; it is saved in ``output``, where another plan is then an error.
        baseline: name with which the others are compared; None for the first.
        train: function that trains the unfinished ones of the given runs and returns the records
            of all; see ``run_matrix``.
        jobs: number of simultaneous runs, for the estimate of the remaining time.

    Returns:
        Result of the last look.

    Raises:
        UserError: if there is no run named ``baseline``, if a run failed, if ``output`` cannot be
            written or was begun with another plan, or if the runs are evaluated on different data
            sets.
    """
    baseline = baseline_among([spec.name for spec in specs], baseline)
    _fix(output, {**dataclasses.asdict(plan), "baseline": baseline})
    planned = _with_seeds(specs, plan.max_seeds)
    while True:
        runs = _runs(planned, output)
        progress = next_look(
            list(runs.values()), _ground_truth(runs.values()), plan, baseline=baseline
        )
        print("\n".join(progress.lines))
        if progress.finished:
            return progress
        todo = [
            spec
            for key, specs_of_one in planned.items()
            if _is_open(runs[specs_of_one[0]], progress, baseline, runs.values())
            for spec in specs_of_one[: progress.wanted]
        ]
        left = sum(bool(runs[spec].error) for spec in todo)
        print(_outlook(progress, left, _seconds(runs.values()), jobs), flush=True)
        failed = sum(record["status"] != "finished" for record in train(todo))
        if failed:
            raise UserError(
                f"{failed} of {len(todo)} runs did not finish; see above. The same command tries "
                "them again"
            )


def _fix(output: Path, plan: Dict[str, Any]) -> None:
    """Saves the plan in ``output``; raises a UserError if it contains another plan."""
    file = output / _FILE
    if not file.exists():
        with write_errors(output, "choose another folder"):
            output.mkdir(parents=True, exist_ok=True)
            with atomic_write(str(file)) as f:
                json.dump(plan, f, indent=1)
    before = read_json(file)
    if before != plan:
        raise UserError(
            f"{file}: begun with {before}, not {plan}; the looks are fixed before the first run: "
            "use the same options, or another --output"
        )


def _with_seeds(specs: Sequence[RunSpec], count: int) -> Dict[Path, List[RunSpec]]:
    """Returns ``count`` runs of each norm and condition, sorted by seed, by their common folder."""
    found: Dict[Path, List[RunSpec]] = {}
    for spec in specs:
        found.setdefault(spec.folder.parent, []).append(spec)
    for group in found.values():
        following = max(spec.seed for spec in group)
        while len(group) < count:
            following += 1
            group.append(dataclasses.replace(group[0], seed=following))
        group[:] = sorted(group, key=lambda spec: spec.seed)[:count]
    return found


def _runs(planned: Dict[Path, List[RunSpec]], output: Path) -> Dict[RunSpec, Run]:
    """Returns the results of each planned run; a run that was not started has an error."""
    there = find_runs(output) if any(output.rglob("run.json")) else []
    by_folder = {run.results.parent.parent: run for run in there}
    found = {}
    for spec in (spec for group in planned.values() for spec in group):
        folder = output / spec.folder
        found[spec] = by_folder.get(folder) or Run(
            name=spec.name,
            seed=spec.seed,
            results=folder / RESULTS,
            ims_per_batch=spec.ims_per_batch,
            grouping=spec.grouping,
            protocol=spec.protocol or None,
            error="not run yet",
        )
    return found


def _ground_truth(runs: Iterable[Run]) -> Path:
    """Returns the ground truth of the finished runs; without one, a path that is never read."""
    finished = [run for run in runs if not run.error]
    return common_ground_truth(finished) if finished else Path()


def _is_open(run: Run, progress: Progress, baseline: str, runs: Iterable[Run]) -> bool:
    """Whether the norm and condition of a run belong to a comparison that is not decided."""
    names = {r.name for r in runs if r.condition == run.condition} - {baseline}
    compared = names if run.name == baseline else {run.name}
    decided = {label for name in compared for label in (name, f"{name} ({run.condition})")}
    return len(decided & set(progress.decided)) < len(compared)


def _seconds(runs: Iterable[Run]) -> Optional[float]:
    """Returns the mean duration of the finished runs in seconds; None if there are none."""
    records = [read_json(run.results.parents[1] / "run.json") for run in runs if not run.error]
    times = [r["seconds"] for r in records if is_number(r.get("seconds"))]
    return sum(times) / len(times) if times else None


def _outlook(progress: Progress, left: int, seconds: Optional[float], jobs: int) -> str:
    """Describes the undecided comparisons, and the runs and time until the next look."""
    names = ", ".join(progress.open) or "everything"
    text = f"Open: {names}. Next look at {progress.wanted} runs per norm: {left} more"
    if seconds is None:
        return f"{text}."
    total = timedelta(seconds=round(seconds * math.ceil(left / jobs)))
    return f"{text}, about {total} (h:mm:ss) at {seconds:.0f} s per run."
