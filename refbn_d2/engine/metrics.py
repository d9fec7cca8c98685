"""Writing of metrics.json, which has each iteration only once even if a run is interrupted, and of
the log.
"""

import json
import math
import os
from typing import Optional, Tuple

from detectron2.utils.events import CommonMetricPrinter, JSONWriter, get_event_storage

__all__ = ["MetricsWriter", "ProgressPrinter"]


class MetricsWriter(JSONWriter):
    """JSONWriter that truncates metrics.json to the resumed iteration.

    Args:
        path: Path of metrics.json. If its last line is incomplete, the line is removed.
    """

    def __init__(self, path: str):
        self._path = path
        _cut(path, math.inf)
        super().__init__(path)

    @property
    def last_iteration(self) -> int:
        """Iteration of the last line, or -1. Up to it, nothing is written again."""
        return self._last_write

    def rewind(self, start_iter: int) -> None:
        """Removes the iterations from ``start_iter`` on, which the resumed run will write again."""
        self._last_write = _cut(self._path, start_iter)


class ProgressPrinter(CommonMetricPrinter):
    """CommonMetricPrinter that can write an iteration twice.

    A run that ends by an error or a signal writes its last iteration once more. Within the first
    three steps upstream then divides by the number of iterations since the last time, and a
    ZeroDivisionError takes the place of the error or the exit status.
    """

    _last_write: Optional[Tuple[int, float]]

    def write(self):
        if self._last_write is not None and self._last_write[0] == get_event_storage().iter:
            self._last_write = None
        super().write()


def _cut(path: str, start_iter: float) -> int:
    """Removes incomplete last lines and those from ``start_iter`` on.

    Returns:
        The last remaining iteration, or -1 if there is none.
    """
    if not os.path.isfile(path):
        return -1
    last = -1
    # In place, because the writer has this file open for appending. Truncation is atomic.
    with open(path, "rb+") as f:
        lines = f.readlines()
        while lines:
            iteration = _iteration(lines[-1])
            if iteration is not None and iteration < start_iter:
                last = iteration
                break
            lines.pop()
        f.truncate(sum(map(len, lines)))
    return last


def _iteration(line: bytes) -> Optional[int]:
    try:
        return json.loads(line)["iteration"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
