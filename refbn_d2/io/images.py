"""Reading of untrusted image files."""

import struct
import zlib
from pathlib import Path
from typing import Tuple

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError

__all__ = ["read_rgb"]

# Pillow recognizes formats by content, not by the file's name. It decodes these formats itself; for
# others, such as EPS, it would start a program.
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
# Exceptions that Pillow's decoders raise on damaged files.
_DAMAGED = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, SyntaxError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def read_rgb(path: Path, size: Tuple[int, int]) -> np.ndarray:
    """Reads an image file and rotates it according to its EXIF orientation.

    Args:
        path: Path of a JPEG, PNG, BMP, TIFF, WebP, GIF or PPM file.
        size: Expected (height, width) in pixels. It is compared before the pixels are decoded, so
            that a small file cannot cause a large allocation.

    Returns:
        RGB pixels, uint8, of shape (height, width, 3).

    Raises:
        UserError: If the file cannot be read or decoded, or has another size.
    """
    if not path.is_file():  # missing, or a pipe that may never end
        raise UserError(f"{path}: no such file")
    try:
        with Image.open(path, formats=_FORMATS) as image:
            found = image.size[::-1]
            if sorted(found) == sorted(size):  # EXIF may exchange height and width
                image = ImageOps.exif_transpose(image)
                found = image.size[::-1]
            if found == tuple(size):
                return np.asarray(image.convert("RGB"))
    except _DAMAGED as e:
        raise UserError(f"{path}: cannot be decoded ({' '.join(str(e).split())})") from None
    raise UserError(
        f"{path}: has {found[0]} x {found[1]} pixels (height x width), not the {size[0]} x "
        f"{size[1]} of the annotations"
    )
