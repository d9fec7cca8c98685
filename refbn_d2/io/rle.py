"""Vectorized checks of compressed COCO run-length masks."""

from typing import Optional, Sequence, Tuple

import numpy as np

__all__ = ["rle_problem"]

_CHUNK = 5000  # number of masks per step, which limits the memory for large files


def rle_problem(
    counts: Sequence[str], sizes: Sequence[Tuple[int, int]]
) -> Optional[Tuple[int, str]]:
    """Finds the first mask whose runs do not have the sum height * width of its image.

    pycocotools would decode such a mask into uninitialized or foreign memory. COCO writes a run as
    base-32 digits, lowest digit first, one character per digit: ASCII code 48 + digit, plus 32 if
    more digits follow. The bit with value 16 of the last digit is the sign. From the fourth run on,
    the number is the difference to the run two positions before.

    Args:
        counts: ``counts`` strings of the masks.
        sizes: (height, width) of each mask's image, in pixels.

    Returns:
        (index of the mask, description of the problem), or None if every mask is valid.
    """
    for begin in range(0, len(counts), _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        problem = _chunk_problem(counts[chunk], sizes[chunk])
        if problem:
            return begin + problem[0], problem[1]
    return None


def _chunk_problem(counts, sizes) -> Optional[Tuple[int, str]]:
    lengths = np.array([len(c) for c in counts])
    if (lengths == 0).any():
        return int(np.argmin(lengths)), "RLE without counts"
    encoded = "".join(counts).encode("utf-8", "replace")
    digits = np.frombuffer(encoded, np.uint8).astype(np.int64) - 48
    owner = np.repeat(np.arange(len(counts)), lengths)
    if len(digits) != lengths.sum() or digits.min() < 0 or digits.max() > 63:
        bad = next(n for n, c in enumerate(counts) if not all(48 <= ord(x) < 112 for x in c))
        return bad, "RLE counts have a character that COCO never writes"

    last = (digits & 32) == 0
    ends = np.cumsum(lengths) - 1
    if not last[ends].all():
        return int(np.argmin(last[ends])), "RLE counts are cut off"
    starts = np.r_[0, np.flatnonzero(last)[:-1] + 1]
    place = np.arange(len(digits)) - np.repeat(starts, np.diff(np.r_[starts, len(digits)]))
    if place.max() > 6:
        return int(owner[np.argmax(place)]), "RLE has a run longer than any image"
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    final = np.flatnonzero(last)
    values -= np.where(digits[final] & 16, np.int64(1) << (5 * (place[final] + 1)), 0)

    mask = owner[final]
    first = np.searchsorted(mask, np.arange(len(counts)))
    order = np.arange(len(values)) - first[mask]
    runs = _undo_differences(values, order)
    if runs.min() < 0:
        return int(mask[np.argmin(runs)]), "RLE has a negative run"
    total = np.add.reduceat(runs, first)
    area = np.array([h * w for h, w in sizes])
    if (total != area).any():
        n = int(np.argmax(total != area))
        return n, f"RLE covers {total[n]} pixels, its image has {area[n]}"
    return None


def _undo_differences(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Computes the runs from the stored values of many masks.

    Runs 1, 3, 5, ... of a mask are one chain of differences, runs 2, 4, 6, ... another; run 0 is in
    no chain. The cumulative sum over all chains in a row, minus its value before the start of each
    chain, is the cumulative sum of every chain.

    Args:
        values: Stored values, shape (n,).
        order: Position of each value within its mask, shape (n,).

    Returns:
        Runs, shape (n,).
    """
    runs = values.copy()
    for parity in (1, 0):
        chain = np.flatnonzero((order % 2 == parity) & (order > 0))
        if not len(chain):
            continue
        total = np.cumsum(values[chain])
        begins = order[chain] == (1 if parity else 2)
        before = np.where(begins, total - values[chain], 0)
        offset = before[np.flatnonzero(begins)][np.cumsum(begins) - 1]
        runs[chain] = total - offset
    return runs
