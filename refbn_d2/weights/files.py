"""Writing files of weights."""

from typing import Any

import torch

from ..io.atomic import atomic_write

__all__ = ["atomic_save"]


def atomic_save(content: Any, path: str) -> None:
    """``torch.save`` by :func:`atomic_write`.

    Raises:
        OSError: the disk's, also where torch raises an error of its own after it.
    """
    try:
        with atomic_write(path, "wb") as f:
            torch.save(content, f)
    except RuntimeError as e:
        if isinstance(e.__context__, OSError):
            raise e.__context__ from e
        raise
