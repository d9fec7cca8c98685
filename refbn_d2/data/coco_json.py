"""Reads and checks COCO instance annotations; each file is read once per process."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from ..errors import UserError
from ..evaluation.inputs import check_ground_truth
from ..io.coco import is_file_name, is_number
from ..io.json import read_json
from ..upstream import exchanged

__all__ = ["coco_files_read_once", "keep_content", "read_coco"]

_Stamp = Optional[Tuple[int, int]]  # time of the last change and size in bytes

# Path -> (stamp, content) of files that evaluation will read again.
_KEPT: Dict[str, Tuple[_Stamp, Dict[str, Any]]] = {}
# Paths whose content this process has in memory, even if the file is not written yet.
_MADE: Set[str] = set()
# Files that have passed the checks for evaluation, which are stricter than those for training.
_CHECKED: Set[Tuple[str, _Stamp]] = set()


def keep_content(path: str, content: Dict[str, Any]) -> None:
    """Makes :func:`read_coco` use ``content`` for ``path``, even if the file does not exist."""
    _MADE.add(path)
    _KEPT[path] = None, content
    _CHECKED.discard((path, None))


def read_coco(path: str, evaluated: bool = True) -> COCO:
    """Reads pycocotools' COCO from a file, like ``COCO(path)``, but with checks and only once.

    The caller may change the result. Annotations without ``iscrowd``, which pycocotools requires,
    get the value 0.

    Args:
        path: path of annotations in COCO format.
        evaluated: whether they will be evaluated; the content is then kept for the next call.

    Raises:
        FileNotFoundError: if the file does not exist.
        UserError: if an entry is invalid; the message names the file and the first such entry.
    """
    path = PathManager.get_local_path(path)
    stamp = None if path in _MADE else _stamp(path)
    kept = _KEPT.get(path)
    content = kept[1] if kept and kept[0] == stamp else read_json(Path(path))
    if (path, stamp) not in _CHECKED:
        # COCO's test sets have no annotations, because they are evaluated on a server.
        whole = {"annotations": [], **content} if isinstance(content, dict) else content
        check_ground_truth(Path(path), whole, ["bbox"], evaluated)
        _check_for_detectron2(path, whole)
    if evaluated:
        _KEPT[path] = stamp, content
        _CHECKED.add((path, stamp))
    coco = COCO()
    coco.dataset = dict(content)
    if "annotations" in content:
        coco.dataset["annotations"] = [_copy(a) for a in content["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _stamp(path: str) -> _Stamp:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def _copy(annotation: Dict[str, Any]) -> Dict[str, Any]:
    """Copies an annotation, because load_coco_json and COCOeval change theirs."""
    copied = {"iscrowd": 0, **annotation}
    if "keypoints" in copied:  # load_coco_json shifts them by half a pixel in place
        copied["keypoints"] = list(copied["keypoints"])
    return copied


def _check_for_detectron2(path: str, content: Dict[str, Any]) -> None:
    """Raises a UserError if a requirement of detectron2's load_coco_json is not fulfilled."""
    if not content["categories"]:
        raise UserError(f"{path}: has no categories")
    for category in content["categories"]:
        if not isinstance(category.get("name"), str):
            raise UserError(f"{path}: category {category['id']} has no name")
    for image in content["images"]:
        if not isinstance(image.get("file_name"), str):
            raise UserError(f"{path}: image {image['id']} has no file_name")
        if not is_file_name(image["file_name"]):
            raise UserError(
                f"{path}: image {image['id']} has file_name {image['file_name']!r}, which is not a "
                "valid file name"
            )
    for annotation in content["annotations"]:
        if annotation.get("ignore", 0) != 0:
            raise UserError(
                f"{path}: annotation {annotation['id']} has ignore {annotation['ignore']!r}, which "
                "detectron2 does not support: use iscrowd 1"
            )
        points = annotation.get("keypoints", [])
        if not isinstance(points, list) or len(points) % 3 or not all(map(is_number, points)):
            raise UserError(
                f"{path}: annotation {annotation['id']} has keypoints that are not x, y, v, ..."
            )


@contextlib.contextmanager
def coco_files_read_once(evaluated: bool) -> Iterator[List[COCO]]:
    """Context manager in which detectron2 reads COCO files with :func:`read_coco`.

    detectron2 has no argument for the reader: load_coco_json imports pycocotools' class when it is
    called, and COCOEvaluator looks up the class in its own module.

    Args:
        evaluated: as for :func:`read_coco`.

    Yields:
        List of the COCO objects that were read so far, in order; it is emptied after the block.
    """
    read: List[COCO] = []

    def reader(path: str) -> COCO:
        read.append(read_coco(path, evaluated))
        return read[-1]

    with exchanged("detectron2.evaluation.coco_evaluation:COCO", reader):
        with exchanged("pycocotools.coco:COCO", _class_like(reader)):
            try:
                yield read
            finally:
                # The class below is part of a reference cycle, and would keep what was read until
                # the next garbage collection: 2 GB of COCO's training set.
                read.clear()


def _class_like(reader: Any) -> Any:
    """Returns a subclass of pycocotools' COCO that reads files with ``reader``."""

    class ReadOnce(COCO):
        def __new__(cls, annotation_file=None):
            if annotation_file is None or cls is not ReadOnce:
                return super().__new__(cls)
            return reader(annotation_file)

    return ReadOnce
