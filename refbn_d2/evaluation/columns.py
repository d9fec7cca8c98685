"""The columns of the report's table, in report.md and report.html."""

from typing import List, Tuple

from .ap import METRICS
from .comparison import Comparison

__all__ = ["PAPER_TABLE", "columns", "paper_applies"]

# Table 3 of the paper (Luo et al. 2020): AP, AP50, AP75 of boxes, then of masks.
PAPER_TABLE = {
    "BN": (36.5, 56.8, 40.6, 32.4, 53.3, 34.3),
    "RefBN": (37.0, 56.8, 41.2, 32.5, 53.0, 34.7),
}


def columns(comparison: Comparison) -> List[Tuple[str, str]]:
    """(iou type, metric) of the paper's Table 3: AP, AP50, AP75 of boxes, then of masks."""
    return [(t, m) for t in comparison.iou_types for m in METRICS[:3]]


def paper_applies(comparison: Comparison) -> bool:
    """Whether the paper's own numbers belong beside the measured ones."""
    return {g.name for g in comparison.groups.values()} >= set(PAPER_TABLE)
