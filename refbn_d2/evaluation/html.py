"""report.html: the whole report on one page that needs no network, scripts or colour."""

import math
from pathlib import Path
from typing import Any, Dict, List, Sequence

import jinja2
import numpy as np

from . import plots
from .ap import ERRORS, METRICS, Evaluation
from .columns import PAPER_TABLE, columns, paper_applies
from .comparison import Comparison, NormRuns
from .forest import Row, forest
from .interval import Difference, difference
from .printable import printable
from .text import (
    MARKS,
    SEEDS_LEAD,
    TITLES,
    bounds,
    interval,
    model_text,
    number,
    p_value,
    seed_lines,
    signed,
    verdicts,
)

__all__ = ["html"]

_CATEGORY_ROWS = 12  # gains, and as many losses, in a chart; the table below it has all categories


def html(
    comparison: Comparison,
    notes: Sequence[str] = (),
    pictures: Sequence[Dict[str, Any]] = (),
) -> str:
    """The page.

    Args:
        comparison: The comparison to show.
        notes: Sentences that a reader must know besides the numbers.
        pictures: Result of ``pictures.pictures``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_as_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    clearest = comparison.clearest()
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        verdicts=verdicts(comparison),
        forest=_verdict_forest(comparison),
        legend=plots.legend(comparison),
        columns=[f"{m} {TITLES[t]}" for t, m in columns(comparison)],
        rows=_rows(comparison),
        p_values=_p_values(comparison),
        metrics=[_metrics(comparison, group) for group in clearest],
        categories=_categories(comparison, clearest),
        errors=[_errors(comparison, t) for t in comparison.iou_types],
        seeds_lead=SEEDS_LEAD,
        seed_lines=seed_lines(comparison),
        model=model_text(comparison),
        seeds=[plots.ap_per_seed(comparison, t) for t in comparison.iou_types],
        conditions=[f for t in comparison.iou_types for f in plots.ap_by_condition(comparison, t)],
        training=[
            f
            for groups in _by_condition(comparison)
            for f in plots.training_curves(comparison, groups)
        ],
        curves=_precision_recall(comparison),
        pictures=pictures,
        notes=notes,
        paper=PAPER_TABLE if paper_applies(comparison) else None,
    )


def _verdict_forest(comparison: Comparison) -> Dict[str, Any]:
    rows = []
    for label in comparison.differences:
        verdict = comparison.verdict(label)
        d = comparison.primary_difference(label)
        rows.append(Row(label, d, True, verdict.value, MARKS[verdict]))
    return forest(rows, comparison.margin)


def _rows(comparison: Comparison) -> List[Dict[str, Any]]:
    rows = []
    for label, group in comparison.groups.items():
        cells = []
        for t, m in columns(comparison):
            cell = {"value": number(group.mean(t, m)), "delta": "", "interval": ""}
            if group.baseline:
                d = comparison.differences[label][t][m]
                cell.update(delta=signed(d.delta), interval=interval(d))
            cells.append(cell)
        rows.append({"group": group, "cells": cells})
    return rows


def _p_values(comparison: Comparison) -> List[List[str]]:
    rows = []
    for label, tables in comparison.differences.items():
        found = [tables[t][m] for t, m in columns(comparison)]
        rows.append([label, *(f"{p_value(d.p)} ({p_value(d.p_adjusted)})" for d in found)])
    return rows


def _metrics(comparison: Comparison, group: NormRuns) -> Dict[str, Any]:
    """All six metrics of one comparison: by IoU threshold and by size of the objects."""
    table = comparison.differences[group.label]
    rows = [Row(f"{TITLES[t]} {m}", table[t][m]) for t in comparison.iou_types for m in METRICS]
    return {"title": f"{group.label} − {comparison.baseline}", "forest": forest(rows)}


def _errors(comparison: Comparison, iou_type: str) -> Dict[str, Any]:
    """The loss of AP by each type of error, for each norm, and the calibration of the scores."""

    def values(group: NormRuns) -> List[np.ndarray]:
        scores = group.scores[iou_type]
        return [
            *(np.array([s.errors[name] for s in scores]) for name in ERRORS),
            np.array([s.calibration for s in scores]),
        ]

    rows = []
    for group in comparison.groups.values():
        own = base = values(group)
        paired = False
        if group.baseline:
            base = values(comparison.groups[group.baseline])
            paired = group.paired_with(comparison.groups[group.baseline])
        cells = []
        for a, b in zip(base, own):
            cell = {"value": number(float(b.mean())), "delta": "", "interval": ""}
            if group.baseline:
                d = _over_seeds(a, b, paired)
                cell.update(delta=signed(d.delta), interval=bounds(d.ci95))
            cells.append(cell)
        rows.append({"group": group, "cells": cells})
    return {"title": TITLES[iou_type], "rows": rows}


def _over_seeds(base: np.ndarray, other: np.ndarray, paired: bool) -> Difference:
    """The difference of two norms on these images only, which therefore add no variance."""
    given, given_other = (np.repeat(x[:, None], 2, axis=1) for x in (base, other))
    return difference(base, other, given, given_other, 2, paired=paired)


def _as_text(value: Any) -> Any:
    """Text that is safe to show, as users may have written it; figures (Markup) are unchanged."""
    return printable(value) if type(value) is str else value


def _by_condition(comparison: Comparison) -> List[List[NormRuns]]:
    found: Dict[str, List[NormRuns]] = {}
    for group in comparison.groups.values():
        found.setdefault(group.condition, []).append(group)
    return list(found.values())


def _precision_recall(comparison: Comparison) -> List[Dict[str, str]]:
    return [
        {
            "title": ", ".join(filter(None, (TITLES[t], groups[0].condition))),
            "svg": plots.precision_recall(comparison, groups, t),
        }
        for groups in _by_condition(comparison)
        for t in comparison.iou_types
    ]


def _categories(comparison: Comparison, groups: List[NormRuns]) -> List[Dict[str, Any]]:
    found = []
    for group in groups:
        base = comparison.base_of(group.label)
        for t in comparison.iou_types:
            rows = _category_rows(comparison, base, group, t)
            if not rows:
                continue
            ends = rows
            if len(rows) > 2 * _CATEGORY_ROWS:
                ends = rows[:_CATEGORY_ROWS] + rows[-_CATEGORY_ROWS:]
            a, b = base.category_means(t), group.category_means(t)
            names = comparison.gt.categories
            table = {names[k]: (number(a[k]), number(b[k])) for k in names}
            found.append(
                {
                    "title": f"{group.label} − {base.name}, {TITLES[t]}",
                    "cut": len(rows) - len(ends),
                    "forest": forest(ends),
                    "rows": [
                        (r.label, *table[r.label], signed(r.difference.delta),
                         bounds(r.difference.ci95 or r.difference.checkpoint_interval()))
                        for r in rows
                    ],
                }
            )  # fmt: skip
    return found


def _category_rows(
    comparison: Comparison, base: NormRuns, other: NormRuns, iou_type: str
) -> List[Row]:
    """One row for each category, the largest gain first.

    A row is marked if its interval, which is simultaneous for all categories, excludes 0.
    """
    a, b = base.scores[iou_type], other.scores[iou_type]
    keys = [k for k in a[0].category_replicates if not math.isnan(a[0].categories[k])]
    paired = other.paired_with(base)
    rows = []
    for key in keys:
        x, y = (np.array([s.categories[key] for s in scores]) for scores in (a, b))
        d = difference(
            x, y, _replicates(a, key), _replicates(b, key), comparison.units,
            comparisons=len(keys), paired=paired,
        )  # fmt: skip
        clear = d.p_adjusted < 0.05
        mark = ("▲" if d.delta > 0 else "▼") if clear else ""
        rows.append(Row(comparison.gt.categories[key], d, mark=mark))
    return sorted(rows, key=lambda row: -row.difference.delta)


def _replicates(scores: Sequence[Evaluation], category: int) -> np.ndarray:
    return np.array([s.category_replicates[category] for s in scores])
