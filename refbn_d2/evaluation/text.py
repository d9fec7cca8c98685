"""The words and numbers that report.md and report.html share."""

import math
from typing import Dict, List, Optional

from .ap import METRICS
from .comparison import Comparison
from .interval import EFFECT, Difference

__all__ = [
    "PAPER_TABLE", "SEEDS_LEAD", "TITLES", "columns", "interval", "model_text", "number", "p_value",
    "paper_applies", "seed_lines", "signed", "verdicts",
]  # fmt: skip

TITLES = {"bbox": "box", "segm": "mask"}
ALPHA = 0.05
# Table 3 of the paper (SPEC: Luo et al. 2020): AP, AP50, AP75 of boxes, then of masks.
PAPER_TABLE = {
    "BN": (36.5, 56.8, 40.6, 32.4, 53.3, 34.3),
    "RefBN": (37.0, 56.8, 41.2, 32.5, 53.0, 34.7),
}


def columns(comparison: Comparison) -> List[tuple]:
    """(iou type, metric) of the paper's Table 3: AP, AP50, AP75 of boxes, then of masks."""
    return [(t, m) for t in comparison.iou_types for m in METRICS[:3]]


def number(value: Optional[float]) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def signed(value: Optional[float]) -> str:
    # A difference that rounds to zero has no sign to show.
    if value is None:
        return "–"
    rounded = round(value, 2)
    return f"{rounded:+.2f}".replace("-", "−") if rounded else "0.00"


def interval(d: Difference) -> str:
    return "" if d.ci95 is None else f"[{signed(d.ci95[0])}, {signed(d.ci95[1])}]"


def p_value(p: Optional[float]) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def paper_applies(comparison: Comparison) -> bool:
    """Whether the paper's own numbers belong beside the measured ones."""
    return {g.name for g in comparison.groups.values()} >= set(PAPER_TABLE)


def verdicts(comparison: Comparison) -> List[Dict[str, str]]:
    """One sentence a comparison and iou type on AP: {"label", "mark", "text"}."""
    found = []
    for label, tables in comparison.differences.items():
        for iou_type, table in tables.items():
            d, p = table["AP"], comparison.p_holm[label][iou_type]["AP"]
            word, mark = "cannot be told apart from", "≈"
            if p is not None and p < ALPHA:
                word, mark = ("is better than", "▲") if d.delta > 0 else ("is worse than", "▼")
            text = (
                f"{label} {word} {comparison.baseline} in {TITLES[iou_type]} AP: "
                f"{signed(d.delta)} {interval(d)}, p = {p_value(d.p)}, "
                f"{p_value(p)} after correction."
            ).replace("= <", "<")
            if d.se_seeds is None:
                text += " One run each: another training seed may say otherwise."
            found.append({"label": label, "mark": mark, "text": text})
    return found


SEEDS_LEAD = (
    f"Runs a norm that would detect a true difference of {EFFECT} AP (80 % power, 5 % level), by "
    "the spread of the seeds on these images:"
)


def seed_lines(comparison: Comparison) -> List[str]:
    """One sentence a comparison that continues SEEDS_LEAD."""
    lines = []
    for label, tables in comparison.differences.items():
        base = comparison.groups[comparison.groups[label].baseline]
        text = ", ".join(
            f"{table['AP'].seeds_needed or 'more than 10,000'} for {TITLES[t]} AP"
            for t, table in tables.items()
        )
        if next(iter(tables.values()))["AP"].se_seeds is None:
            text = "unknown with one run each, whose seed the interval does not cover"
        counts = f"{len(comparison.groups[label].runs)} against {len(base.runs)} now"
        lines.append(f"{label}: {text} ({counts}).")
    return lines


def model_text(comparison: Comparison) -> str:
    """The statistical model in one paragraph."""
    single = all(len(g.runs) == 1 for g in comparison.groups.values())
    seeds = (
        "There is one run a norm, so the training seed is NOT covered: another seed may well give "
        "a difference outside the interval. "
        if single
        else "The spread of AP over training seeds is added, less the part that the images already "
        "explain, with Welch-Satterthwaite degrees of freedom; a norm with a single run borrows "
        "the spread of the norm it is compared with, and where both have a single run the "
        "training seed is not covered. "
    )
    return (
        f"Each interval is a 95 % t-interval of other minus {comparison.baseline}, means over "
        f"seeds. Image sampling: all runs are scored on the same {comparison.resamples} random "
        f"halves of the {len(comparison.gt.sizes)} images (paired delete-half jackknife). "
        f"{seeds}"
        "p is two-sided and of the same t; the corrected p is Holm's over all comparisons of one "
        "metric in this report. Not covered: another data set, architecture, schedule or learning "
        "rate, and dependence between images."
    )
