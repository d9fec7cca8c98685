#!/usr/bin/env python3
"""Simulates reports whose true differences are known, and checks intervals and verdicts.

It counts how often the intervals of refbn_d2.evaluation cover the true difference, and how often
its verdicts are false, and prints the Markdown tables of docs/evaluation.md.

The first tables come from a hierarchical normal model of AP (interval.py). Each image has a value:
the sum of the norm's mean, an effect of the seed, an effect of the image on the norm, and an effect
of the image on the run. "AP" is the mean over 200 images, and resamples are means over 200 random
halves of the images. Lengths are half-lengths relative to 1.96 true standard errors, the shortest
that an interval with 95 % coverage can have. "first" is the formula of the first version: each
norm's own spread, Satterthwaite's degrees of freedom, and for a norm with a single run the spread
of the other norm.

The last table simulates detectors and runs COCO's evaluation on them:

recall    every object is found with a probability that depends on the norm, the seed and the image,
          with a perfect box and without false positives. AP is then the recall on COCO's grid of
          101 points, so the true difference is 100 / 101 of the difference in probability.
detector  objects differ in difficulty, scores depend on it, boxes are imprecise, and there are
          false positives. The true difference is the mean over other simulated data sets.
"""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import hotcoco
import numpy as np
from scipy import special

from refbn_d2.evaluation.ap import METRICS, evaluate
from refbn_d2.evaluation.inputs import GroundTruth
from refbn_d2.evaluation.interval import (
    Difference,
    Verdict,
    difference,
    half_samples,
    shared_spreads,
)
from refbn_d2.evaluation.sequential import Plan

IMAGES, RESAMPLES = 200, 200
# Correlation of the images in one cluster, if images come in clusters.
WITHIN_CLUSTER = 0.075


@dataclass(frozen=True)
class Report:
    """The settings of one simulated report. SD is the standard deviation.

    Attributes:
        name: Name of the row.
        conditions: For each condition the norms, the baseline first: (runs, SD of AP over seeds).
        images: Standard error of a difference from image sampling alone, in AP.
        run_by_image: Standard error of a run's AP from effects of these images on this run only.
        scatter: SD over conditions of the logarithm of their SD over seeds.
        common: Correlation of the norms' deviations for the same seed.
        cluster: Number of images per cluster.
        effect: True difference of each norm from its baseline.
        paired: Whether runs with the same seed are paired.
        watch: Condition whose comparisons are counted; None: all.
        limit: Whether the row breaks an assumption of the model on purpose.
    """

    name: str
    conditions: Tuple[Tuple[Tuple[int, float], ...], ...]
    images: float = 0.7
    run_by_image: float = 0.5
    scatter: float = 0.0
    common: float = 0.0
    cluster: int = 1
    effect: float = 0.0
    paired: bool = False
    watch: Optional[int] = None
    limit: bool = False


def pair(runs: Sequence[int], spreads: Sequence[float]) -> tuple:
    return tuple(zip(runs, spreads))


FEW = {"images": 0.3, "run_by_image": 0.2}  # images matter little
REPORTS = [
    Report("2 against 2, spread 2", (pair((2, 2), (2, 2)),)),
    Report("the same, images matter little", (pair((2, 2), (2, 2)),), **FEW),
    Report("2 against 2, seeds do not matter", (pair((2, 2), (0, 0)),)),
    Report("2 against 2, spreads 1 and 2", (pair((2, 2), (1, 2)),)),
    Report("3 against 3, spread 1", (pair((3, 3), (1, 1)),)),
    Report("3 against 3, spreads 0.5 and 2", (pair((3, 3), (0.5, 2)),)),
    Report("5 against 5, spread 1", (pair((5, 5), (1, 1)),)),
    Report("5 against 5, spreads 0.5 and 2", (pair((5, 5), (0.5, 2)),)),
    Report("10 against 10, spread 1", (pair((10, 10), (1, 1)),)),
    Report("7 conditions, 2 runs each, spread 1.5", (pair((2, 2), (1.5, 1.5)),) * 7),
    Report("the same, images matter little", (pair((2, 2), (1.5, 1.5)),) * 7, **FEW),
    Report("7 conditions, 2 runs each, spreads vary by 1.35", (pair((2, 2), (1.5, 1.5)),) * 7,
           scatter=0.3, **FEW),
    Report("7 conditions, 2 runs each, spreads vary by 1.8", (pair((2, 2), (1.5, 1.5)),) * 7,
           scatter=0.6, **FEW),
    Report("7 conditions, 5 runs each, spreads vary by 1.8", (pair((5, 5), (1.5, 1.5)),) * 7,
           scatter=0.6, **FEW),
    Report("3 conditions, 3 runs each, spreads vary by 1.35", (pair((3, 3), (1, 1)),) * 3,
           scatter=0.3),
    Report("4 norms, 3 runs each, spreads 1, 1, 1.5, 2", (pair((3,) * 4, (1, 1, 1.5, 2)),)),
    Report("4 norms, 5 runs each, spreads 1, 1, 1.5, 2", (pair((5,) * 4, (1, 1, 1.5, 2)),)),
    Report("5 against 2, spreads 0.5 and 2", (pair((5, 2), (0.5, 2)),)),
    Report("5 against 2, spread 1", (pair((5, 2), (1, 1)),)),
    Report("5 against 3, spreads 0.5 and 2", (pair((5, 3), (0.5, 2)),)),
    Report("3 against 2, spread 1", (pair((3, 2), (1, 1)),)),
    Report("5 against 1, spreads 0.7 and 2", (pair((5, 1), (0.7, 2)),)),
    Report("1 against 1, spread 1", (pair((1, 1), (1, 1)),)),
    Report("1 against 1, spread 2", (pair((1, 1), (2, 2)),)),
    Report("5 against 5, spread 0.2, images in clusters of 5", (pair((5, 5), (0.2, 0.2)),),
           run_by_image=0.2, cluster=5),
    Report("5 against 5, spread 0.2, images in clusters of 20", (pair((5, 5), (0.2, 0.2)),),
           run_by_image=0.2, cluster=20),
    Report("5 against 5, spread 1, seeds in common correlate by 0.68", (pair((5, 5), (1, 1)),),
           common=0.68),
    Report("the same, paired by seed", (pair((5, 5), (1, 1)),), common=0.68, paired=True),
    Report("5 against 5, spread 2, correlation 0.9, paired, images matter little",
           (pair((5, 5), (2, 2)),), common=0.9, paired=True, **FEW),
    Report("5 against 5, spread 1, correlation 0, paired", (pair((5, 5), (1, 1)),), paired=True),
    Report("5 against 5, spreads 0.5 and 2, correlation 0.68, paired",
           (pair((5, 5), (0.5, 2)),), common=0.68, paired=True),
    Report("10 against 10, spread 1, correlation 0.68, paired", (pair((10, 10), (1, 1)),),
           common=0.68, paired=True),
    Report("4 norms, 5 runs each, spreads 1, 1, 1.5, 2, correlation 0.68, paired",
           (pair((5,) * 4, (1, 1, 1.5, 2)),), common=0.68, paired=True),
    Report("7 conditions, 5 runs each, spreads vary by 1.8, correlation 0.68, paired",
           (pair((5, 5), (1.5, 1.5)),) * 7, scatter=0.6, common=0.68, paired=True, **FEW),
    Report("2 against 2, spreads 0.5 and 2", (pair((2, 2), (0.5, 2)),), limit=True),
    Report("the same, images matter little", (pair((2, 2), (0.5, 2)),), limit=True, **FEW),
    Report("7 conditions, 2 runs each, spread 1: the one with 3",
           (pair((2, 2), (3, 3)),) + (pair((2, 2), (1, 1)),) * 6, watch=0, limit=True, **FEW),
    Report("7 conditions, 5 runs each, spread 1: the one with 3",
           (pair((5, 5), (3, 3)),) + (pair((5, 5), (1, 1)),) * 6, watch=0, limit=True, **FEW),
]  # fmt: skip


@functools.lru_cache
def halves(cluster: int) -> np.ndarray:
    """Weights of each half's mean, (IMAGES, RESAMPLES): 1 / its size for its images, else 0."""
    clusters = (np.arange(IMAGES) // cluster).tolist()
    found = np.zeros((IMAGES, RESAMPLES))
    for n, half in enumerate(half_samples(range(IMAGES), RESAMPLES, 0, clusters)):
        found[half, n] = 1 / len(half)
    return found


@dataclass(frozen=True)
class Norm:
    """Simulated runs of a norm: AP (k,) and its resamples (k, RESAMPLES), by kind of resampling."""

    ap: np.ndarray
    replicates: np.ndarray
    by_image: np.ndarray

    def first(self, runs: int) -> "Norm":
        return Norm(self.ap[:runs], self.replicates[:runs], self.by_image[:runs])


def draw(rng: np.random.Generator, report: Report) -> List[Tuple[List[Norm], List[float]]]:
    """For each condition its norms, and the true variances of their differences from the first."""
    found = []
    count = IMAGES // report.cluster
    within = WITHIN_CLUSTER if report.cluster > 1 else 0.0
    # The mean over images of each norm then has the variance images^2 / 2, and a difference of two
    # norms images^2.
    image_sd = report.images * np.sqrt(IMAGES / 2 / (1 + (report.cluster - 1) * within))
    for condition in report.conditions:
        factor = np.exp(rng.normal(0, report.scatter)) if report.scatter else 1.0
        shared = rng.normal(size=max(runs for runs, _ in condition))
        norms, variances = [], []
        for position, (runs, sd) in enumerate(condition):
            own, common = np.sqrt(1 - report.common), np.sqrt(report.common)
            seeds = sd * factor * (own * rng.normal(size=runs) + common * shared[:runs])
            image = np.sqrt(1 - within) * rng.normal(size=IMAGES)
            if within:
                image += np.sqrt(within) * np.repeat(rng.normal(size=count), report.cluster)
            values = rng.normal(0, report.run_by_image * np.sqrt(IMAGES), (runs, IMAGES))
            values += seeds[:, None] + image_sd * image + report.effect * (position > 0)
            by_cluster = values @ halves(report.cluster)
            by_image = by_cluster if report.cluster == 1 else values @ halves(1)
            norms.append(Norm(values.mean(1), by_cluster, by_image))
            runs_of, sd_of = condition[0]
            # The effects of a common seed cancel if both norms have the same spread.
            both = report.common * (sd - sd_of) ** 2 * factor**2 / runs
            own_variances = (
                ((1 - report.common) * (s * factor) ** 2 + report.run_by_image**2) / k
                for k, s in ((runs_of, sd_of), (runs, sd))
            )
            variances.append(report.images**2 + both + sum(own_variances))
        found.append((norms, variances))
    return found


def compared(
    conditions: Sequence[Sequence[Norm]], units: int, paired: bool = False
) -> List[List[Difference]]:
    """The differences of each condition, calculated as in evaluation/comparison.py."""
    names = [[f"{c} {n}" for n in range(len(norms))] for c, norms in enumerate(conditions)]
    ap = {k: n.ap for keys, norms in zip(names, conditions) for k, n in zip(keys, norms)}
    pairs = [(keys[0], other) for keys in names for other in keys[1:]]
    spreads = iter(shared_spreads(ap, pairs, [paired] * len(pairs)))
    return [
        [
            difference(
                a.ap, b.ap, a.replicates, b.replicates, units, next(spreads), len(pairs), paired
            )
            for a, b in ((norms[0], other) for other in norms[1:])
        ]
        for norms in conditions
    ]


def first_version(a: Norm, b: Norm, units: int = IMAGES) -> Tuple[float, float]:
    """Half-length of the first version's 95 % interval, and its p-value."""
    half = units // 2
    scale = half / (units - half)
    images = scale * (b.by_image.mean(0) - a.by_image.mean(0)).var(ddof=1)
    several = [n for n in (a, b) if len(n.ap) > 1]
    terms, inter = [], 0.0
    for n in several:
        k = len(n.ap)
        share = 1 / k if len(several) == 2 else 1 / len(a.ap) + 1 / len(b.ap)
        about_mean = n.by_image - n.by_image.mean(0)
        own = scale * about_mean.var(axis=1, ddof=1).sum() / (k - 1)
        terms.append((max(n.ap.var(ddof=1), own) * share, k - 1))
        inter += own * share
    terms.append((max(images - inter, 0.0), units - 1))
    variance = sum(v for v, _ in terms)
    df = variance**2 / sum(v**2 / d for v, d in terms)
    t = abs(b.ap.mean() - a.ap.mean()) / np.sqrt(variance)
    return -special.stdtrit(df, 0.025) * np.sqrt(variance), 2 * special.stdtr(df, -t)


def coverage(report: Report, repetitions: int) -> Dict[str, float]:
    """Coverage and relative half-length, of this version (NaN: no interval) and the first."""
    rng = np.random.default_rng(0)
    rows = []
    counted = 1 if report.watch is not None else sum(len(c) - 1 for c in report.conditions)
    for _ in range(repetitions // counted):
        drawn = draw(rng, report)
        norms_of = [norms for norms, _ in drawn]
        found = compared(norms_of, IMAGES // report.cluster, report.paired)
        for c, ((norms, variances), differences) in enumerate(zip(drawn, found)):
            if report.watch not in (None, c):
                continue
            for other, variance, d in zip(norms[1:], variances[1:], differences):
                oracle = 1.96 * np.sqrt(variance)
                error = abs(d.delta - report.effect)
                reach = (d.ci95[1] - d.ci95[0]) / 2 if d.ci95 else np.nan
                old, _ = first_version(norms[0], other)
                rows.append((error < reach, reach / oracle, error < old, old / oracle))
    covered, length, old_covered, old_length = np.mean(rows, axis=0)
    if np.isnan(length):
        covered = np.nan
    return {"covered": covered, "length": length, "old": old_covered, "old length": old_length}


def percent(value: float) -> str:
    return "none" if np.isnan(value) else f"{value:.1%}"


def times(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def print_coverage(repetitions: int) -> None:
    print("| runs | covered | length | first: covered | length |\n|---|---|---|---|---|")
    for report in REPORTS:
        found = coverage(report, repetitions)
        name = f"*{report.name}*" if report.limit else report.name
        print(
            f"| {name} | {percent(found['covered'])} | {times(found['length'])} "
            f"| {percent(found['old'])} | {times(found['old length'])} |",
            flush=True,
        )


def looks(report: Report, plan: Plan, repetitions: int) -> Tuple[float, float, float, float]:
    """Shares of reports: any better or worse, any practically the same, first comparison better;
    and the mean number of runs per norm at the end."""
    rng = np.random.default_rng(1)
    ends = []
    for _ in range(repetitions):
        conditions = [norms for norms, _ in draw(rng, report)]
        verdicts: Dict[Tuple[int, int], Verdict] = {}
        for look in plan.looks:
            found = compared([[n.first(look) for n in norms] for norms in conditions], IMAGES)
            for c, differences in enumerate(found):
                for n, d in enumerate(differences):
                    verdict = d.verdict(plan.margin, plan.alpha(look))
                    if verdict is not Verdict.UNDECIDED:
                        verdicts.setdefault((c, n), verdict)
            if len(verdicts) == sum(map(len, found)):
                break
        reached = set(verdicts.values())
        ends.append((
            bool(reached & {Verdict.BETTER, Verdict.WORSE}),
            Verdict.SAME in reached,
            verdicts.get((0, 0)) is Verdict.BETTER,
            look,
        ))  # fmt: skip
    return tuple(np.mean(ends, axis=0))


def looks_after_every_run(report: Report, last: int, repetitions: int) -> float:
    """Share of false verdicts with a test after every seed from 2 on that stops at p < 0.05."""
    rng = np.random.default_rng(1)
    false = 0
    for _ in range(repetitions):
        ((norms, _),) = draw(rng, report)
        false += any(
            first_version(*(n.first(k) for n in norms))[1] < 0.05 for k in range(2, last + 1)
        )
    return false / repetitions


def print_looks(repetitions: int) -> None:
    plan = Plan(max_seeds=12, margin=1.0)
    one = (pair((12, 12), (1.5, 1.5)),)
    six = (pair((12,) * 7, (1.5,) * 7),)
    no_effect = Report("no difference, spread 1.5", one)
    print(f"\nLooks at {plan.looks} runs per norm, margin {plan.margin}:\n")
    print("| true difference | better or worse | practically the same | mean runs |")
    print("|---|---|---|---|")
    for report in (
        no_effect,
        Report("no difference, spread 1.5, six comparisons", six),
        Report("no difference, spread 0.5, images 0.2", (pair((12, 12), (0.5, 0.5)),),
               images=0.2, run_by_image=0.2),
        Report("difference 1.0, the margin, spread 0.5, images 0.2",
               (pair((12, 12), (0.5, 0.5)),), images=0.2, run_by_image=0.2, effect=1.0),
        Report("difference 3, spread 1.5", one, effect=3.0),
    ):  # fmt: skip
        differs, same, _, runs = looks(report, plan, repetitions)
        print(f"| {report.name} | {differs:.1%} | {same:.1%} | {runs:.1f} |", flush=True)
    share = looks_after_every_run(no_effect, plan.max_seeds, repetitions)
    print(f"\nThe first version, looked at after every run from 2 to 12 a norm: {share:.1%} false.")


def print_power(repetitions: int) -> None:
    print("\nTwo norms that differ by 3 AP, 5 runs each:\n")
    print(
        "| spread over seeds | images | better | mean half-length | first: p < 0.05 | half-length |"
    )
    print("|---|---|---|---|---|---|")
    for spread, images in ((0.25, 0.25), (1.1, 0.5), (1.5, 0.5), (1.8, 0.5)):
        report = Report("", (pair((5, 5), (spread, spread)),), images, 0.35, effect=3.0)
        rng, rows = np.random.default_rng(2), []
        for _ in range(repetitions):
            ((norms, _),) = draw(rng, report)
            (((d,),)) = compared([norms], IMAGES)
            old, p = first_version(*norms)
            low, high = d.ci95
            rows.append((d.verdict() is Verdict.BETTER, (high - low) / 2, p < 0.05, old))
        better, reach, old_better, old_reach = np.mean(rows, axis=0)
        print(
            f"| {spread} | {images} | {better:.0%} | {reach:.2f} | {old_better:.0%} "
            f"| {old_reach:.2f} |",
            flush=True,
        )


CATEGORIES, SIDE = 3, 400
TRUTH_SETS = 2000
# kind of detector, runs of each norm (baseline, other), SD of its quality over seeds
SCENARIOS = [
    ("recall", (2, 2), 0.02),
    ("recall", (5, 5), 0.02),
    ("detector", (3, 3), 0.15),
    ("detector", (5, 5), 0.15),
]


def scene(rng: np.random.Generator) -> dict:
    """Ground truth with 1 to 5 objects per image; "ease" is how easy each is to find."""
    images, annotations, ease = [], [], []
    for image in range(1, IMAGES + 1):
        images.append({"id": image, "height": SIDE, "width": SIDE, "file_name": f"{image}.png"})
        weather = rng.normal()
        for _ in range(rng.integers(1, 6)):
            w, h = rng.uniform(15, 150, 2)
            x, y = rng.uniform(0, SIDE - w), rng.uniform(0, SIDE - h)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(rng.integers(CATEGORIES)) + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
            ease.append(weather + rng.normal())
    categories = [{"id": k + 1, "name": str(k)} for k in range(CATEGORIES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return {"content": content, "ease": np.array(ease)}


def recall_run(rng, world, quality):
    """Finds an object with probability ``quality``, more likely in easy images."""
    weather = np.tanh(world["ease"]) * 0.25
    found = rng.random(len(weather)) < np.clip(quality + weather, 0, 1)
    return [
        {**_detection(a, a["bbox"]), "score": float(rng.random())}
        for a, f in zip(world["content"]["annotations"], found)
        if f
    ]


def detector_run(rng, world, quality):
    """A detector with misses, imprecise boxes, informative scores and false positives."""
    annotations = world["content"]["annotations"]
    logit = quality + 1.5 * world["ease"] + rng.normal(0, 1, len(annotations))
    results = []
    for a, strength in zip(annotations, logit):
        x, y, w, h = a["bbox"]
        if rng.random() < 1 / (1 + np.exp(-strength)):
            shift = rng.normal(0, 0.09 * np.exp(-0.3 * strength), 4) * [w, h, w, h]
            box = [x + shift[0], y + shift[1], max(1, w + shift[2]), max(1, h + shift[3])]
            score = 1 / (1 + np.exp(-strength + rng.normal(0, 1)))
            results.append({**_detection(a, box), "score": float(score)})
        if rng.random() < 0.4:
            box = [float(v) for v in (*rng.uniform(0, SIDE / 2, 2), *rng.uniform(15, 150, 2))]
            score = 1 / (1 + np.exp(1 + quality / 2 + rng.normal(0, 1.5)))
            results.append({**_detection(a, box), "score": float(score)})
    return results


def _detection(annotation, box):
    return {
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": [float(v) for v in box],
    }


RUN = {"recall": recall_run, "detector": detector_run}
QUALITY = {"recall": (0.50, 0.53), "detector": (0.5, 0.8)}


def ground_truth(world) -> GroundTruth:
    content = world["content"]
    sizes = {i["id"]: (SIDE, SIDE) for i in content["images"]}
    return GroundTruth(Path("simulated"), content, hotcoco.COCO(content), sizes, {})


def seed_quality(rng, kind, norm, spread):
    return QUALITY[kind][norm] + rng.normal(0, spread)


def true_difference(kind: str, spread: float) -> float:
    if kind == "recall":
        low, high = QUALITY[kind]
        return 100 * (high - low) * 100 / 101
    total = []
    rng = np.random.default_rng(123456)
    for _ in range(TRUTH_SETS):
        world = scene(rng)
        gt = ground_truth(world)
        ap = [
            evaluate(gt, RUN[kind](rng, world, seed_quality(rng, kind, n, spread)), "bbox").table
            for n in (0, 1)
        ]
        total.append(ap[1]["AP"] - ap[0]["AP"])
    return float(np.mean(total))


def simulate(kind, runs, spread, truth, sets) -> Dict[str, float]:
    """As ``coverage``, with lengths in AP."""
    rows = []
    column = METRICS.index("AP")
    for data_set in range(sets):
        rng = np.random.default_rng([data_set, *runs])
        world = scene(rng)
        gt = ground_truth(world)
        subsets = half_samples(list(gt.sizes), RESAMPLES, data_set)
        norms = []
        for n, count in enumerate(runs):
            scores = [
                evaluate(
                    gt, RUN[kind](rng, world, seed_quality(rng, kind, n, spread)), "bbox", subsets
                )
                for _ in range(count)
            ]
            replicates = np.array([s.replicates[:, column] for s in scores])
            norms.append(Norm(np.array([s.table["AP"] for s in scores]), replicates, replicates))
        (((d,),)) = compared([norms], IMAGES)
        old, _ = first_version(*norms)
        error, reach = abs(d.delta - truth), (d.ci95[1] - d.ci95[0]) / 2
        rows.append((error < reach, reach, error < old, old))
    return dict(zip(("covered", "length", "old", "old length"), np.mean(rows, axis=0)))


def print_detectors(sets: int) -> None:
    print(f"\nCOCO's evaluation of simulated detectors, {sets} data sets of {IMAGES} images a row")
    print("(half-lengths in AP):\n")
    print("| detector, runs, SD of quality over seeds | true difference | covered | half-length "
          "| first: covered | half-length |\n|---|---|---|---|---|---|")  # fmt: skip
    truths: Dict[tuple, float] = {}
    for kind, runs, spread in SCENARIOS:
        if (kind, spread) not in truths:
            truths[kind, spread] = true_difference(kind, spread)
        truth = truths[kind, spread]
        found = simulate(kind, runs, spread, truth, sets)
        print(
            f"| {kind}, {runs[0]} vs {runs[1]}, {spread} | {truth:.2f} | {found['covered']:.1%} "
            f"| {found['length']:.2f} | {found['old']:.1%} | {found['old length']:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repetitions", type=int, default=4000, help="simulated intervals a row")
    parser.add_argument(
        "--sets", type=int, default=200, help="simulated data sets of detectors a row; 0: none"
    )
    args = parser.parse_args()
    print_coverage(args.repetitions)
    print_looks(args.repetitions)
    print_power(args.repetitions)
    if args.sets:
        print_detectors(args.sets)


if __name__ == "__main__":
    main()
