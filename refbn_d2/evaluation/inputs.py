"""Reads ground truth and detections in COCO format, and refuses invalid entries.

pycocotools and hotcoco evaluate invalid entries without an error (they ignore an unknown image, and
compare a mask of another size), so every entry is checked here, before AP is calculated.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Dict, List, Mapping, Sequence, Tuple

from ..errors import UserError
from ..io.coco import box_problem, is_int, is_number, is_size, masks_problem
from ..io.json import read_json
from ..io.rle import rle_problem

if TYPE_CHECKING:
    import hotcoco

__all__ = [
    "IOU_TYPES",
    "GroundTruth",
    "check_ground_truth",
    "coverage_warnings",
    "load_ground_truth",
    "load_results",
    "scored_fields",
]

IOU_TYPES = ("bbox", "segm")
_MAX_ID = 2**63 - 1
_MAX_SIDE = 2**24  # pixels
# Results are not warned of if they cover at least this share of the images that the most complete
# results cover.
_SIMILAR = 0.9


@dataclass(frozen=True)
class GroundTruth:
    """A checked data set.

    Attributes:
        path: File that it was read from.
        dataset: Content of the file.
        coco: hotcoco's index of it.
        sizes: image id -> (height, width) in pixels.
        categories: category id -> name.
    """

    path: Path
    dataset: Dict[str, Any]
    coco: "hotcoco.COCO"
    sizes: Dict[int, Tuple[int, int]]
    categories: Dict[int, str]


def _by_id(
    path: Path, entries: Any, kind: str, allow_text: bool = False
) -> Dict[Any, Dict[str, Any]]:
    if not isinstance(entries, list):
        raise UserError(f"{path}: is no COCO ground truth, it has no list of {kind}")
    found: Dict[Any, Dict[str, Any]] = {}
    for n, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {kind}[{n}] is {entry!r:.80}, no object with an id")
        key = entry.get("id")
        if not is_int(key) and not (allow_text and isinstance(key, str)):
            found_type = "" if key is None else f", but {key!r}, a {type(key).__name__}"
            raise UserError(f"{path}: {kind}[{n}] has no integer id{found_type}")
        # Those of annotations are not used.
        if is_int(key) and not 0 <= key <= _MAX_ID and kind != "annotations":
            raise UserError(f"{path}: {kind}[{n}] has id {key}; hotcoco takes 0 to 2**63 - 1")
        if key in found:
            raise UserError(f"{path}: id {key} occurs twice in {kind}")
        found[key] = entry
    return found


def _key(value: Any) -> Any:
    """``value`` as a key to look up; None if it cannot be an id, such as a list or a dict."""
    return value if isinstance(value, (int, str)) else None


def load_ground_truth(path: Path, iou_types: Sequence[str]) -> GroundTruth:
    """Reads and checks COCO instance annotations.

    Args:
        path: JSON with images, annotations and categories.
        iou_types: Some of IOU_TYPES; "segm" requires a segmentation in every annotation.

    Raises:
        UserError: With the name of the file and the first invalid entry.
    """
    import hotcoco  # not needed by check_ground_truth, which training calls

    content = read_json(path)
    sizes, categories = check_ground_truth(path, content, iou_types)
    return GroundTruth(path, content, hotcoco.COCO(scored_fields(content)), sizes, categories)


def scored_fields(dataset: Dict[str, Any]) -> Dict[str, Any]:
    """A copy of a checked data set, or of detections, with the fields that AP depends on.

    Other fields may have a type that hotcoco refuses. Annotations are numbered from 1, because
    pycocotools treats an object with id 0 as one that was not found. Nothing refers to these ids.
    """
    fields = ("image_id", "category_id", "bbox", "area", "segmentation", "score")
    return {
        "images": [{k: image[k] for k in ("id", "height", "width")} for image in dataset["images"]],
        "categories": [{"id": c["id"], "name": str(c["id"])} for c in dataset["categories"]],
        "annotations": [
            {"id": n, "iscrowd": a.get("iscrowd", 0), **{k: a[k] for k in fields if k in a}}
            for n, a in enumerate(dataset["annotations"], 1)
        ],
    }


def check_ground_truth(
    path: Path, content: Any, iou_types: Sequence[str], evaluated: bool = True
) -> Tuple[Dict[int, Tuple[int, int]], Dict[int, str]]:
    """Checks COCO instance annotations that have already been read.

    Args:
        path: Path of the file, for error messages.
        content: Content of the file.
        iou_types: As in :func:`load_ground_truth`.
        evaluated: False for a file that is used for training only. It needs no areas, and may have
            text as ids and annotations of images that are not in the file.

    Returns:
        Sizes and categories, see :class:`GroundTruth`.

    Raises:
        UserError: With the name of the file and the first invalid entry.
    """
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no COCO ground truth, but a {type(content).__name__}")
    images = _by_id(path, content.get("images"), "images", not evaluated)
    categories = _by_id(path, content.get("categories"), "categories")
    annotations = _by_id(path, content.get("annotations"), "annotations", not evaluated)
    if not evaluated:
        annotations = {k: a for k, a in annotations.items() if _key(a.get("image_id")) in images}
    if not images:
        raise UserError(f"{path}: has no images")
    sizes = {}
    for key, image in images.items():
        for side in ("height", "width"):
            if image.get(side) is None:
                raise UserError(f"{path}: image {key} has no {side}")
            if not is_int(image[side]) or not 0 < image[side] <= _MAX_SIDE:
                raise UserError(
                    f"{path}: image {key}: {side} {image[side]!r:.40} is not a whole number of "
                    f"pixels from 1 to {_MAX_SIDE}"
                )
        sizes[key] = image["height"], image["width"]
        if not isinstance(image.get("file_name", ""), str):
            raise UserError(f"{path}: image {key}: file_name {image['file_name']!r} is not text")
    for key, category in categories.items():
        if not isinstance(category.get("name", ""), str):
            raise UserError(f"{path}: category {key}: name {category['name']!r} is not text")
    for key, annotation in annotations.items():
        where = f"{path}: annotation {key}"
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        for field in ("image_id", "category_id"):
            if annotation.get(field) is None and (evaluated or field == "category_id"):
                raise UserError(f"{where} has no {field}")
        if evaluated and (not is_int(image_id) or image_id not in images):
            raise UserError(f"{where} is of unknown image {_named(image_id)}")
        if not is_int(category_id) or category_id not in categories:
            raise UserError(f"{where} is of unknown category {_named(category_id)}")
        problem = box_problem(annotation.get("bbox"))
        if problem:
            raise UserError(f"{where}: {problem}")
        if evaluated and not (is_number(annotation.get("area")) and annotation["area"] >= 0):
            raise UserError(f"{where}: area {annotation.get('area')} is not a number >= 0")
        if annotation.get("iscrowd", 0) not in (0, 1):
            raise UserError(f"{where}: iscrowd {annotation['iscrowd']} is neither 0 nor 1")
        if "segm" in iou_types and not annotation.get("segmentation"):
            raise UserError(f"{where} has no segmentation; leave segm out of --iou-type")
    masked = [a for a in annotations.values() if a.get("segmentation")]
    found = masks_problem(
        [a["segmentation"] for a in masked], [sizes[a["image_id"]] for a in masked]
    )
    if found:
        raise UserError(f"{path}: annotation {masked[found[0]]['id']}: {found[1]}")
    return sizes, _names(categories)


def _names(categories: Dict[int, Dict[str, Any]]) -> Dict[int, str]:
    """Names by category id; the id is added to a name that several categories have."""
    names = {key: category.get("name", str(key)) for key, category in categories.items()}
    count = Counter(names.values())
    return {key: name if count[name] == 1 else f"{name} (id {key})" for key, name in names.items()}


def load_results(path: Path, gt: GroundTruth, iou_types: Sequence[str]) -> List[Dict[str, Any]]:
    """Reads and checks detections in COCO's results format.

    Args:
        path: JSON list of {image_id, category_id, score, bbox and/or segmentation}. An empty list
            means that the model found nothing.
        iou_types: What will be evaluated; "segm" needs RLE masks of the image's size, "bbox" a box
            of each detection, or a mask of each (COCO then uses the boxes around the masks).

    Raises:
        UserError: With the name of the file and the first invalid entry.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path}: results must be a list, this is a {type(content).__name__}")
    for n, entry in enumerate(content):
        problem = _detection_problem(entry, gt, iou_types)
        if problem:
            raise UserError(f"{path}: entry {n}: {problem}")
    without_box = [n for n, entry in enumerate(content) if "bbox" not in entry]
    if "bbox" in iou_types and 0 < len(without_box) < len(content):
        raise UserError(
            f"{path}: entry {without_box[0]}: has no bbox, but others have: give each detection "
            "a box, or none"
        )
    with_mask = [n for n, entry in enumerate(content) if "segmentation" in entry]
    found = rle_problem(
        [content[n]["segmentation"]["counts"] for n in with_mask],
        [gt.sizes[content[n]["image_id"]] for n in with_mask],
    )
    if found:
        raise UserError(f"{path}: entry {with_mask[found[0]]}: {found[1]}")
    return content


def coverage_warnings(covered: Mapping[str, Collection[int]], gt: GroundTruth) -> List[str]:
    """Warnings about results without detections on some images, whose objects count as missed.

    Args:
        covered: name of a run -> ids of the images on which it has detections.
        gt: Ground truth.
    """
    total = len(gt.sizes)
    widest = max(covered, key=lambda run: len(covered[run]))
    warnings = []
    for run, images in covered.items():
        if not images:
            warnings.append(f"{run}: no detections at all.")
            continue
        own, other = set(images), set(covered[widest])
        if len(own & other) < len(own | other) / 2:
            warnings.append(
                f"{run} and {widest} have detections on different images, {len(own & other)} in "
                f"common of {len(own | other)}: were they made for the same images of {gt.path}?"
            )
        elif len(own) < _SIMILAR * len(other) or len(own) < total / 2:
            warnings.append(
                f"{run}: detections on {len(own)} of {total} images; the objects of the others "
                "count as missed."
            )
    return warnings


def _named(key: Any) -> str:
    """An id as text, with its type if only the type is wrong: 1.0 and "1" are not the id 1."""
    if is_int(key) or key is None:
        return str(key)
    return f"{key}, a {type(key).__name__} (ids are integers)"


def _detection_problem(entry: Any, gt: GroundTruth, iou_types: Sequence[str]) -> str:
    if not isinstance(entry, dict):
        return f"is a {type(entry).__name__}, not a detection"
    for field in ("image_id", "category_id", "score"):
        if entry.get(field) is None:
            return f"has no {field}"
    image, category, score = entry["image_id"], entry["category_id"], entry["score"]
    if not is_int(image) or image not in gt.sizes:
        return f"unknown image_id {_named(image)}; it is not in {gt.path}"
    if not is_int(category) or category not in gt.categories:
        return f"unknown category_id {_named(category)}; it is not in {gt.path}"
    if not is_number(score) or not 0 <= score <= 1:
        return f"score {score} is not a number from 0 to 1"
    if "bbox" in entry:
        problem = box_problem(entry["bbox"])
        if problem:
            return problem
    elif "segmentation" not in entry:
        return "has neither bbox nor segmentation"
    if "segmentation" not in entry:
        if "segm" in iou_types:
            return "has no segmentation; leave segm out of --iou-type"
        return ""
    mask = entry["segmentation"]
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str):
        return 'segmentation is not a compressed RLE {"size": [h, w], "counts": "..."}'
    if not is_size(mask.get("size"), gt.sizes[image]):
        return f"RLE of size {mask.get('size')}, image {image} is {list(gt.sizes[image])}"
    return ""
