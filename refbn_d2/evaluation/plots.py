"""The report's figures as inline SVG, with the text colour of the page.

Series differ by marker and line style as well as by colour, so they are distinct in a grey print.
"""

import io
import itertools
import re
from html import escape
from typing import Any, Dict, List, Sequence, Tuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .comparison import Comparison, NormRuns
from .printable import printable
from .runs import training_log
from .text import TITLES

__all__ = ["ap_by_condition", "ap_per_seed", "legend", "precision_recall", "training_curves"]

_INK = "#010203"  # replaced by the page's text colour when the SVG is written
_WIDTH = 5.2  # inches; the SVG scales with the page
# These colours are visible on a dark page and on a light one.
COLORS = ["#8c8c8c", "#2f86d6", "#d9772b", "#2a9d6f", "#b65fc2", "#b08d12", "#cf4f5f", "#5f77d8"]
MARKERS = "osD^vPX*"
LINES = ["-", "--", "-.", ":"]
# The same markers and lines in the legend of the page.
_GLYPHS = dict(zip(MARKERS, "●■◆▲▼✚✖★"))
_DASHES = dict(zip(LINES, ("none", "6 3", "6 3 1.5 3", "1.5 2.5")))
_RC: Dict[Any, Any] = {  # matplotlib's type of the keys differs by version
    "text.parse_math": False,  # a "$" in a name does not begin a formula
    "svg.fonttype": "none",  # text remains text: small files, searchable, in the page's colour
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"{k}.color": _INK for k in ("text", "xtick", "ytick")},
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
}


def _figure(height: float, width_ratios: Sequence[int] = (1,)):
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(1, len(width_ratios), squeeze=False)[0]
    for ax in axes:
        ax.set_facecolor("none")
        ax.grid(True, color=_INK, alpha=0.15, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    title, buffer = printable(title), io.StringIO()
    # A separate salt makes ids unique within a page. Without a date the output is reproducible.
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (width|height)="[^"]*pt"', "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _drawn(function):
    def wrapped(*args, **kwargs):
        with matplotlib.rc_context(_RC):
            return function(*args, **kwargs)

    return wrapped


def _styles(comparison: Comparison) -> Dict[str, Tuple[str, str, str]]:
    """Name of a norm -> colour, marker and line style."""
    names = list(
        dict.fromkeys([comparison.baseline, *(g.name for g in comparison.groups.values())])
    )
    pool = zip(itertools.cycle(COLORS), itertools.cycle(MARKERS), itertools.cycle(LINES))
    return dict(zip(names, pool))


def _name(text: str) -> str:
    return printable(text, 60)


def legend(comparison: Comparison) -> List[Dict[str, str]]:
    """The style of each norm in all figures: {"name", "color", "marker", "dash"}."""
    return [
        {"name": name, "color": color, "marker": _GLYPHS[marker], "dash": _DASHES[line]}
        for name, (color, marker, line) in _styles(comparison).items()
    ]


@_drawn
def ap_per_seed(comparison: Comparison, iou_type: str) -> str:
    """One row for each norm and condition: a point for each seed, a bar for their mean."""
    groups = list(comparison.groups.values())
    figure, (ax,) = _figure(0.9 + 0.36 * len(groups))
    styles = _styles(comparison)
    for row, group in enumerate(groups):
        color, marker, _ = styles[group.name]
        ap = [s.table["AP"] for s in group.scores[iou_type]]
        ax.plot(ap, [row] * len(ap), marker, color=color, markersize=7, alpha=0.85, clip_on=False)
        ax.plot([np.mean(ap)] * 2, [row - 0.3, row + 0.3], color=_INK, linewidth=1.6)
    ax.set_yticks(range(len(groups)), [_name(g.label) for g in groups])
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.set_xlabel(f"{TITLES[iou_type]} AP")
    return _svg(figure, f"{TITLES[iou_type]} AP per seed")


@_drawn
def precision_recall(comparison: Comparison, groups: Sequence[NormRuns], iou_type: str) -> str:
    """Mean precision over categories and seeds by recall, at IoU 0.5 and 0.75."""
    figure, axes = _figure(2.9, (1, 1))
    styles, recall = _styles(comparison), np.linspace(0, 1, 101)
    for ax, (row, iou) in zip(axes, ((0, 0.5), (5, 0.75))):
        for group in groups:
            color, _, line = styles[group.name]
            curve = np.mean([s.precision[row] for s in group.scores[iou_type]], axis=0)
            ax.plot(recall, curve, line, color=color, linewidth=1.8)
        ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", title=f"IoU {iou}")
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes[0].set_ylabel("precision")
    return _svg(figure, f"precision by recall, {TITLES[iou_type]}, {groups[0].condition}")


@_drawn
def training_curves(comparison: Comparison, groups: Sequence[NormRuns]) -> List[str]:
    """Loss and AP by iteration: a line for the mean over runs, a band for their range."""
    styles = _styles(comparison)
    logs = [(g.name, [training_log(run.log) for run in g.runs if run.log]) for g in groups]
    figures = []
    for key, title in (("total_loss", "loss"), ("bbox/AP", "box AP"), ("segm/AP", "mask AP")):
        # A run that is evaluated only once, at the end, has no curve.
        found = [(name, [log[key] for log in own if len(log[key]) > 1]) for name, own in logs]
        curves = [(name, _together(runs)) for name, runs in found if runs]
        if not curves:
            continue
        figure, (ax,) = _figure(2.7)
        for name, (steps, values) in curves:
            color, marker, line = styles[name]
            ax.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
            dots = marker if len(steps) < 30 else None
            ax.plot(steps, values.mean(0), line, marker=dots, ms=4, color=color, lw=1.4)
        ax.set(xlabel="iteration", ylabel=title)
        ax.set_title(_name(groups[0].condition), fontsize=10.5)
        figures.append(_svg(figure, f"training: {title} {groups[0].condition}"))
    return figures


def _together(runs: Sequence[List[List[float]]]) -> Tuple[np.ndarray, np.ndarray]:
    """Curves of several runs at the steps of the first run, up to the end of the shortest.

    Returns:
        float64 (n,) and (runs, n).
    """
    curves = [np.array(sorted({step: value for step, value in run}.items())) for run in runs]
    end = min(curve[-1, 0] for curve in curves)
    steps = curves[0][curves[0][:, 0] <= end, 0]
    return steps, np.array([np.interp(steps, *curve.T) for curve in curves])


@_drawn
def ap_by_condition(comparison: Comparison, iou_type: str) -> List[str]:
    """AP by images per batch and by grouping, if the runs differ in these."""
    groups = list(comparison.groups.values())
    figures = []
    for axis, other, title in (
        ("ims_per_batch", "grouping", "images a batch"),
        ("grouping", "ims_per_batch", "grouping of batches (0 is i.i.d.)"),
    ):
        values = sorted({getattr(g.runs[0], axis) for g in groups} - {None})
        if len(values) < 2:
            continue
        panels = sorted({getattr(g.runs[0], other) for g in groups}, key=lambda v: (v is None, v))
        figure, axes = _figure(2.9, [1] * len(panels))
        for ax, panel in zip(axes, panels):
            _condition_panel(ax, comparison, iou_type, axis, other, panel)
            ax.set_xticks(range(len(values)), [f"{v:g}" for v in values])
            ax.set_xlim(-0.3, len(values) - 0.7)
            if len(panels) > 1:
                words = f"grouping {panel:g}" if other == "grouping" else f"{panel} images"
                ax.set_title("unknown" if panel is None else words)
            ax.sharey(axes[0])
        figure.supxlabel(title, fontsize=10.5)
        axes[0].set_ylabel(f"{TITLES[iou_type]} AP")
        figures.append(_svg(figure, f"{TITLES[iou_type]} AP by {title}"))
    return figures


def _condition_panel(ax, comparison: Comparison, iou_type, axis, other, panel) -> None:
    groups = list(comparison.groups.values())
    values = sorted({getattr(g.runs[0], axis) for g in groups} - {None})
    for name, (color, marker, line) in _styles(comparison).items():
        found = [
            (values.index(getattr(g.runs[0], axis)), g)
            for g in groups
            if g.name == name
            and getattr(g.runs[0], other) == panel
            and getattr(g.runs[0], axis) is not None
        ]
        found.sort(key=lambda pair: pair[0])
        means = [g.mean(iou_type, "AP") for _, g in found]
        ax.plot([x for x, _ in found], means, line, color=color, linewidth=1.6)
        for x, group in found:
            ap = [s.table["AP"] for s in group.scores[iou_type]]
            ax.plot([x] * len(ap), ap, marker, color=color, markersize=5, alpha=0.8)
