"""Reads ground truth and detections in COCO format, and refuses what COCO cannot mean.

pycocotools and hotcoco evaluate nonsense without a word (an unknown image is dropped, a mask of
another size is compared all the same), so every entry is checked here, before any AP exists.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Sequence, Tuple

from ..errors import UserError
from ..io.coco import box_problem, is_int, is_number, masks_problem
from ..io.json import read_json
from ..io.rle import rle_problem

if TYPE_CHECKING:
    import hotcoco

__all__ = [
    "IOU_TYPES",
    "GroundTruth",
    "check_ground_truth",
    "load_ground_truth",
    "load_results",
]

IOU_TYPES = ("bbox", "segm")


@dataclass(frozen=True)
class GroundTruth:
    """A checked data set.

    Attributes:
        path: the file it came from.
        dataset: the file's content.
        coco: hotcoco's index of it.
        sizes: image id -> (height, width) in pixels.
        categories: category id -> name.
    """

    path: Path
    dataset: Dict[str, Any]
    coco: "hotcoco.COCO"
    sizes: Dict[int, Tuple[int, int]]
    categories: Dict[int, str]


def _by_id(path: Path, entries: Any, kind: str) -> Dict[int, Dict[str, Any]]:
    if not isinstance(entries, list):
        raise UserError(f"{path}: is no COCO ground truth, it has no list of {kind}")
    found: Dict[int, Dict[str, Any]] = {}
    for n, entry in enumerate(entries):
        key = entry.get("id") if isinstance(entry, dict) else None
        if not is_int(key):
            raise UserError(f"{path}: {kind}[{n}] has no integer id")
        if key in found:
            raise UserError(f"{path}: id {key} occurs twice in {kind}")
        found[key] = entry
    return found


def load_ground_truth(path: Path, iou_types: Sequence[str]) -> GroundTruth:
    """Reads and checks COCO instance annotations.

    Args:
        path: JSON with images, annotations and categories.
        iou_types: of IOU_TYPES; "segm" asks for a segmentation in every annotation.

    Raises:
        UserError: naming the file and the first entry that is wrong.
    """
    import hotcoco  # check_ground_truth, which training calls, does without

    content = read_json(path)
    sizes, categories = check_ground_truth(path, content, iou_types)
    try:
        coco = hotcoco.COCO(content)
    except Exception as e:  # a field of a type that COCO does not give it
        raise UserError(f"{path}: is no COCO ground truth: {e}") from None
    return GroundTruth(path, content, coco, sizes, categories)


def check_ground_truth(
    path: Path, content: Any, iou_types: Sequence[str]
) -> Tuple[Dict[int, Tuple[int, int]], Dict[int, str]]:
    """Checks COCO instance annotations that are read already.

    Returns:
        Sizes and categories, see :class:`GroundTruth`.

    Raises:
        UserError: naming the file and the first entry that is wrong.
    """
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no COCO ground truth, but a {type(content).__name__}")
    images = _by_id(path, content.get("images"), "images")
    categories = _by_id(path, content.get("categories"), "categories")
    annotations = _by_id(path, content.get("annotations"), "annotations")
    if not images:
        raise UserError(f"{path}: has no images")
    sizes = {}
    for key, image in images.items():
        size = image.get("height"), image.get("width")
        if not all(is_int(s) and s > 0 for s in size):
            raise UserError(f"{path}: image {key} has no height and width")
        sizes[key] = size
    for key, annotation in annotations.items():
        where = f"{path}: annotation {key}"
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if not is_int(image) or image not in images:
            raise UserError(f"{where} is of unknown image {image}")
        if not is_int(category) or category not in categories:
            raise UserError(f"{where} is of unknown category {category}")
        problem = box_problem(annotation.get("bbox"))
        if problem:
            raise UserError(f"{where}: {problem}")
        if not is_number(annotation.get("area")) or annotation["area"] < 0:
            raise UserError(f"{where}: area {annotation.get('area')} is not a number >= 0")
        if annotation.get("iscrowd", 0) not in (0, 1):
            raise UserError(f"{where}: iscrowd {annotation['iscrowd']} is neither 0 nor 1")
        if "segm" in iou_types and not annotation.get("segmentation"):
            raise UserError(f"{where} has no segmentation; leave segm out of --iou-type")
    masked = [a for a in annotations.values() if a.get("segmentation")]
    problem = masks_problem(
        [a["segmentation"] for a in masked], [sizes[a["image_id"]] for a in masked]
    )
    if problem:
        raise UserError(f"{path}: annotation {masked[problem[0]]['id']}: {problem[1]}")
    return sizes, {k: str(c.get("name", k)) for k, c in categories.items()}


def load_results(path: Path, gt: GroundTruth, iou_types: Sequence[str]) -> List[Dict[str, Any]]:
    """Reads and checks detections in COCO's results format.

    Args:
        path: JSON list of {image_id, category_id, score, bbox and/or segmentation}. An empty list
            is a model that found nothing.
        iou_types: what will be evaluated; "segm" needs RLE masks of the image's size, "bbox" a box
            or a mask (COCO then takes the mask's box).

    Raises:
        UserError: naming the file and the first entry that is wrong.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path}: results must be a list, this is a {type(content).__name__}")
    for n, entry in enumerate(content):
        problem = _detection_problem(entry, gt, iou_types)
        if problem:
            raise UserError(f"{path}: entry {n}: {problem}")
    with_mask = [n for n, entry in enumerate(content) if "segmentation" in entry]
    problem = rle_problem(
        [content[n]["segmentation"]["counts"] for n in with_mask],
        [gt.sizes[content[n]["image_id"]] for n in with_mask],
    )
    if problem:
        raise UserError(f"{path}: entry {with_mask[problem[0]]}: {problem[1]}")
    return content


def _detection_problem(entry: Any, gt: GroundTruth, iou_types: Sequence[str]) -> str:
    if not isinstance(entry, dict):
        return f"is a {type(entry).__name__}, not a detection"
    image, category, score = (entry.get(k) for k in ("image_id", "category_id", "score"))
    if not is_int(image) or image not in gt.sizes:
        return f"unknown image_id {image}; it is not in {gt.path}"
    if not is_int(category) or category not in gt.categories:
        return f"unknown category_id {category}; it is not in {gt.path}"
    if not is_number(score) or score < 0:
        return f"score {score} is not a number >= 0"
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
    if mask.get("size") != list(gt.sizes[image]):
        return f"RLE of size {mask.get('size')}, image {image} is {list(gt.sizes[image])}"
    return ""
