"""report.html: everything on one page, readable without network, scripts or colour."""

import math
from pathlib import Path
from typing import Any, Dict, List, Sequence

import jinja2

from . import plots
from .comparison import Comparison, Group
from .printable import printable
from .text import (
    PAPER_TABLE,
    SEEDS_LEAD,
    TITLES,
    columns,
    interval,
    model_text,
    number,
    p_value,
    paper_applies,
    seed_lines,
    signed,
    verdicts,
)

__all__ = ["html"]

_CATEGORY_ROWS = 12  # each way, in a chart; the table below it has all of them


def html(
    comparison: Comparison,
    notes: Sequence[str] = (),
    pictures: Sequence[Dict[str, Any]] = (),
) -> str:
    """The page.

    Args:
        comparison: what is shown.
        notes: sentences on what a reader must know beside the numbers.
        pictures: of ``pictures.pictures``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_as_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        verdicts=verdicts(comparison),
        columns=[f"{m} {TITLES[t]}" for t, m in columns(comparison)],
        rows=_rows(comparison),
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
        categories=_categories(comparison, comparison.clearest()),
        pictures=pictures,
        notes=notes,
        paper=PAPER_TABLE if paper_applies(comparison) else None,
    )


def _rows(comparison: Comparison) -> List[Dict[str, Any]]:
    rows = []
    for label, group in comparison.groups.items():
        cells = []
        for t, m in columns(comparison):
            cell = {"value": number(group.mean(t, m)), "delta": "", "interval": "", "p": ""}
            if group.baseline:
                d = comparison.differences[label][t][m]
                cell.update(
                    delta=signed(d.delta),
                    interval=interval(d),
                    p="" if math.isnan(d.p) else f"p {p_value(d.p)} ({p_value(d.p_adjusted)})",
                )
            cells.append(cell)
        rows.append({"group": group, "cells": cells})
    return rows


def _as_text(value: Any) -> Any:
    """Whatever the template shows; figures are Markup, all other text a user may have written."""
    return printable(value) if type(value) is str else value


def _by_condition(comparison: Comparison) -> List[List[Group]]:
    found: Dict[str, List[Group]] = {}
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


def _categories(comparison: Comparison, groups: List[Group]) -> List[Dict[str, Any]]:
    found = []
    for group in groups:
        base = comparison.groups[group.baseline]
        for t in comparison.iou_types:
            a, b = base.category_means(t), group.category_means(t)
            rows = [(comparison.gt.categories[k], a[k], b[k]) for k in a if a[k] == a[k]]
            rows.sort(key=lambda row: row[1] - row[2])
            bars = [(name, y - x) for name, x, y in rows]
            if len(bars) > 2 * _CATEGORY_ROWS:
                bars = bars[:_CATEGORY_ROWS] + bars[-_CATEGORY_ROWS:]
            title = f"{group.label} − {base.name}, {TITLES[t]}"
            if not rows:
                continue
            found.append(
                {
                    "title": title,
                    "cut": len(rows) - len(bars),
                    "svg": plots.category_bars(bars, f"per category: {title}"),
                    "rows": [(n, number(x), number(y), signed(y - x)) for n, x, y in rows],
                }
            )
    return found
