"""Writing files that are whole at every moment, whatever ends the process or the machine."""

import os
from contextlib import contextmanager, suppress
from typing import IO, Iterator

__all__ = ["PARTIAL", "atomic_write"]

PARTIAL = ".partial"


@contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO]:
    """Opens a file that takes the place of ``path`` when the block ends: whole, and on the disk.

    Until then, and if the block raises, what was at ``path`` stays. A process that is killed leaves
    its half of the file under the name ``path`` + PARTIAL.

    Args:
        path: of a local file.
        mode: "w" or "wb".
    """
    partial = path + PARTIAL
    try:
        with open(partial, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
    # The new name is on the disk once its folder is.
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
