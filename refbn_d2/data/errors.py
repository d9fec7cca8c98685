"""Errors about data that name the data set or the file."""

import json
import os
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError

from ..errors import UserError

__all__ = ["dataset_errors", "naming_the_file"]


@contextmanager
def dataset_errors(names: Sequence[str]) -> Iterator[None]:
    """Turns what goes wrong while ``names`` are loaded into a UserError."""
    for name in names:
        if name not in DatasetCatalog.list():
            raise UserError(f"unknown data set {name!r} (DATASETS.TRAIN, DATASETS.TEST)")
    files = [MetadataCatalog.get(n).get("json_file", n) for n in names]
    where = ", ".join(files)
    try:
        yield
    except FileNotFoundError as e:
        raise UserError(
            f"data set {', '.join(names)}: {e.filename or e} does not exist; set "
            f"DETECTRON2_DATASETS (now {os.getenv('DETECTRON2_DATASETS', 'datasets')!r}) to the "
            "folder that holds it"
        ) from None
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not JSON: {e}") from None
    except (KeyError, TypeError, AttributeError, IndexError, AssertionError, ValueError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise UserError(f"{where}: not COCO instance annotations ({reason})") from e


class _NamingTheFile:
    """A class, not a closure: worker processes get it by pickling."""

    def __init__(self, mapper: Callable[[Dict[str, Any]], Any]):
        self._mapper = mapper

    def __call__(self, dataset_dict: Dict[str, Any]) -> Any:
        try:
            return self._mapper(dataset_dict)
        except FileNotFoundError:
            raise UserError(f"image {dataset_dict['file_name']} does not exist") from None
        except SizeMismatchError as e:
            raise UserError(f"image {dataset_dict['file_name']}: {e}") from None
        except (OSError, SyntaxError) as e:  # what Pillow raises on damaged files
            raise UserError(f"image {dataset_dict['file_name']} cannot be read: {e}") from None


def naming_the_file(mapper: Callable[[Dict[str, Any]], Any]) -> Callable[[Dict[str, Any]], Any]:
    """Makes a dataset mapper name the image file when it cannot read it."""
    return _NamingTheFile(mapper)
