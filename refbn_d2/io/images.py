"""Reading image files whose content nobody has checked."""

import struct
import zlib
from pathlib import Path
from typing import Tuple

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError

__all__ = ["read_rgb"]

# By content, whatever the file's name says. Pillow decodes these itself; for others, EPS for one,
# it would start a program.
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
# What Pillow's decoders raise on damaged files.
_DAMAGED = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, SyntaxError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def read_rgb(path: Path, size: Tuple[int, int]) -> np.ndarray:
    """The pixels of an image file, turned as its EXIF orientation says.

    Args:
        path: of a JPEG, PNG, BMP, TIFF, WebP, GIF or PPM file.
        size: (height, width) in pixels that the image must have. It is compared before the pixels
            are decoded, so that a small file cannot ask for much memory.

    Returns:
        uint8 (height, width, 3).

    Raises:
        UserError: the file cannot be read or decoded, or has another size.
    """
    if not path.is_file():  # missing, or a pipe that might have no end
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
