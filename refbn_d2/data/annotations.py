"""Content and checks of data sets in detectron2's standard format."""

import numbers
import os
from collections import abc
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set, Tuple

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util

from ..errors import UserError
from ..io.coco import box_problem, is_file_name, is_int, is_number, masks_problem
from ..io.images import open_image

__all__ = ["Contents", "check_dicts", "contents", "plain_dicts"]


@dataclass
class Contents:
    """Content of a data set. Crowd regions are not counted as objects, as training omits them.

    Attributes:
        images: number of images.
        objects: number of objects.
        without_annotations: file names of images that are not annotated, not even as empty.
        without_mask: file names of images with an object that has no mask.
        with_rle: file names of images with a mask in RLE format.
        without_keypoints: file names of images with an object that has no keypoints.
        keypoint_counts: different numbers of keypoints per object.
        without_sem_seg: file names of images without a semantic segmentation.
        largest_class: largest class index, or -1 without objects.
    """

    images: int = 0
    objects: int = 0
    without_annotations: List[str] = field(default_factory=list)
    without_mask: List[str] = field(default_factory=list)
    with_rle: List[str] = field(default_factory=list)
    without_keypoints: List[str] = field(default_factory=list)
    keypoint_counts: Set[int] = field(default_factory=set)
    without_sem_seg: List[str] = field(default_factory=list)
    largest_class: int = -1


def contents(dicts: Iterable[Dict[str, Any]]) -> Contents:
    """Determines the content of a data set in detectron2's standard format."""
    found = Contents()
    for d in dicts:
        name = str(d.get("file_name", d.get("image_id")))
        objects = [a for a in d.get("annotations", ()) if not a.get("iscrowd", 0)]
        found.images += 1
        found.objects += len(objects)
        if "annotations" not in d:
            found.without_annotations.append(name)
        masks = [a.get("segmentation") for a in objects]
        if not all(masks):
            found.without_mask.append(name)
        if any(isinstance(m, dict) for m in masks):
            found.with_rle.append(name)
        points = [a.get("keypoints") for a in objects]
        if not all(points):
            found.without_keypoints.append(name)
        found.keypoint_counts.update(len(p) // 3 for p in points if p)
        if "sem_seg_file_name" not in d:
            found.without_sem_seg.append(name)
        found.largest_class = max([found.largest_class, *(a["category_id"] for a in objects)])
    return found


def plain_dicts(
    dicts: Iterable[Dict[str, Any]], where: str, num_classes: Optional[int] = None
) -> List[Dict[str, Any]]:
    """Converts the dicts of a data set to the types that they would have from a COCO file.

    detectron2 can train with NumPy numbers and arrays, with tuples, and without sizes or image ids,
    but cannot always evaluate, save or compare them. The given dicts are not changed.

    Args:
        dicts: dicts in detectron2's standard format, returned by a registered function.
        where: description of the data set, for messages.
        num_classes: number of class names, or None if the data set has none.

    Raises:
        UserError: if a field cannot be converted; the message names the image and the field.
    """
    return [_plain_dict(d, n, where, num_classes) for n, d in enumerate(dicts)]


def _plain_dict(
    d: Dict[str, Any], position: int, where: str, num_classes: Optional[int]
) -> Dict[str, Any]:
    if not isinstance(d, dict):
        raise UserError(f"{where}: entry {position} is a {type(d).__name__}, not a dict")
    d = dict(d)
    if "file_name" in d:
        name = (
            os.fspath(d["file_name"]) if isinstance(d["file_name"], os.PathLike) else d["file_name"]
        )
        if not is_file_name(name):
            raise UserError(f"{where}: entry {position}: file_name is {name!r}, no file's name")
        d["file_name"] = name
    elif "image" not in d:  # there is neither a file nor pixels in memory
        raise UserError(f"{where}: entry {position} has no file_name")
    d["image_id"] = _plain(d.get("image_id", position))
    image = f"{where}: image {d.get('file_name', d['image_id'])}"
    if not is_int(d["image_id"]) and not isinstance(d["image_id"], str):
        raise UserError(f"{image}: image_id is {d['image_id']!r}, neither a whole number nor text")
    if d.get("height") is None or d.get("width") is None:
        if "file_name" not in d:
            raise UserError(f"{image} has no height and width")
        d["width"], d["height"] = _size(d["file_name"], image)
    d["height"], d["width"] = _plain(d["height"]), _plain(d["width"])
    if "annotations" in d:
        if not isinstance(d["annotations"], abc.Iterable):
            raise UserError(
                f"{image}: annotations is {d['annotations']!r}, not a list ([] if it has no object)"
            )
        d["annotations"] = [
            _plain_annotation(a, f"{image}, annotation {n}", num_classes)
            for n, a in enumerate(d["annotations"])
        ]
    return d


def _size(file_name: str, where: str) -> Sequence[int]:
    """Returns (width, height) of an image after rotation according to Exif, as detectron2 does."""
    try:
        with PathManager.open(file_name, "rb") as f, open_image(f, file_name) as image:
            try:
                turned = image.getexif().get(274, 1) in (5, 6, 7, 8)
            except Exception:  # damaged Exif data, which detectron2 ignores, too
                turned = False
            return image.size[::-1] if turned else image.size
    except OSError as e:
        problem = f"{file_name} cannot be read: {e.strerror}"
    except UserError as e:
        problem = str(e)
    raise UserError(f"{where} has no height and width, and {problem}")


def _plain_annotation(
    annotation: Dict[str, Any], where: str, num_classes: Optional[int]
) -> Dict[str, Any]:
    if not isinstance(annotation, dict):
        raise UserError(f"{where} is a {type(annotation).__name__}, not a dict")
    plain = {k: _plain(v) for k, v in annotation.items() if k != "segmentation"}
    for key in ("bbox", "bbox_mode", "category_id"):
        if plain.get(key) is None:
            raise UserError(f"{where} has no {key}")
    try:
        plain["bbox_mode"] = BoxMode(plain["bbox_mode"])
    except ValueError:
        raise UserError(f"{where}: bbox_mode is {plain['bbox_mode']!r}, not a BoxMode") from None
    if plain["bbox_mode"] in (BoxMode.XYXY_REL, BoxMode.XYWH_REL):
        raise UserError(
            f"{where}: bbox_mode is {plain['bbox_mode'].name}, which detectron2 cannot convert: "
            "give boxes in pixels (XYXY_ABS, XYWH_ABS)"
        )
    category = plain["category_id"]
    if not is_int(category) or not 0 <= category < (num_classes or 2**31):
        allowed = f"0 to {num_classes - 1}" if num_classes else "a whole number >= 0"
        raise UserError(f"{where}: category_id is {category!r}, not {allowed}")
    mask = annotation.get("segmentation")
    if not isinstance(mask, (type(None), list, tuple, dict, np.ndarray)):
        raise UserError(
            f"{where}: segmentation is of type {type(mask).__name__}: give a list of polygons, "
            "RLE, or a bitmap as a NumPy array"
        )
    if mask is not None and len(mask):
        plain["segmentation"] = _plain_mask(mask, where)
    return plain


def _plain_mask(mask: Any, where: str) -> Any:
    if isinstance(mask, dict):  # RLE, which is compressed here as in load_coco_json
        mask = {k: _plain(v) for k, v in mask.items()}
        if isinstance(mask.get("counts"), list) and not masks_problem([mask], [_tuple(mask)]):
            return mask_util.frPyObjects(mask, *mask["size"])
        return mask
    if isinstance(mask, np.ndarray) and mask.ndim == 2 and mask.dtype.kind in "bu":
        return mask_util.encode(np.asfortranarray(mask, dtype="uint8"))
    return _plain(mask)


def _tuple(mask: Dict[str, Any]) -> Any:
    size = mask.get("size")
    return tuple(size) if isinstance(size, list) and len(size) == 2 else (0, 0)


def _plain(value: Any) -> Any:
    """Converts NumPy's numbers and arrays to Python's numbers and lists, and tuples to lists."""
    if isinstance(value, (str, bytes, bool, int, float)):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def check_dicts(dicts: Iterable[Dict[str, Any]], where: str) -> None:
    """Raises a UserError for the first annotation that training cannot use.

    Args:
        dicts: dicts in detectron2's standard format. Boxes in XYWH_ABS, COCO's mode, are checked
            completely; of boxes in other modes only the number of values, and whether all are
            finite.
        where: description of the data set, for messages.
    """
    masks, sizes, owners = [], [], []
    for d in dicts:
        image = f"{where}: image {d.get('file_name', d.get('image_id'))}"
        size: Tuple[Any, Any] = d.get("height"), d.get("width")
        if not all(is_int(s) and s > 0 for s in size):
            raise UserError(f"{image}: height and width are {size}, not whole numbers > 0")
        for n, annotation in enumerate(d.get("annotations", ())):
            box, problem = annotation.get("bbox"), ""
            mode = annotation.get("bbox_mode")
            count = 5 if mode == BoxMode.XYWHA_ABS else 4
            if mode == BoxMode.XYWH_ABS:
                problem = box_problem(box)
            elif not isinstance(box, list) or len(box) != count or not all(map(is_number, box)):
                problem = f"bbox {box!r} is not {count} finite numbers"
            if problem:
                raise UserError(f"{image}, annotation {n}: {problem}")
            points = annotation.get("keypoints") or []
            if not isinstance(points, list) or len(points) % 3 or not all(map(is_number, points)):
                raise UserError(f"{image}, annotation {n}: keypoints are not x, y, v, ...")
            if annotation.get("segmentation"):
                masks.append(annotation["segmentation"])
                sizes.append(size)
                owners.append(f"{image}, annotation {n}")
    found = masks_problem(masks, sizes)
    if found:
        raise UserError(f"{owners[found[0]]}: {found[1]}")
