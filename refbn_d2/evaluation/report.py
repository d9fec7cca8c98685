"""Writes a comparison as report.json, report.md and report.html: all three or none."""

import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from .. import __version__
from ..errors import UserError
from ..io.lock import folder_lock
from .ap import METRICS
from .comparison import Comparison
from .html import html
from .interval import CONFIDENCE, EFFECT, POWER
from .markdown import markdown
from .pictures import pictures
from .text import model_text

__all__ = ["as_json", "check_output", "write_report"]

_PREFIX = ".report-"  # of the name of the temporary folder in which a report is made


def as_json(comparison: Comparison, notes: Sequence[str] = ()) -> Dict[str, Any]:
    """The content of report.json; AP in percent, None where there is nothing to measure.

    Args:
        comparison: Result of ``comparison.compare``.
        notes: Sentences about what the report could not show.
    """
    gt = comparison.gt
    content = {
        "meta": {
            "refbn_d2": __version__,
            "ground_truth": str(gt.path),
            "images": len(gt.sizes),
            "iou_types": comparison.iou_types,
            "baseline": comparison.baseline,
            "primary": comparison.primary,
            "margin": comparison.margin,
            "cluster": comparison.cluster,
            "resamples": comparison.resamples,
            "seed": comparison.seed,
            "confidence": CONFIDENCE,
            "seeds_needed_for": {"AP": EFFECT, "power": POWER, "alpha": 1 - CONFIDENCE},
            "model": model_text(comparison),
        },
        "runs": {label: _run_entry(comparison, label) for label in comparison.groups},
        "verdicts": {label: comparison.verdict(label).value for label in comparison.differences},
        "deltas": {label: comparison.delta_table(label) for label in comparison.differences},
        "categories": {
            label: {
                iou_type: {gt.categories[key]: ap for key, ap in g.category_means(iou_type).items()}
                for iou_type in comparison.iou_types
            }
            for label, g in comparison.groups.items()
        },
        "warnings": comparison.warnings,
        "notes": list(notes),
        "failed": [_plain(asdict(run)) for run in comparison.failed],
    }
    return _without_nan(content)


def _run_entry(comparison: Comparison, label: str) -> Dict[str, Any]:
    group = comparison.groups[label]
    entry: Dict[str, Any] = {
        iou_type: {metric: group.mean(iou_type, metric) for metric in METRICS}
        for iou_type in comparison.iou_types
    }
    entry["compared_with"] = group.baseline
    entry["seeds"] = [
        {
            **_plain(asdict(run)),
            "images_with_detections": group.scores[comparison.primary][n].detected_images,
            **{t: group.scores[t][n].table for t in comparison.iou_types},
        }
        for n, run in enumerate(group.runs)
    ]
    return entry


def _plain(entry: Dict[str, Any]) -> Dict[str, Any]:
    return {
        k: str(v) if isinstance(v, Path) else v for k, v in entry.items() if v not in (None, "")
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def check_output(folder: Path) -> None:
    """Raises UserError, before any work, if a report cannot be written to ``folder``."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output {folder}: {parent} is not a folder one can write to")


def write_report(comparison: Comparison, folder: Path, images: Optional[Path] = None) -> List[Path]:
    """Writes the three files.

    They are first written under other names, and renamed when all are complete.

    Args:
        comparison: Result of ``comparison.compare``.
        folder: Folder for the report, created if needed; an older report in it is replaced.
        images: Folder of the data set's images, to draw some of them.

    Returns:
        Paths of the files.
    """
    drawn, notes = pictures(comparison, images)
    content = as_json(comparison, notes)
    texts = {
        "report.json": json.dumps(content, indent=1, allow_nan=False) + "\n",
        "report.md": markdown(comparison, notes),
        "report.html": html(comparison, notes, drawn),
    }
    with folder_lock(folder):
        for leftover in folder.glob(f"{_PREFIX}*"):  # left by a process that was killed
            shutil.rmtree(leftover)
        _write(texts, folder)
    return [folder / name for name in texts]


def _write(texts: Dict[str, str], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=_PREFIX) as partial:
        for name, text in texts.items():
            Path(partial, name).write_text(text, encoding="utf-8")
        for name in texts:
            os.replace(Path(partial, name), folder / name)
