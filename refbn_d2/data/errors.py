"""Errors about data that name the data set or the file."""

import os
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import UserError

__all__ = ["annotation_files", "dataset_errors", "naming_the_file"]


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
        try:
            self._check_header(dataset_dict)
            return self._mapper(dataset_dict)
        except FileNotFoundError:
            raise UserError(f"image {dataset_dict['file_name']} does not exist") from None
        except SizeMismatchError as e:
            raise UserError(f"image {dataset_dict['file_name']}: {e}") from None
        # What Pillow raises on damaged files, and on those that say they are huge.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise UserError(f"image {dataset_dict['file_name']} cannot be read: {e}") from None

    @staticmethod
    def _check_header(d: Dict[str, Any]) -> None:
        """Refuses, before a pixel is decoded, what would go wrong without an error."""
        if "file_name" not in d:  # drawn, not read
            return
        with PathManager.open(d["file_name"], "rb") as f, Image.open(f) as image:
            if image.format == "EPS":
                raise UserError(f"image {d['file_name']} is PostScript, a program to run")
            if image.mode[0] in "IF":
                raise UserError(
                    f"image {d['file_name']} has more than 8 bits a pixel (Pillow's mode "
                    f"{image.mode}), and would be clipped at 255: convert it to 8 bits"
                )
            # Sorted: Exif may turn the image.
            if "height" in d and sorted(image.size) != sorted((d["width"], d["height"])):
                raise UserError(
                    f"image {d['file_name']} has {image.size[0]} x {image.size[1]} pixels, its "
                    f"annotations say {d['width']} x {d['height']}"
                )


def naming_the_file(mapper: Callable[[Dict[str, Any]], Any]) -> Callable[[Dict[str, Any]], Any]:
    """Makes a dataset mapper name the image file when it cannot read it."""
    return _NamingTheFile(mapper)
