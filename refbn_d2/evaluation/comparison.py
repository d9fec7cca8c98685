"""Reads results, scores every run and compares each norm with the baseline."""

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, Hashable, List, Optional, Sequence, Set, Tuple

import numpy as np

from ..errors import UserError
from .ap import METRICS, Evaluation, evaluate_all
from .inputs import GroundTruth, coverage_warnings, load_ground_truth, load_results
from .interval import (
    MARGIN,
    PAIRED_FROM,
    Difference,
    Verdict,
    difference,
    half_samples,
    shared_spreads,
)
from .runs import Run

__all__ = ["Comparison", "Differences", "NormRuns", "baseline_among", "compare"]

# Label -> iou type -> metric -> Difference.
Differences = Dict[str, Dict[str, Dict[str, Difference]]]


@dataclass
class NormRuns:
    """The runs of one norm under one condition.

    Attributes:
        label: Unique name in the report: the norm's name, with the condition if there are several.
        scores: iou type -> one Evaluation per run.
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

    def paired_with(self, other: "NormRuns") -> bool:
        """Whether runs are compared seed by seed: both have the same known seeds, and enough."""
        seeds = [run.seed for run in self.runs]
        return (
            len(seeds) >= PAIRED_FROM
            and seeds == [run.seed for run in other.runs]
            and all(run.seed_is_known for run in (*self.runs, *other.runs))
        )

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
        gt: Ground truth.
        iou_types: One or both of "bbox" and "segm".
        baseline: Name of the norm that others are compared with.
        resamples, seed: Number and seed of the random halves of the images.
        groups: label -> group, in the order of the report.
        differences: label -> iou type -> metric -> Difference, for all except the baselines.
        failed: Runs without results.
        primary: The iou type whose AP decides.
        margin: Smaller differences of AP do not matter in practice.
        cluster: Field of the COCO images that names the cluster of an image, or None.
        units: Number of clusters, or of images.
        warnings: Sentences that a reader must know before the numbers.
    """

    gt: GroundTruth
    iou_types: Sequence[str]
    baseline: str
    resamples: int
    seed: int
    groups: Dict[str, NormRuns]
    differences: Differences
    failed: List[Run]
    primary: str
    margin: float = MARGIN
    cluster: Optional[str] = None
    units: int = 0
    warnings: List[str] = field(default_factory=list)

    def primary_difference(self, label: str) -> Difference:
        """The difference of ``label`` on which its verdict is."""
        return self.differences[label][self.primary]["AP"]

    def verdict(self, label: str) -> Verdict:
        """Whether ``label`` is better or worse than its baseline, or practically the same."""
        return self.primary_difference(label).verdict(self.margin)

    def base_of(self, label: str) -> NormRuns:
        """Returns the runs that ``label``, one of ``differences``, is compared with."""
        base = self.groups[label].baseline
        assert base is not None  # without a baseline there is no difference
        return self.groups[base]

    def clearest(self) -> List[NormRuns]:
        """One group per norm, under the condition with the smallest p, to save space on a page."""
        best: Dict[str, Tuple[float, NormRuns]] = {}
        for label in self.differences:
            group, p = self.groups[label], self.primary_difference(label).p
            key = 2.0 if math.isnan(p) else p
            if group.name not in best or key < best[group.name][0]:
                best[group.name] = key, group
        return [group for _, group in best.values()]

    def delta_table(self, label: str) -> Dict[str, Dict[str, Dict[str, Any]]]:
        """``deltas.LABEL`` of report.json."""
        return {
            iou_type: {metric: d.as_dict() for metric, d in table.items()}
            for iou_type, table in self.differences[label].items()
        }

    def with_first_runs(self, count: int) -> "Comparison":
        """The comparison of the first ``count`` runs of each norm, which are scored already."""
        groups = {
            label: replace(
                group,
                runs=group.runs[:count],
                scores={t: scores[:count] for t, scores in group.scores.items()},
            )
            for label, group in self.groups.items()
        }
        differences = _all_differences(groups, self.iou_types, self.units)
        return replace(self, groups=groups, differences=differences)


def compare(
    runs: Sequence[Run],
    gt_path: Path,
    iou_types: Sequence[str],
    baseline: Optional[str],
    resamples: int,
    seed: int,
    advance: Callable[[str], None] = lambda what: None,
    *,
    primary: Optional[str] = None,
    margin: float = MARGIN,
    cluster: Optional[str] = None,
) -> Comparison:
    """Scores ``runs`` and compares the norms.

    Args:
        runs: Runs, finished or not.
        gt_path: Path of the COCO ground truth.
        iou_types: One or both of "bbox" and "segm".
        baseline: Name of the norm to compare with; None: the first.
        resamples, seed: Number and seed of the random halves of the images.
        advance: Called with a description of the run that is scored next.
        primary: The iou type whose AP decides; None: "bbox" where it is evaluated.
        margin: Differences of AP within +-margin, in percent, do not matter in practice.
        cluster: Field of the COCO images, such as "group" or "video", whose images belong together;
            None if each image was drawn by itself.

    Raises:
        UserError: For bad files, an unknown baseline, one result given as two seeds, or nothing to
            compare.
    """
    finished = [run for run in runs if not run.error]
    baseline = baseline_among([run.name for run in runs], baseline)
    primary = primary or ("bbox" if "bbox" in iou_types else iou_types[0])
    if primary not in iou_types:
        raise UserError(f"--primary {primary}: is not among --iou-type {' '.join(iou_types)}")
    if not (margin > 0 and math.isfinite(margin)):
        raise UserError(f"--margin {margin}: must be a number above 0")
    if not finished:
        raise UserError(f"none of the {len(runs)} runs has finished; nothing to report")
    gt = load_ground_truth(gt_path, iou_types)
    clusters = _clusters(gt, cluster) if cluster else None
    halves = half_samples(list(gt.sizes), resamples, seed, clusters)
    groups = _groups(finished, baseline)
    warnings = _check_copies(groups) + _shared_pretraining(finished)
    covered: Dict[str, Set[int]] = {}
    for group in groups.values():
        group.scores = {t: [] for t in iou_types}
        for run in group.runs:
            detections = load_results(run.results, gt, iou_types)
            covered[f"{group.label}, seed {run.seed}"] = {d["image_id"] for d in detections}
            advance(f"{group.label}, seed {run.seed}")
            scores = evaluate_all(gt, detections, iou_types, halves, per_category=True)
            for iou_type in iou_types:
                group.scores[iou_type].append(scores[iou_type])
    units = len(gt.sizes) if clusters is None else len(set(clusters))
    return Comparison(
        gt=gt,
        iou_types=list(iou_types),
        baseline=baseline,
        resamples=resamples,
        seed=seed,
        groups=groups,
        differences=_all_differences(groups, iou_types, units),
        failed=[run for run in runs if run.error],
        primary=primary,
        margin=margin,
        cluster=cluster,
        units=units,
        warnings=warnings + coverage_warnings(covered, gt),
    )


def baseline_among(names: Sequence[str], baseline: Optional[str]) -> str:
    """Returns ``baseline``, or the first of ``names`` for None.

    Raises:
        UserError: If ``baseline`` is not among ``names``.
    """
    names = list(dict.fromkeys(names))
    if baseline is None:
        return names[0]
    if baseline not in names:
        raise UserError(f"--baseline {baseline}: no such name; there are {', '.join(names)}")
    return baseline


def _shared_pretraining(runs: Sequence[Run]) -> List[str]:
    """What the intervals do not cover if runs of all seeds start from one pretraining."""
    seeds = sorted({r.pretraining_seed for r in runs if r.pretraining_seed is not None})
    if not seeds:
        return []
    named = ", ".join(map(str, seeds))
    return [
        f"The runs of all seeds start from one pretraining (seed {named}). The verdicts hold for "
        "detectors that start from it; the intervals do not cover the choice of the pretraining."
    ]


def _clusters(gt: GroundTruth, name: str) -> List[Hashable]:
    """The cluster of each image, in the order of ``gt.sizes``."""
    found: Dict[int, Hashable] = {}
    for image in gt.dataset["images"]:
        value = image.get(name)
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise UserError(
                f"--cluster {name}: image {image['id']} of {gt.path} has no field {name!r} with a "
                "text or a whole number"
            )
        found[image["id"]] = value
    if len(set(found.values())) < 2:
        raise UserError(f"--cluster {name}: all images of {gt.path} have the same; use at least 2")
    return [found[key] for key in gt.sizes]


def _check_copies(groups: Dict[str, NormRuns]) -> List[str]:
    """Refuses one result as two seeds of a norm; warns of one result under two norms.

    Raises:
        UserError: With the names of both files.
    """
    first: Dict[bytes, Tuple[str, Run]] = {}
    warnings = []
    for group in groups.values():
        own: Dict[bytes, Run] = {}
        for run in group.runs:
            content = run.results.read_bytes() if run.results.is_file() else b""
            # Two models that find nothing are not copies. A bad file is refused later.
            if len(content.strip()) <= len("[]"):
                continue
            digest = hashlib.sha256(content).digest()
            if digest in own:
                raise UserError(
                    f"{run.results} is a copy of {own[digest].results}, given as another seed of "
                    f"{group.label}; give each training run once"
                )
            own[digest] = run
            label, other = first.setdefault(digest, (group.label, run))
            if label != group.label:
                warnings.append(
                    f"{group.label}, seed {run.seed}, and {label}, seed {other.seed}, are the same "
                    f"results: {run.results} and {other.results}."
                )
    return warnings


def _groups(runs: Sequence[Run], baseline: str) -> Dict[str, NormRuns]:
    several = len({run.condition for run in runs}) > 1
    # Sorted by batch size and grouping; within a condition the baseline comes first.
    order = sorted(
        runs,
        key=lambda r: (r.ims_per_batch or 0, r.grouping or 0, r.condition, r.name != baseline),
    )
    groups: Dict[str, NormRuns] = {}
    for run in order:
        label = f"{run.name} ({run.condition or 'unknown'})" if several else run.name
        groups.setdefault(label, NormRuns(label, [])).runs.append(run)
    by_condition = {g.condition: g.label for g in groups.values() if g.name == baseline}
    for group in groups.values():
        group.runs.sort(key=lambda run: run.seed)
        if group.name != baseline:
            group.baseline = by_condition.get(group.condition)
    return groups


def _all_differences(
    groups: Dict[str, NormRuns], iou_types: Sequence[str], units: int
) -> Differences:
    pairs = [(g.baseline, g.label) for g in groups.values() if g.baseline]
    paired = [groups[base].paired_with(groups[other]) for base, other in pairs]
    found: Differences = {label: {t: {} for t in iou_types} for _, label in pairs}
    for iou_type in iou_types:
        for column, metric in enumerate(METRICS):
            scores = {label: g.scores[iou_type] for label, g in groups.items()}
            ap = {k: np.array([s.table[metric] for s in v]) for k, v in scores.items()}
            spreads = shared_spreads(ap, pairs, paired)
            for (base, other), spread, together in zip(pairs, spreads, paired):
                found[other][iou_type][metric] = difference(
                    ap[base],
                    ap[other],
                    np.array([s.replicates[:, column] for s in scores[base]]),
                    np.array([s.replicates[:, column] for s in scores[other]]),
                    units,
                    spread,
                    comparisons=len(pairs),
                    paired=together,
                )
    return found
