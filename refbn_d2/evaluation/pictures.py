"""The images on which two norms differ most: ground truth | baseline | other, side by side."""

import base64
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from ..io.json import read_json
from .ap import Evaluation
from .comparison import Comparison, Group

__all__ = ["differing_images", "draw"]

_PER_DIRECTION = 3
_HEIGHT = 360  # pixels of a panel in the report


def differing_images(base: Group, other: Group, iou_type: str) -> List[Tuple[int, float]]:
    """(image id, difference of its AP at IoU 0.5 in percent), the most differing ones.

    As many for the other norm as for the baseline, so that the choice itself takes no side; AP of
    an image is the mean over seeds.
    """
    a, b = (_image_means(g.scores[iou_type]) for g in (base, other))
    delta = {key: 100 * (b.get(key, 0.0) - a.get(key, 0.0)) for key in a.keys() | b.keys()}
    order = sorted(delta, key=lambda key: (-delta[key], key))
    gains = [k for k in order[:_PER_DIRECTION] if delta[k] > 0]
    losses = [k for k in order[::-1][:_PER_DIRECTION] if delta[k] < 0]
    return [(key, delta[key]) for key in gains + losses]


def _image_means(scores: Sequence[Evaluation]) -> Dict[int, float]:
    keys = {key for s in scores for key in s.images}
    return {key: float(np.mean([s.images.get(key, 0.0) for s in scores])) for key in keys}


def draw(comparison: Comparison, base: Group, other: Group, iou_type: str, folder: Path) -> list:
    """Draws the images of ``differing_images`` that are in ``folder``.

    A norm is shown by that of its runs whose AP on the image is nearest their mean, and by as many
    of the best-scored detections as there are objects: like AP, that asks for no threshold.

    Returns:
        of each image {"id", "delta", "panels": [(title, data URI)]}; empty without images.
    """
    chosen = differing_images(base, other, iou_type)
    files = {i["id"]: folder / str(i.get("file_name", "")) for i in comparison.gt.dataset["images"]}
    chosen = [(key, delta) for key, delta in chosen if files[key].is_file()]
    ids = {key for key, _ in chosen}
    if not ids:
        return []
    truth = _by_image(comparison.gt.dataset["annotations"], ids)
    found = [_typical_detections(g, iou_type, ids) for g in (base, other)]
    pictures = []
    for key, delta in chosen:
        panels = [("ground truth", _panel(comparison, files[key], truth[key], iou_type))]
        count = max(1, sum(not a.get("iscrowd") for a in truth[key]))
        for group, entries in zip((base, other), found):
            best = sorted(entries[key], key=lambda e: -e["score"])[:count]
            panels.append((group.name, _panel(comparison, files[key], best, iou_type)))
        pictures.append({"id": key, "delta": delta, "panels": panels})
    return pictures


def _typical_detections(group: Group, iou_type: str, ids) -> Dict[int, List[Dict[str, Any]]]:
    scores = group.scores[iou_type]
    means = _image_means(scores)
    runs: Dict[int, List[int]] = {}
    for key in ids:
        gaps = [abs(s.images.get(key, 0.0) - means.get(key, 0.0)) for s in scores]
        runs.setdefault(int(np.argmin(gaps)), []).append(key)
    found: Dict[int, List[Dict[str, Any]]] = {}
    for run, keys in runs.items():
        found.update(_by_image(read_json(group.runs[run].results), set(keys)))
    return found


def _by_image(entries: List[Dict[str, Any]], ids) -> Dict[int, List[Dict[str, Any]]]:
    found: Dict[int, List[Dict[str, Any]]] = {key: [] for key in ids}
    for entry in entries:
        if entry["image_id"] in ids:
            found[entry["image_id"]].append(entry)
    return found


def _panel(comparison, file: Path, entries, iou_type: str) -> str:
    """One picture with its objects, as a data URI."""
    import cv2
    from detectron2.data.catalog import Metadata
    from detectron2.data.detection_utils import read_image
    from detectron2.utils.colormap import colormap
    from detectron2.utils.visualizer import Visualizer

    gt = comparison.gt
    rgb = read_image(str(file), format="RGB")
    names = list(gt.categories)
    palette = colormap(rgb=True, maximum=1)
    visualizer = Visualizer(rgb, Metadata(name="report"), scale=_HEIGHT / rgb.shape[0])
    if entries:
        masks = None
        if iou_type == "segm":
            masks = [gt.coco.ann_to_mask({**e, "id": 0}) for e in entries]
        boxes = [_corners(e, gt) for e in entries]
        visualizer.overlay_instances(
            boxes=np.array(boxes),
            masks=masks,
            labels=[_label(e, gt.categories) for e in entries],
            assigned_colors=[
                palette[names.index(e["category_id"]) % len(palette)] for e in entries
            ],
        )
    drawn = visualizer.output.get_image()
    _, jpeg = cv2.imencode(".jpg", drawn[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()


def _corners(entry: Dict[str, Any], gt) -> List[float]:
    from pycocotools import mask as mask_util

    box = entry.get("bbox")
    if box is None:
        box = mask_util.toBbox(gt.coco.ann_to_rle({**entry, "id": 0})).tolist()
    x, y, w, h = box
    return [x, y, x + w, y + h]


def _label(entry: Dict[str, Any], names: Dict[int, str]) -> str:
    name = names[entry["category_id"]]
    if entry.get("iscrowd"):
        return f"{name} (crowd)"
    return f"{name} {entry['score']:.0%}" if "score" in entry else name
