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
    """Returns the annotation files of data sets for a message; without a file, the set's name."""
    return ", ".join(MetadataCatalog.get(n).get("json_file", n) for n in names)


@contextmanager
def dataset_errors(names: Sequence[str]) -> Iterator[None]:
    """Context manager that turns an unknown name or a missing file into a UserError.

    Other errors are errors in the code of the data set, and keep their traceback.

    Args:
        names: Names of the data sets that are loaded in the block.
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
    """The mapper of naming_the_file: a class and not a closure, so that workers can unpickle it."""

    def __init__(self, mapper: Callable[[Dict[str, Any]], Any]):
        self._mapper = mapper

    def __call__(self, dataset_dict: Dict[str, Any]) -> Any:
        size = dataset_dict.get("width"), dataset_dict.get("height")
        try:
            with image_errors(functools.partial(_check_header, size=size)):
                return self._mapper(dataset_dict)
        except SizeMismatchError as e:
            raise UserError(f"image {dataset_dict['file_name']}: {e}") from None
        except KeyError as e:
            if e.args != ("file_name",) or "file_name" in dataset_dict:
                raise
            raise UserError(
                f"image {dataset_dict.get('image_id')} has no file_name, from which detectron2's "
                "mapper reads it: give one, or a Trainer with another build_mapper"
            ) from None


def _check_header(image: Image.Image, name: str, size: Tuple[Any, Any]) -> None:
    """Raises a UserError for an image that would be used wrongly, before its pixels are decoded."""
    if image.mode[0] in "IF":
        raise UserError(
            f"image {name} has more than 8 bits a pixel (Pillow's mode {image.mode}), and would be "
            "clipped at 255: convert it to 8 bits"
        )
    # Sorted, because Exif may exchange width and height.
    if None not in size and sorted(image.size) != sorted(size):
        raise UserError(
            f"image {name} has {image.size[0]} x {image.size[1]} pixels, not the {size[0]} x "
            f"{size[1]} of its annotations"
        )


@contextmanager
def image_errors(
    check_header: Callable[[Image.Image, str], None] = lambda image, name: None,
) -> Iterator[None]:
    """Context manager in which opening an image with Pillow also decodes it, or raises a UserError.

    Errors of decoding thus occur when the file is opened, and not later in the code that uses the
    image.

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
        if e.filename is None:  # not an error of opening a file
            raise
        missing = isinstance(e, FileNotFoundError)
        problem = "does not exist" if missing else f"cannot be read: {e.strerror}"
        raise UserError(f"image {e.filename} {problem}") from None


def naming_the_file(mapper: Callable[[Dict[str, Any]], Any]) -> Callable[[Dict[str, Any]], Any]:
    """Makes a dataset mapper name the image file when it cannot read it.

    Each file is opened once: the checks use the image that the mapper opens with Pillow.
    """
    return _NamingTheFile(mapper)
