"""Errors about data that name the data set or the file."""

import functools
import os
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image

from ..errors import UserError
from ..io.images import decoded_image
from ..upstream import exchanged

__all__ = ["annotation_files", "dataset_errors", "image_errors", "naming_the_file"]


def annotation_files(names: Sequence[str]) -> str:
    """The files of registered data sets, for messages; a name stands for itself without one."""
    return ", ".join(MetadataCatalog.get(n).get("json_file", n) for n in names)


@contextmanager
def dataset_errors(names: Sequence[str]) -> Iterator[None]:
    """Turns an unknown name and a missing file into a UserError, while ``names`` are loaded.

    Other errors are the mistake of whoever wrote the code that loads, and keep their traceback.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            raise UserError(f"unknown data set {name!r} (DATASETS.TRAIN, DATASETS.TEST)")
    try:
        yield
    except FileNotFoundError as e:
        raise UserError(
            f"data set {', '.join(names)}: {e.filename or e} does not exist; set "
            f"DETECTRON2_DATASETS (now {os.getenv('DETECTRON2_DATASETS', 'datasets')!r}) to the "
            "folder that holds it, or correct the path"
        ) from None


class _NamingTheFile:
    """A class, not a closure: worker processes get it by pickling."""

    def __init__(self, mapper: Callable[[Dict[str, Any]], Any]):
        self._mapper = mapper

    def __call__(self, dataset_dict: Dict[str, Any]) -> Any:
        size = dataset_dict.get("width"), dataset_dict.get("height")
        try:
            with image_errors(functools.partial(_check_header, size=size)):
                return self._mapper(dataset_dict)
        except SizeMismatchError as e:
            raise UserError(f"image {dataset_dict['file_name']}: {e}") from None


def _check_header(image: Image.Image, name: str, size: Tuple[Any, Any]) -> None:
    """Refuses, before a pixel is decoded, what would go wrong without an error."""
    if image.mode[0] in "IF":
        raise UserError(
            f"image {name} has more than 8 bits a pixel (Pillow's mode {image.mode}), and would be "
            "clipped at 255: convert it to 8 bits"
        )
    # Sorted: Exif may turn the image.
    if None not in size and sorted(image.size) != sorted(size):
        raise UserError(
            f"image {name} has {image.size[0]} x {image.size[1]} pixels, its annotations say "
            f"{size[0]} x {size[1]}"
        )


@contextmanager
def image_errors(
    check_header: Callable[[Image.Image, str], None] = lambda image, name: None,
) -> Iterator[None]:
    """Within, whoever opens an image by Pillow gets one that can be read, or a UserError.

    The image is decoded when it is opened, so that an error is of the file, and not of the code
    that uses it.

    Args:
        check_header: Called with each image, before its pixels are decoded, and the file's name.
    """

    def opened(file: Any, mode: str = "r", formats: Any = None) -> Image.Image:
        name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else None
        name = str(name or getattr(file, "name", "in memory"))
        return decoded_image(file, name, lambda image: check_header(image, name))

    try:
        with exchanged("PIL.Image:open", opened):
            yield
    except OSError as e:
        if e.filename is None:  # not of opening a file
            raise
        missing = isinstance(e, FileNotFoundError)
        problem = "does not exist" if missing else f"cannot be read: {e.strerror}"
        raise UserError(f"image {e.filename} {problem}") from None


def naming_the_file(mapper: Callable[[Dict[str, Any]], Any]) -> Callable[[Dict[str, Any]], Any]:
    """Makes a dataset mapper name the image file when it cannot read it.

    It opens each file once: the checks are made of the image that the mapper opens by Pillow.
    """
    return _NamingTheFile(mapper)
