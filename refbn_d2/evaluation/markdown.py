"""report.md: a table like the paper's Table 3, with differences and their intervals."""

import re
from typing import List, Sequence

from .columns import PAPER_TABLE, columns, paper_applies
from .comparison import Comparison
from .printable import printable
from .text import (
    SEEDS_LEAD,
    TITLES,
    interval,
    model_text,
    number,
    p_value,
    seed_lines,
    signed,
    verdicts,
)

__all__ = ["markdown"]

# What begins HTML or markup inside a line, and at the beginning of a line.
_MARKUP = re.compile(r"[\\`*|$~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|^[-+#](?=[\s#])|^>")
_NUMBERED = re.compile(r"^(\d+)(?=[.)]\s)")
_HTML = re.compile(r"<(?=[A-Za-z!/?])|&(?=#?\w)")


def markdown(comparison: Comparison, notes: Sequence[str] = ()) -> str:
    """The report as Markdown.

    Args:
        comparison: Result of ``comparison.compare``.
        notes: Sentences about what the report could not show.
    """
    sections = [f"# Norms compared with {_plain(comparison.baseline)}", _bullets(comparison)]
    sections.append(_table(comparison))
    if len(comparison.differences):
        sections += ["## p-values", _p_table(comparison)]
        sections += [
            "## Seeds",
            SEEDS_LEAD,
            "\n".join(f"* {_plain(line)}" for line in seed_lines(comparison)),
        ]
    if paper_applies(comparison):
        sections += ["## The paper's own Table 3", _paper_table()]
    if notes:
        sections += ["## Notes", "\n".join(f"* {_plain(text)}" for text in notes)]
    if comparison.failed:
        sections += ["## Runs without results", _failed(comparison)]
    sections += ["## What the interval means", _plain(model_text(comparison))]
    return "\n\n".join(sections) + "\n"


def _plain(text: str) -> str:
    """Markdown that shows ``text`` unchanged, even if a name in it looks like markup."""
    text = _MARKUP.sub(lambda m: f"\\{m[0]}", printable(text))
    text = _NUMBERED.sub(r"\1\\", text)
    return _HTML.sub(lambda m: {"<": "&lt;", "&": "&amp;"}[m[0]], text)


def _bullets(comparison: Comparison) -> str:
    lines = [f"* {v['mark']} {_plain(v['text'])}" for v in verdicts(comparison)]
    lines = lines or ["There is nothing to compare with the baseline."]
    return "\n".join(lines + [f"* Warning: {_plain(text)}" for text in comparison.warnings])


def _rows(header: List[str], rows: List[List[str]]) -> str:
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in [header, *rows]]
    lines.insert(1, "|---" + "|---:" * (len(header) - 1) + "|")
    return "\n".join(lines)


def _titles(comparison: Comparison) -> List[str]:
    return [f"{m} {TITLES[t]}" for t, m in columns(comparison)]


def _table(comparison: Comparison) -> str:
    rows = []
    for label, group in comparison.groups.items():
        count = f"{len(group.runs)} run" + "s" * (len(group.runs) > 1)
        values = [number(group.mean(t, m)) for t, m in columns(comparison)]
        rows.append([f"{label} ({count})", *values])
        if group.baseline:
            found = comparison.differences[label]
            differences = [found[t][m] for t, m in columns(comparison)]
            cells = [f"{signed(d.delta)} {interval(d)}".strip() for d in differences]
            rows.append([f"{label} − {comparison.baseline}", *cells])
    return _rows(["norm", *_titles(comparison)], rows)


def _p_table(comparison: Comparison) -> str:
    rows = []
    for label in comparison.differences:
        cells = []
        for t, m in columns(comparison):
            d = comparison.differences[label][t][m]
            cells.append(f"{p_value(d.p)} ({p_value(d.p_adjusted)})")
        rows.append([label, *cells])
    caption = "In brackets after Bonferroni's correction for the comparisons of one metric.\n\n"
    return caption + _rows(["norm", *_titles(comparison)], rows)


def _paper_table() -> str:
    header = ["norm"] + [f"{m} {t}" for t in ("box", "mask") for m in ("AP", "AP50", "AP75")]
    rows = [[name, *map(number, values)] for name, values in PAPER_TABLE.items()]
    return (
        "Mask R-CNN, ResNet-50-C4, COCO 2017, single runs, as published. The training, and perhaps "
        "the data, differ from those above, so the numbers are not directly comparable.\n\n"
    ) + _rows(header, rows)


def _failed(comparison: Comparison) -> str:
    rows = []
    for run in comparison.failed:
        where = f"{run.name}, seed {run.seed}" + (f", {run.condition}" if run.condition else "")
        rows.append(f"* {_plain(f'{where}: {run.error}')}")
    return "\n".join(rows)
