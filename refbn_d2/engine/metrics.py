"""metrics.json as valid JSON lines, each iteration once, however often the run was interrupted."""

import json
import math
import os
from typing import Optional

from detectron2.utils.events import JSONWriter

__all__ = ["MetricsWriter"]


class MetricsWriter(JSONWriter):
    """JSONWriter that takes back the lines which an interrupted run has written in vain.

    Args:
        path: of metrics.json. A torn last line is cut off.
    """

    def __init__(self, path: str):
        self._path = path
        _cut(path, math.inf)
        super().__init__(path)

    @property
    def last_iteration(self) -> int:
        """Iteration of the last line that this run may not write again, -1 if there is none."""
        return self._last_write

    def rewind(self, start_iter: int) -> None:
        """Cuts off the iterations from ``start_iter`` on: the resumed run will write them."""
        self._last_write = _cut(self._path, start_iter)


def _cut(path: str, start_iter: float) -> int:
    """Cuts off last lines, torn or of ``start_iter`` and later; the last iteration left, or -1."""
    if not os.path.isfile(path):
        return -1
    # In place: the writer appends to this very file, and cutting cannot be interrupted half-way.
    with open(path, "rb+") as f:
        lines = f.readlines()
        while lines:
            iteration = _iteration(lines[-1])
            if iteration is not None and iteration < start_iter:
                break
            lines.pop()
        f.truncate(sum(map(len, lines)))
    return iteration if lines else -1


def _iteration(line: bytes) -> Optional[int]:
    try:
        return json.loads(line)["iteration"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
