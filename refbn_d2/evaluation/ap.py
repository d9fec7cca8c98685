"""AP of one set of detections, on all images and on random subsets of them, computed by hotcoco."""

import contextlib
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Sequence

import hotcoco
import numpy as np

from .inputs import GroundTruth

__all__ = ["ERRORS", "METRICS", "Evaluation", "evaluate", "evaluate_all"]

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MAX_DETECTIONS = 100
# TIDE's types of error: wrong class, wrong position, both wrong, found twice, no object there,
# object not found.
ERRORS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
CATEGORY_SUBSETS = 200  # the standard error is then right within 5 %


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model. AP is in percent, and NaN where there is no object to find.

    Attributes:
        table: metric -> AP, the numbers that detectron2's COCOEvaluator prints.
        categories: category id -> AP.
        precision: float64 (10, 101), precision in 0..1 by IoU threshold 0.5..0.95 and recall 0..1,
            mean over the categories that have objects.
        replicates: float64 (subsets, len(METRICS)), the AP on each subset of the images.
        images: image id -> AP on that image alone at IoU 0.5, in 0..1, for images with an object
            or a detection.
        detected_images: Number of images with a detection.
        errors: type of error -> gain of AP at IoU 0.5 without errors of this type (Bolya et al.
            2020, TIDE).
        calibration: Expected calibration error of the scores at IoU 0.5, in percent.
        category_replicates: category id -> float64 (subsets,), AP on each of the first
            CATEGORY_SUBSETS subsets, for categories with objects.
    """

    table: Dict[str, float]
    categories: Dict[int, float]
    precision: np.ndarray
    replicates: np.ndarray
    images: Dict[int, float]
    detected_images: int
    errors: Dict[str, float]
    calibration: float
    category_replicates: Dict[int, np.ndarray]


def evaluate(
    gt: GroundTruth,
    detections: Sequence[Dict[str, Any]],
    iou_type: str,
    subsets: Sequence[Sequence[int]] = (),
    per_category: bool = False,
) -> Evaluation:
    """Scores ``detections``.

    Args:
        gt: Ground truth.
        detections: Detections from ``load_results``.
        iou_type: "bbox" or "segm".
        subsets: Image ids of each subset that is also scored.
        per_category: Whether to score each category separately on the subsets, too.
    """
    return evaluate_all(gt, detections, [iou_type], subsets, per_category)[iou_type]


def evaluate_all(
    gt: GroundTruth,
    detections: Sequence[Dict[str, Any]],
    iou_types: Sequence[str],
    subsets: Sequence[Sequence[int]] = (),
    per_category: bool = False,
) -> Dict[str, Evaluation]:
    """Scores ``detections`` for several iou types at the same time, each in its own thread.

    Args:
        gt, detections, subsets, per_category: As in :func:`evaluate`.
        iou_types: One or both of "bbox" and "segm".

    Returns:
        iou type -> scores.
    """
    with _quiet(), ThreadPoolExecutor() as pool:
        scores = pool.map(
            lambda iou_type: _evaluate(gt, detections, iou_type, subsets, per_category), iou_types
        )
        return dict(zip(iou_types, scores))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what hotcoco prints. It changes the whole process, so threads are started inside it."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # The recalls at 1 and 10 detections are left out on purpose.
        warnings.filterwarnings("ignore", message="hotcoco: max_dets differ")
        yield


def _evaluate(
    gt: GroundTruth,
    detections: Sequence[Dict[str, Any]],
    iou_type: str,
    subsets: Sequence[Sequence[int]],
    per_category: bool,
) -> Evaluation:
    # If a detection has a box, COCO takes its size from the box and not from the mask. Other fields
    # are left out, because their type might be one that hotcoco refuses.
    shape = ("bbox", "segmentation") if iou_type == "bbox" else ("segmentation",)
    fields = ("image_id", "category_id", "score", *shape)
    found = gt.coco.load_res([{k: d[k] for k in fields if k in d} for d in detections])
    scorer = hotcoco.COCOeval(gt.coco, found, iou_type)
    # Only AP is needed. Leaving out the recalls at 1 and 10 detections makes this 3 times faster.
    scorer.params.max_dets = [MAX_DETECTIONS]
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    slices = scorer.slice_by({str(n): list(ids) for n, ids in enumerate(subsets)})
    errors = scorer.tide_errors()["delta_ap"]
    assert scorer.eval is not None  # since accumulate()
    stats = dict(zip(scorer.metric_keys(), scorer.stats))
    # axes: IoU, recall, category, area range (the first: all), detections per image
    precision = _valid(np.asarray(scorer.eval["precision"])[:, :, :, 0, -1])
    summary = scorer.image_diagnostics(iou_thr=0.5)["img_summary"]
    return Evaluation(
        table={m: float(100 * _valid(stats[m])) for m in METRICS},
        categories={
            key: float(100 * precision[:, :, n].mean())
            for n, key in enumerate(scorer.params.cat_ids)
        },
        precision=_mean_over_categories(precision),
        replicates=_replicates(slices, len(subsets)),
        detected_images=len({d["image_id"] for d in detections}),
        errors={name: 100 * errors[name] for name in ERRORS},
        calibration=100 * scorer.calibration()["ece"],
        category_replicates=_by_category(gt, found, iou_type, subsets) if per_category else {},
        images={key: entry["ap"] for key, entry in summary.items() if _counts(entry)},
    )


def _by_category(
    gt: GroundTruth,
    found: hotcoco.COCO,
    iou_type: str,
    subsets: Sequence[Sequence[int]],
) -> Dict[int, np.ndarray]:
    names = {str(n): list(ids) for n, ids in enumerate(subsets[:CATEGORY_SUBSETS])}
    replicates = {}
    for category in sorted({a["category_id"] for a in gt.dataset["annotations"]}):
        scorer = hotcoco.COCOeval(gt.coco, found, iou_type)
        scorer.params.max_dets = [MAX_DETECTIONS]
        scorer.params.cat_ids = [category]
        # Without APs, APm and APl this takes a third of the time.
        scorer.params.area_rng, scorer.params.area_rng_lbl = [[0, 1e10]], ["all"]
        scorer.evaluate()
        slices = scorer.slice_by(names)
        ap = np.array([slices[name]["AP"] for name in names], dtype=float)
        replicates[category] = 100 * _valid(ap)
    return replicates


def _valid(value):
    """Replaces COCO's -1, which means that there is nothing to measure, by NaN."""
    return np.where(np.asarray(value) > -1, value, np.nan)


def _counts(entry: Dict[str, Any]) -> bool:
    return entry["tp"] + entry["fp"] + entry["fn"] > 0


def _mean_over_categories(precision: np.ndarray) -> np.ndarray:
    measured = ~np.isnan(precision).all(axis=(0, 1))
    if not measured.any():
        return np.full(precision.shape[:2], np.nan)
    return precision[:, :, measured].mean(axis=2)


def _replicates(slices: Dict[str, Dict[str, float]], count: int) -> np.ndarray:
    rows: List[List[float]] = [[slices[str(n)][m] for m in METRICS] for n in range(count)]
    return 100 * _valid(np.array(rows, dtype=float).reshape(count, len(METRICS)))
