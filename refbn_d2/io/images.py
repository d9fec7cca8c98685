"""Reading of untrusted image files."""

import os
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Callable, Iterator, Tuple, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError

__all__ = ["FORMATS", "decoded_image", "open_image", "read_rgb"]

# Pillow recognizes formats by content, not by the file's name. It decodes these formats itself; for
# others, such as EPS, it would start a program.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
# Exceptions that Pillow's decoders raise on damaged files.
_DAMAGED = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, SyntaxError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
# Pillow's original function: data/errors.py replaces Image.open by a function that calls this one.
_open = Image.open


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Context manager that raises a UserError with the file's name if Pillow cannot read it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UserError(f"image {name} cannot be read: it is no {known} file") from None
    except _DAMAGED as e:
        raise UserError(f"image {name} cannot be read: {' '.join(str(e).split())}") from None


def open_image(file: Union[str, Path, IO[bytes]], name: str) -> Image.Image:
    """Opens an image of one of FORMATS, and reads no more than its header.

    Args:
        file: Path or open file, in binary mode.
        name: Name of the file for messages.

    Raises:
        UserError: If the file has another format or is damaged. The message names the file.
        FileNotFoundError: If there is no such file.
    """
    with _named(name):
        return _open(file, formats=FORMATS)


def decoded_image(
    file: Union[str, Path, IO[bytes]], name: str, check_header: Callable[[Image.Image], None]
) -> Image.Image:
    """Opens an image as :func:`open_image` does, and decodes its pixels.

    Args:
        file, name: As for :func:`open_image`.
        check_header: Called with the image before its pixels are decoded, so that it can refuse a
            small file that would cause a large allocation.

    Raises:
        UserError, FileNotFoundError: As :func:`open_image`.
    """
    image = open_image(file, name)
    check_header(image)
    with _named(name):
        image.load()
    return image


def read_rgb(path: Path, size: Tuple[int, int]) -> np.ndarray:
    """Reads an image file and rotates it according to its EXIF orientation.

    Args:
        path: Path of a file of one of FORMATS.
        size: Expected (height, width) in pixels. It is compared before the pixels are decoded, so
            that a small file cannot cause a large allocation.

    Returns:
        RGB pixels, uint8, of shape (height, width, 3).

    Raises:
        UserError: If the file cannot be read or decoded, or has another size.
    """

    def check_size(image: Image.Image, same: Callable = sorted) -> None:
        found = image.size[::-1]
        if same(found) != same(size):
            raise UserError(
                f"{path}: has {found[0]} x {found[1]} pixels (height x width), not the {size[0]} x "
                f"{size[1]} of the annotations"
            )

    if not os.path.isfile(path):  # missing, too long, or a pipe that may never end
        raise UserError(f"{path}: no such file")
    # Sorted: EXIF may exchange height and width.
    with decoded_image(path, str(path), check_size) as image:
        turned = ImageOps.exif_transpose(image)
        check_size(turned, tuple)
        return np.asarray(turned.convert("RGB"))
