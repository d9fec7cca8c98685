#!/usr/bin/env python3
"""Simulates data sets and detectors whose true difference is known, and counts how often the
interval of refbn_d2.evaluation covers it. Prints one Markdown row a scenario.

recall    every object is found with a probability that depends on the norm, the seed and the image,
          with a perfect box and without false positives. AP is then the recall on COCO's grid of
          101 points, so the true difference is 100 / 101 of the difference in probability.
detector  objects differ in difficulty, scores are informative, boxes are off, false positives
          are in between. The true difference is the mean over 4,000 other simulated data sets.
"""

import argparse
from pathlib import Path

import hotcoco
import numpy as np

from refbn_d2.evaluation.ap import METRICS, evaluate
from refbn_d2.evaluation.inputs import GroundTruth
from refbn_d2.evaluation.interval import difference, half_samples

IMAGES, CATEGORIES, SIDE = 200, 3, 400
TRUTH_SETS = 4000
# kind of detector, runs a norm (baseline, other), standard deviation of its quality over seeds
SCENARIOS = [
    ("recall", (1, 1), 0.0),
    ("recall", (2, 2), 0.02),
    ("recall", (3, 3), 0.0),
    ("recall", (3, 3), 0.02),
    ("recall", (5, 5), 0.0),
    ("recall", (5, 5), 0.02),
    ("recall", (5, 1), 0.02),
    ("detector", (1, 1), 0.0),
    ("detector", (3, 3), 0.0),
    ("detector", (3, 3), 0.15),
    ("detector", (5, 5), 0.0),
    ("detector", (5, 5), 0.15),
]


def scene(rng: np.random.Generator) -> dict:
    """Ground truth with 1 to 5 objects an image; "ease" is how easy each is to find."""
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


def simulate(kind, runs, spread, truth, sets, resamples):
    """Share of intervals that cover ``truth``, and their mean length."""
    covered, length, power = 0, [], 0
    for data_set in range(sets):
        rng = np.random.default_rng([data_set, *runs])
        world = scene(rng)
        gt = ground_truth(world)
        halves = half_samples(list(gt.sizes), resamples, data_set)
        norms = [
            [
                evaluate(
                    gt, RUN[kind](rng, world, seed_quality(rng, kind, n, spread)), "bbox", halves
                )
                for _ in range(runs[n])
            ]
            for n in (0, 1)
        ]
        ap = [np.array([r.table["AP"] for r in norm]) for norm in norms]
        column = METRICS.index("AP")
        replicates = [np.array([r.replicates[:, column] for r in norm]) for norm in norms]
        result = difference(*ap, *replicates, IMAGES)
        covered += result.ci95[0] <= truth <= result.ci95[1]
        length.append(result.ci95[1] - result.ci95[0])
        power += result.p < 0.05
    return covered / sets, float(np.mean(length)), power / sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sets", type=int, default=200, help="simulated data sets a scenario")
    parser.add_argument("--resamples", type=int, default=200)
    args = parser.parse_args()
    print(
        "| detector | runs | seed SD of quality | true difference | covered | length | p < 0.05 |"
    )
    print("|---|---|---|---|---|---|---|")
    truths = {}
    for kind, runs, spread in SCENARIOS:
        if (kind, spread) not in truths:
            truths[kind, spread] = true_difference(kind, spread)
        truth = truths[kind, spread]
        share, length, power = simulate(kind, runs, spread, truth, args.sets, args.resamples)
        print(
            f"| {kind} | {runs[0]} vs {runs[1]} | {spread} | {truth:.2f} | {share:.1%} "
            f"| {length:.2f} | {power:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
