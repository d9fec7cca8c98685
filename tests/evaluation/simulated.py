"""Comparisons of simulated AP numbers, without data sets or detections."""

from pathlib import Path
from types import SimpleNamespace
from typing import Dict, Sequence

import numpy as np

from refbn_d2.evaluation.ap import METRICS
from refbn_d2.evaluation.comparison import Comparison, NormRuns
from refbn_d2.evaluation.runs import Run

IMAGES = 100


def comparison(
    norms: Dict[str, Sequence[float]], image_noise: float = 0.1, seed: int = 0, **changes
) -> Comparison:
    """The first norm is the baseline.

    Args:
        norms: name -> AP of each run, for boxes; masks have half of it.
        image_noise: SD of the resamples about a run's AP, the runs' own.
        changes: of the comparison's attributes.
    """
    rng = np.random.default_rng(seed)
    baseline = next(iter(norms))
    groups = {}
    for name, ap in norms.items():
        runs = [Run(name, n, Path(f"{name}{n}.json")) for n in range(1, len(ap) + 1)]
        scores = {
            t: [
                SimpleNamespace(
                    table=dict.fromkeys(METRICS, value / part),
                    replicates=rng.normal(value / part, image_noise, (40, len(METRICS))),
                )
                for value in ap
            ]
            for t, part in (("bbox", 1), ("segm", 2))
        }
        groups[name] = NormRuns(name, runs, None if name == baseline else baseline, scores)
    made = Comparison(
        gt=SimpleNamespace(sizes={n: (9, 9) for n in range(IMAGES)}, dataset={"images": []}),
        iou_types=["bbox", "segm"],
        baseline=baseline,
        resamples=40,
        seed=0,
        groups=groups,
        differences={},
        failed=[],
        primary="bbox",
        units=IMAGES,
    )
    for key, value in changes.items():
        setattr(made, key, value)
    return made.with_first_runs(max(map(len, norms.values())))
