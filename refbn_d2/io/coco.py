"""Checks of boxes and masks in COCO format, which the libraries that read them do not make.

pycocotools allocates memory in proportion to the length of an outline, and writes beyond the end of
a mask whose runs have the wrong sum. detectron2 silently drops invalid polygons. A NaN may stop a
training run hours after the file was read.
"""

import os
import sys
from typing import TYPE_CHECKING, Any, List, Optional, Sequence, Tuple

import numpy as np

from .rle import rle_problem

if TYPE_CHECKING:
    from typing_extensions import TypeGuard

__all__ = ["box_problem", "is_file_name", "is_int", "is_number", "is_size", "masks_problem"]

# Maximum length of the outline of one polygon in pixels. pycocotools needs 40 bytes per pixel.
_MAX_OUTLINE = 10_000_000


def is_int(value: Any) -> "TypeGuard[int]":
    """Whether ``value`` is an integer but not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number but not a boolean."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def is_file_name(value: Any) -> bool:
    """Whether ``value`` is text that the operating system accepts as a file name."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def is_size(value: Any, size: Tuple[int, int]) -> bool:
    """Whether ``value`` is a list of two integers, [height, width], equal to ``size``."""
    return isinstance(value, list) and value == list(size) and all(map(is_int, value))


def box_problem(box: Any) -> str:
    """Returns why ``box`` is not a valid [x, y, width, height] in pixels, or '' if it is valid.

    x and y may be negative, because COCO also evaluates boxes that extend beyond the image.
    """
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return f"bbox {_short(box)} is not four finite numbers"
    if box[2] < 0 or box[3] < 0:
        return f"bbox {box} has a negative width or height"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def masks_problem(
    masks: Sequence[Any], sizes: Sequence[Tuple[int, int]]
) -> Optional[Tuple[int, str]]:
    """Finds the first mask that is invalid or does not fit its image.

    Args:
        masks: Masks as polygons, [[x, y, x, y, ...], ...] in pixels, or as RLE,
            {"size": [h, w], "counts": ...}, where counts is a list of runs or compressed (str or
            bytes).
        sizes: (height, width) of each mask's image, in pixels.

    Returns:
        (index of the mask, description of the problem), or None if every mask is valid.
    """
    compressed = []
    for n, (mask, size) in enumerate(zip(masks, sizes)):
        problem = _polygons_problem(mask) if isinstance(mask, list) else _runs_problem(mask, size)
        if problem:
            return n, problem
        if isinstance(mask, dict) and not isinstance(mask["counts"], list):
            compressed.append(n)
    counts = [masks[n]["counts"] for n in compressed]
    texts = [c.decode("latin1") if isinstance(c, bytes) else c for c in counts]
    found = rle_problem(texts, [sizes[n] for n in compressed])
    return found and (compressed[found[0]], found[1])


def _polygons_problem(polygons: List[Any]) -> str:
    for polygon in polygons:
        if not isinstance(polygon, list):
            return f"segmentation {_short(polygons)} is not a list of polygons"
        if len(polygon) < 4 or len(polygon) % 2:  # COCO reads two points as a box
            return f"polygon {_short(polygon)} is not x, y, x, y, ..."
        try:
            total, extent = float(sum(polygon)), float(max(polygon) - min(polygon))
        except (TypeError, OverflowError):
            total = None
        if not is_number(total):
            return f"polygon {_short(polygon)} is not all finite numbers"
        # The cheap upper bound comes first; it is small enough for nearly all polygons.
        if len(polygon) * extent > _MAX_OUTLINE and _outline(polygon) > _MAX_OUTLINE:
            return f"polygon {_short(polygon)} has an outline longer than {_MAX_OUTLINE} pixels"
    return ""


def _outline(polygon: List[float]) -> float:
    steps = np.diff(np.array(polygon, dtype=float).reshape(-1, 2), axis=0)
    return float(np.abs(steps).max(axis=1).sum())


def _runs_problem(mask: Any, size: Tuple[int, int]) -> str:
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), (str, bytes, list)):
        return (
            f"segmentation {_short(mask)} is neither a list of polygons nor "
            '{"size": [h, w], "counts": ...}'
        )
    if not is_size(mask.get("size"), size):
        return f"RLE of size {_short(mask.get('size'))}, its image is {list(size)}"
    runs = mask["counts"]
    if isinstance(runs, list):
        if not all(is_int(r) and r >= 0 for r in runs) or sum(runs) != size[0] * size[1]:
            return f"RLE counts {_short(runs)} do not add up to the image's {size[0] * size[1]}"
    return ""
