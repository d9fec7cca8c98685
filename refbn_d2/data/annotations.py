"""Data sets in detectron2's standard format whose annotations training cannot use."""

from typing import Any, Dict, Iterable

from detectron2.structures import BoxMode

from ..errors import UserError
from ..io.coco import box_problem, is_int, masks_problem

__all__ = ["check_dicts"]


def check_dicts(dicts: Iterable[Dict[str, Any]], where: str) -> None:
    """Raises a UserError for the first annotation that training could not use.

    Args:
        dicts: of detectron2's standard data set format; boxes in other modes than XYWH_ABS, which
            is COCO's, are not looked at.
        where: the data set, for the message.
    """
    masks, sizes, owners = [], [], []
    for d in dicts:
        image = f"{where}: image {d.get('file_name', d.get('image_id'))}"
        size = d.get("height"), d.get("width")
        if not all(is_int(s) and s > 0 for s in size):
            raise UserError(f"{image}: height and width are {size}, not whole numbers > 0")
        for n, annotation in enumerate(d.get("annotations", ())):
            if annotation.get("bbox_mode") == BoxMode.XYWH_ABS:
                problem = box_problem(annotation.get("bbox"))
                if problem:
                    raise UserError(f"{image}, annotation {n}: {problem}")
            if annotation.get("segmentation"):
                masks.append(annotation["segmentation"])
                sizes.append(size)
                owners.append(f"{image}, annotation {n}")
    found = masks_problem(masks, sizes)
    if found:
        raise UserError(f"{owners[found[0]]}: {found[1]}")
