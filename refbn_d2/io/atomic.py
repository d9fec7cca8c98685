"""Atomic writing: after a crash a file has its old or its new content, never a part of it."""

import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Iterator, Union

from ..errors import UserError

__all__ = ["PARTIAL", "atomic_write", "write_errors"]

PARTIAL = ".partial"


@contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file that replaces ``path`` at the end of the block, synced to the disk.

    If the block raises an exception, the old file at ``path`` remains. If the process is killed,
    the old file remains too, and the incomplete new one is left at ``path`` + PARTIAL.

    Args:
        path: Path of a local file.
        mode: File mode, "w" or "wb".
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
    # The rename is only on the disk once the folder is synced.
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def write_errors(path: Union[str, Path], remedy: str) -> Iterator[None]:
    """Raises a UserError instead of an OSError of the block.

    Args:
        path: Path of the file or folder that the block writes.
        remedy: What the user can do, such as "choose another folder".
    """
    try:
        yield
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}; {remedy}") from None
