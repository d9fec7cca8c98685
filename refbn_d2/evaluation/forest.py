"""Forest plots: one row per difference, with its interval, beside the line of no difference.

Positions are in percent of the plot's width, so that the page can draw it at any width and with its
own text.
"""

import math
from typing import Any, Dict, List, NamedTuple, Sequence

from matplotlib.ticker import MaxNLocator

from .interval import Difference
from .text import bounds, signed

__all__ = ["Row", "forest"]


class Row(NamedTuple):
    """One difference to show.

    Attributes:
        label: Names of what is compared.
        difference: In percent AP.
        simultaneous: Whether the interval holds for all comparisons of a report together.
        words: Text behind the numbers, such as a verdict.
        mark: Sign for this text.
    """

    label: str
    difference: Difference
    simultaneous: bool = False
    words: str = ""
    mark: str = ""


def forest(rows: Sequence[Row], margin: float = 0.0) -> Dict[str, Any]:
    """Lays out a plot.

    Args:
        rows: Rows from top to bottom. If a norm has one run, the interval is that of its
            checkpoints, and is drawn dashed.
        margin: Half-width of the band of differences that do not matter in practice; 0: no band.

    Returns:
        {"rows", "ticks", "zero", "band"}; positions are in percent of the width.
    """
    shown = [_interval(row) for row in rows]
    values = [0.0, -margin, margin]
    for row, (interval, _) in zip(rows, shown):
        values += [v for v in (row.difference.delta, *(interval or ())) if math.isfinite(v)]
    low, high = min(values), max(values)
    space = 0.06 * (high - low) or 1.0
    low, high = low - space, high + space

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    laid_out: List[Dict[str, Any]] = []
    for row, (interval, given) in zip(rows, shown):
        delta = row.difference.delta
        entry: Dict[str, Any] = {
            "label": row.label, "words": row.words, "mark": row.mark, "given": given,
            "delta": signed(delta), "interval": bounds(interval),
            "at": place(delta) if math.isfinite(delta) else None, "left": None, "right": None,
        }  # fmt: skip
        if interval:
            entry.update(left=place(interval[0]), right=place(interval[1]))
        laid_out.append(entry)
    ticks = [t for t in MaxNLocator(5).tick_values(low, high) if low < t < high]
    return {
        "rows": laid_out,
        "ticks": [(place(t), f"{t:g}".replace("-", "−")) for t in ticks],
        "zero": place(0),
        "band": (place(-margin), place(margin)) if margin else None,
    }


def _interval(row: Row):
    """The interval to draw, and whether it is for these checkpoints only."""
    d = row.difference
    interval = d.interval(simultaneous=row.simultaneous)
    if interval is None and 1 in d.runs and d.se_images > 0:
        return d.checkpoint_interval(simultaneous=row.simultaneous), True
    return interval, False
