"""Learning curves of classifiers: accuracy over training steps, with a band over seeds."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from ..errors import UserError
from ..io import yaml as plain_yaml
from .plots import COLORS, LINES, MARKERS

__all__ = ["ClassifierRun", "TEST", "TRAIN", "figure", "find_classifier_runs", "rows", "steps_to"]

# Keys of metrics.json, errors in percent.
TRAIN, TEST = "train/top1_error", "classification/top1_error"
TOP5 = {TRAIN: "train/top5_error", TEST: "classification/top5_error"}
_TITLES = {TRAIN: "training images", TEST: "test images"}
_WINDOW = 100  # number of steps over which a point of a training curve is the mean


@dataclass(frozen=True)
class ClassifierRun:
    """One training run of a classifier.

    Attributes:
        norm: Name of the norm; "none" for a network without a norm.
        max_iter: Number of steps of the whole training.
        curves: key of metrics.json -> (n, 2) float64, steps taken and error in percent.
    """

    norm: str
    folder: Path
    max_iter: int
    curves: Dict[str, np.ndarray] = field(repr=False)


def find_classifier_runs(folders: Sequence[Path]) -> Dict[str, List[ClassifierRun]]:
    """The runs in and below ``folders``, by norm, in the order in which norms first appear.

    Raises:
        UserError: If there are no runs, if one is damaged, or if they differ in network, schedule
            or data.
    """
    files = [f for folder in folders for f in sorted(folder.rglob("config.yaml"))]
    if not files:
        raise UserError(f"{', '.join(map(str, folders))}: no config.yaml of a run in or below")
    groups: Dict[str, List[ClassifierRun]] = {}
    settings: Optional[Tuple] = None
    for file in files:
        run, found = _read(file)
        if settings is not None and found != settings:
            raise UserError(
                f"{file.parent} and {files[0].parent} differ in more than norm and seed: {found} "
                f"and {settings}"
            )
        settings = found
        groups.setdefault(run.norm, []).append(run)
    return groups


def _read(file: Path) -> Tuple[ClassifierRun, Tuple]:
    try:
        cfg = plain_yaml.read(str(file))
        model, solver = cfg["MODEL"], cfg["SOLVER"]
        own = model["META_ARCHITECTURE"] == "TorchvisionClassifier"
        norm = (model["CLASSIFIER"] if own else model["RESNETS"])["NORM"]
        network = model["CLASSIFIER"]["NETWORK"] if own else model["META_ARCHITECTURE"]
        schedule = {k: solver[k] for k in ("MAX_ITER", "IMS_PER_BATCH", "BASE_LR")}
        settings = network, tuple(cfg["DATASETS"]["TRAIN"]), tuple(schedule.items())
    except (KeyError, TypeError) as e:
        raise UserError(f"{file}: not the config of a classifier's run ({e!r})") from None
    curves = _curves(file.parent / "metrics.json", schedule["MAX_ITER"])
    if not len(curves[TRAIN]) and not len(curves[TEST]):
        raise UserError(f"{file.parent}: metrics.json has no errors of a classifier")
    run = ClassifierRun(norm or "none", file.parent, schedule["MAX_ITER"], curves)
    return run, settings


def _curves(path: Path, max_iter: int) -> Dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path}: does not exist; is the run still at its beginning?")
    points: Dict[str, Dict[int, float]] = {k: {} for k in (*TOP5, *TOP5.values())}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            # Iterations count from 0, but the evaluation after the last one is logged as max_iter.
            step = min(entry["iteration"] + 1, max_iter)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # the last line of an interrupted run may be cut off
        for key, values in points.items():
            value = entry.get(key)
            if isinstance(value, (int, float)) and math.isfinite(value):
                values[step] = value  # a resumed run repeats steps
    return {k: np.array(sorted(v.items()), float).reshape(-1, 2) for k, v in points.items()}


def _smooth(curve: np.ndarray, key: str) -> np.ndarray:
    """Averages a training curve over _WINDOW steps; points of test curves are means already."""
    if key != TRAIN or len(curve) < 2:
        return curve
    size = max(1, round(_WINDOW / np.median(np.diff(curve[:, 0]))))
    # Rounded, because the mean of equal numbers can be slightly larger than the numbers.
    mean = np.round(np.convolve(curve[:, 1], np.ones(size) / size, "valid"), 9)
    return np.column_stack([curve[size - 1 :, 0], mean])


def steps_to(run: ClassifierRun, key: str, accuracy: float) -> float:
    """First step at which the curve is at ``accuracy`` percent or above; infinity if never."""
    curve = _smooth(run.curves[key], key)
    reached = curve[100 - curve[:, 1] >= accuracy, 0]
    return float(reached[0]) if len(reached) else math.inf


def _final(run: ClassifierRun, key: str) -> float:
    """Error at the end of training, in percent; of the training images over the last 5 %."""
    curve = run.curves[key]
    if not len(curve):
        return math.nan
    if key.startswith("train/"):
        curve = curve[curve[:, 0] > run.max_iter * 0.95] if len(curve) > 20 else curve[-1:]
    return float(curve[:, 1].mean()) if key.startswith("train/") else float(curve[-1, 1])


def _spread(values: Sequence[float], digits: int) -> str:
    """Median and range."""

    def text(x: float) -> str:
        return "not reached" if math.isinf(x) else f"{x:,.{digits}f}"

    if any(math.isnan(v) for v in values):
        return "–"
    # With an even number of values, the median may lie between a number and infinity.
    ordered = sorted(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    median = text((low + high) / 2)
    if ordered[0] == ordered[-1]:
        return median
    return f"{median} ({text(ordered[0])} to {text(ordered[-1])})"


def rows(
    groups: Dict[str, List[ClassifierRun]], accuracies: Sequence[float]
) -> Tuple[List[str], List[List[str]]]:
    """The table: its header, and one row per norm with median and range over its runs."""
    keys = [k for k in TOP5 if any(len(r.curves[k]) for g in groups.values() for r in g)]
    short = {TRAIN: "train", TEST: "test"}
    header = ["norm", "runs"]
    for key in keys:
        header += [f"{short[key]} top-1 error (%)", f"{short[key]} top-5 error (%)"]
        header += [f"steps to {a:g} % ({short[key]})" for a in accuracies]
    table = []
    for norm, runs in groups.items():
        row = [norm, str(len(runs))]
        for key in keys:
            row += [_spread([_final(r, k) for r in runs], 2) for k in (key, TOP5[key])]
            row += [_spread([steps_to(r, key, a) for r in runs], 0) for a in accuracies]
        table.append(row)
    return header, table


def figure(groups: Dict[str, List[ClassifierRun]], accuracies: Sequence[float]) -> Figure:
    """Median over seeds of the accuracy, with their range as a band; panels for training and test.

    The axis is the logarithm of the distance from 100 %, so that differences late in training are
    as visible as early ones.
    """
    keys = [
        k for k in (TRAIN, TEST) if any(len(r.curves[k]) > 1 for g in groups.values() for r in g)
    ]
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False}):
        result = Figure(figsize=(4.6 * len(keys), 3.6), dpi=110, layout="constrained")
        axes = result.subplots(1, len(keys), squeeze=False, sharey=True)[0]
        lowest = 100.0
        for ax, key in zip(axes, keys):
            for k, (norm, runs) in enumerate(groups.items()):
                curves = [_smooth(r.curves[key], key) for r in runs if len(r.curves[key])]
                if not curves:
                    continue
                steps = sorted(set.intersection(*(set(c[:, 0]) for c in curves)))
                errors = np.array([c[np.isin(c[:, 0], steps), 1] for c in curves])
                errors = np.maximum(errors, 0.01)  # 0 cannot be shown on a log scale
                lowest = min(lowest, errors.min())
                style = {"color": COLORS[k % len(COLORS)]}
                ax.fill_between(steps, errors.min(0), errors.max(0), alpha=0.2, lw=0, **style)
                ax.plot(
                    steps,
                    np.median(errors, axis=0),
                    LINES[k % len(LINES)],
                    marker=MARKERS[k % len(MARKERS)],
                    markevery=max(1, len(steps) // 12),
                    markersize=4,
                    linewidth=1.4,
                    label=f"{norm} ({len(curves)} {'run' if len(curves) == 1 else 'runs'})",
                    **style,
                )
            for a in accuracies:
                ax.axhline(100 - a, color="black", linewidth=0.6, linestyle=":")
            ax.set(title=_TITLES[key], xlabel="step")
            ax.spines["right"].set_visible(False)
        axes[0].set_ylabel("accuracy (%)")
        axes[0].set_yscale("log")
        axes[0].invert_yaxis()
        axes[0].set_ylim(100, lowest * 0.8)
        ticks = [0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9]
        ticks = [t for t in ticks if 100 - t >= lowest * 0.8]
        axes[0].yaxis.set_major_locator(FixedLocator([100 - t for t in ticks]))
        axes[0].yaxis.set_minor_locator(NullLocator())
        axes[0].set_yticklabels([f"{t:g}" for t in ticks])
        axes[-1].legend(frameon=False, loc="best")
    return result
