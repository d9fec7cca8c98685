"""From files to numbers: scores every run and compares each norm with the baseline."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np

from ..errors import UserError
from .ap import METRICS, Evaluation, evaluate
from .inputs import GroundTruth, load_ground_truth, load_results
from .interval import Difference, difference, half_samples, holm
from .runs import Run

__all__ = ["Comparison", "Group", "compare"]


@dataclass
class Group:
    """The runs of one norm under one condition.

    Attributes:
        label: unique in the report: the norm's name, with the condition where there are several.
        scores: iou type -> one Evaluation a run.
    """

    label: str
    runs: List[Run]
    baseline: Optional[str] = None
    scores: Dict[str, List[Evaluation]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.runs[0].name

    @property
    def condition(self) -> str:
        return self.runs[0].condition

    def mean(self, iou_type: str, metric: str) -> float:
        """Mean AP over seeds, in percent."""
        return float(np.mean([s.table[metric] for s in self.scores[iou_type]]))

    def category_means(self, iou_type: str) -> Dict[int, float]:
        """Category id -> mean AP over seeds, in percent."""
        scores = self.scores[iou_type]
        return {
            key: float(np.mean([s.categories[key] for s in scores])) for key in scores[0].categories
        }


@dataclass
class Comparison:
    """Everything a report shows.

    Attributes:
        groups: label -> group, in the order of the report.
        differences: label -> iou type -> metric -> Difference, of all but the baselines.
        p_holm: the same -> p-value corrected for all comparisons of that metric.
        failed: runs without results.
    """

    gt: GroundTruth
    iou_types: Sequence[str]
    baseline: str
    resamples: int
    seed: int
    groups: Dict[str, Group]
    differences: Dict[str, Dict[str, Dict[str, Difference]]]
    p_holm: Dict[str, Dict[str, Dict[str, Optional[float]]]]
    failed: List[Run]

    def delta_table(self, label: str) -> Dict[str, Dict[str, Dict[str, Any]]]:
        """``deltas.LABEL`` of report.json."""
        return {
            iou_type: {
                metric: {**asdict(d), "p_holm": self.p_holm[label][iou_type][metric]}
                for metric, d in table.items()
            }
            for iou_type, table in self.differences[label].items()
        }


def compare(
    runs: Sequence[Run],
    gt_path: Path,
    iou_types: Sequence[str],
    baseline: Optional[str],
    resamples: int,
    seed: int,
    advance: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Scores ``runs`` and compares.

    Args:
        runs: finished or not.
        gt_path: COCO ground truth.
        iou_types: of "bbox" and "segm".
        baseline: name of the norm to compare with; None: the first.
        resamples, seed: of the image sampling.
        advance: told what is being scored, once a run and iou type.

    Raises:
        UserError: for bad files, an unknown baseline, or nothing to compare.
    """
    finished = [run for run in runs if not run.error]
    names = list(dict.fromkeys(run.name for run in runs))
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise UserError(f"--baseline {baseline}: no such name; there are {', '.join(names)}")
    if not finished:
        raise UserError(f"none of the {len(runs)} runs has finished; nothing to report")
    gt = load_ground_truth(gt_path, iou_types)
    halves = half_samples(list(gt.sizes), resamples, seed)
    groups = _groups(finished, baseline)
    for group in groups.values():
        group.scores = {t: [] for t in iou_types}
        for run in group.runs:
            detections = load_results(run.results, gt, iou_types)
            for iou_type in iou_types:
                advance(f"{group.label}, seed {run.seed}, {iou_type}")
                group.scores[iou_type].append(evaluate(gt, detections, iou_type, halves))
    differences = {
        label: {t: _differences(groups[g.baseline], g, t, len(gt.sizes)) for t in iou_types}
        for label, g in groups.items()
        if g.baseline
    }
    return Comparison(
        gt=gt,
        iou_types=list(iou_types),
        baseline=baseline,
        resamples=resamples,
        seed=seed,
        groups=groups,
        differences=differences,
        p_holm=_correct(differences, iou_types),
        failed=[run for run in runs if run.error],
    )


def _groups(runs: Sequence[Run], baseline: str) -> Dict[str, Group]:
    several = len({run.condition for run in runs}) > 1
    # Conditions in order of batch size and grouping; within one the baseline comes first.
    order = sorted(
        runs,
        key=lambda r: (r.ims_per_batch or 0, r.grouping or 0, r.condition, r.name != baseline),
    )
    groups: Dict[str, Group] = {}
    for run in order:
        label = f"{run.name} ({run.condition or 'unknown'})" if several else run.name
        groups.setdefault(label, Group(label, [])).runs.append(run)
    by_condition = {g.condition: g.label for g in groups.values() if g.name == baseline}
    for group in groups.values():
        if group.name != baseline:
            group.baseline = by_condition.get(group.condition)
    return groups


def _differences(
    base: Group, other: Group, iou_type: str, num_images: int
) -> Dict[str, Difference]:
    a, b = base.scores[iou_type], other.scores[iou_type]
    return {
        metric: difference(
            np.array([s.table[metric] for s in a]),
            np.array([s.table[metric] for s in b]),
            np.array([s.replicates[:, column] for s in a]),
            np.array([s.replicates[:, column] for s in b]),
            num_images,
        )
        for column, metric in enumerate(METRICS)
    }


def _correct(differences, iou_types) -> Dict[str, Dict[str, Dict[str, Optional[float]]]]:
    corrected = {label: {t: {} for t in iou_types} for label in differences}
    for iou_type in iou_types:
        for metric in METRICS:
            family = [table[iou_type][metric].p for table in differences.values()]
            for label, value in zip(differences, holm(family)):
                corrected[label][iou_type][metric] = value
    return corrected
