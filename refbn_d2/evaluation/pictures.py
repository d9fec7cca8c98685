"""The images on which two norms differ most: ground truth | baseline | other, side by side."""

import base64
import io
import warnings
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Sequence, Tuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools import mask as mask_util

from ..errors import UserError
from ..io.images import read_rgb
from ..io.json import read_json
from .ap import Evaluation
from .comparison import Comparison, NormRuns
from .inputs import GroundTruth
from .printable import printable
from .text import TITLES

__all__ = ["differing_images", "draw", "pictures"]

_PER_DIRECTION = 3
_HEIGHT, _DPI = 400, 110  # height of a panel in pixels, and pixels per inch
# A category has the same colour in all panels. Bright colours are visible on photographs.
_COLORS = ["#ff5a4f", "#3fa7ff", "#ffb000", "#2ecc71", "#e26bff", "#00d1c7", "#ff8ad1", "#c6e000"]


def pictures(
    comparison: Comparison, images: Optional[Path] = None
) -> Tuple[List[Dict[str, Any]], List[str]]:
    """The pictures of a report.

    Args:
        comparison: The comparison of the norms.
        images: Folder of the data set's images; None: the one that the run folders name, if any.

    Returns:
        For each norm {"title", "images": result of ``draw``}, and one sentence on each image that
        cannot be drawn.
    """
    iou_type = comparison.iou_types[-1]  # masks show more than boxes, if there are masks
    found = []
    notes: List[str] = []
    for group in comparison.clearest():
        base = comparison.base_of(group.label)
        folder = images or group.runs[0].image_root
        if folder is None:
            continue
        if folder.is_dir():
            drawn, problems = draw(comparison, base, group, iou_type, folder)
        else:
            drawn, problems = [], [f"No images are drawn: {folder} is no folder."]
        notes += [text for text in problems if text not in notes]
        if drawn:
            title = f"{group.label} against {base.name}, {TITLES[iou_type]}"
            found.append({"title": title, "images": drawn})
    return found, notes


def differing_images(base: NormRuns, other: NormRuns, iou_type: str) -> List[Tuple[int, float]]:
    """The images on which two norms differ most.

    As many images favour the other norm as the baseline, as far as there are such images, so that
    the choice does not favour either. AP of an image is the mean over seeds.

    Returns:
        (image id, difference of its AP at IoU 0.5 in percent) of each image.
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


def draw(
    comparison: Comparison, base: NormRuns, other: NormRuns, iou_type: str, folder: Path
) -> Tuple[List[Dict[str, Any]], List[str]]:
    """Draws the images of ``differing_images`` that are in ``folder``.

    For each norm, the run is shown whose AP on the image is nearest to the mean over its runs. As
    many of its best-scored detections are drawn as there are objects. Like AP, this needs no score
    threshold.

    Returns:
        For each image drawn {"id", "delta", "panels": [(title, data URI)]}, and one sentence on
        each image that cannot be drawn.
    """
    chosen = dict(differing_images(base, other, iou_type))
    pixels, notes = {}, []
    for image in comparison.gt.dataset["images"]:
        key, name = image["id"], image.get("file_name")
        if key not in chosen:
            continue
        try:
            if not name:
                raise UserError(f"image {key} has no file_name")
            pixels[key] = read_rgb(folder / name, comparison.gt.sizes[key])
        except UserError as e:
            notes.append(f"Not drawn: {e}")
    truth = _by_image(comparison.gt.dataset["annotations"], pixels.keys())
    found = [_typical_detections(g, iou_type, pixels.keys()) for g in (base, other)]
    drawn = []
    for key, delta in chosen.items():
        if key not in pixels:
            continue
        count = max(1, sum(not a.get("iscrowd") for a in truth[key]))
        panels = [("ground truth", truth[key])]
        for group, entries in zip((base, other), found):
            panels.append((group.name, sorted(entries[key], key=lambda e: -e["score"])[:count]))
        uris = [(t, _panel(comparison.gt, pixels[key], e, iou_type)) for t, e in panels]
        drawn.append({"id": key, "delta": delta, "panels": uris})
    return drawn, notes


def _typical_detections(
    group: NormRuns, iou_type: str, ids: Collection[int]
) -> Dict[int, List[Dict[str, Any]]]:
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


def _by_image(
    entries: List[Dict[str, Any]], ids: Collection[int]
) -> Dict[int, List[Dict[str, Any]]]:
    found: Dict[int, List[Dict[str, Any]]] = {key: [] for key in ids}
    for entry in entries:
        if entry["image_id"] in ids:
            found[entry["image_id"]].append(entry)
    return found


def _panel(gt: GroundTruth, rgb: np.ndarray, entries: List[Dict[str, Any]], iou_type: str) -> str:
    """One picture with its objects, as a data URI of a JPEG."""
    height, width = rgb.shape[:2]
    order = {key: n for n, key in enumerate(gt.categories)}
    # A name is text, not TeX. Characters that the font lacks should not cause a warning.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(_HEIGHT * width / height / _DPI, _HEIGHT / _DPI), dpi=_DPI)
        ax = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[])
        ax.imshow(rgb, extent=(0, width, height, 0), aspect="auto", interpolation="antialiased")
        for entry in entries:
            color = _COLORS[order[entry["category_id"]] % len(_COLORS)]
            x, y, w, h = _box(entry, gt)
            if iou_type == "segm":
                shape = np.pad(
                    gt.coco.ann_to_mask(_mask_fields(entry)), 1
                )  # also draws the outline of a mask along the edge of the image
                at = np.arange(-0.5, width + 1), np.arange(-0.5, height + 1)
                ax.contourf(*at, shape, levels=[0.5, 1.5], colors=[color], alpha=0.4)
                ax.contour(*at, shape, levels=[0.5], colors=[color], linewidths=1)
            ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=color, linewidth=1.2))
        # Names are drawn last, so that no mask covers them.
        for entry in entries:
            x, y, *_ = _box(entry, gt)
            color = _COLORS[order[entry["category_id"]] % len(_COLORS)]
            background = {"facecolor": "black", "edgecolor": color, "alpha": 0.7, "pad": 1.2}
            where = min(max(x, 0), width), min(max(y, 0), height)
            label = _label(entry, gt.categories)
            ax.text(*where, label, color="white", fontsize=7.5, va="top", bbox=background)
        ax.set(xlim=(0, width), ylim=(height, 0))
        file = io.BytesIO()
        figure.savefig(file, format="jpeg", pil_kwargs={"quality": 85})
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _box(entry: Dict[str, Any], gt: GroundTruth) -> List[float]:
    """x, y, width, height in pixels; for a detection without a box, those of its mask."""
    return entry.get("bbox") or mask_util.toBbox(gt.coco.ann_to_rle(_mask_fields(entry))).tolist()


def _mask_fields(entry: Dict[str, Any]) -> Dict[str, Any]:
    return {"id": 0, **{k: entry[k] for k in ("image_id", "category_id", "segmentation")}}


def _label(entry: Dict[str, Any], names: Dict[int, str]) -> str:
    name = printable(names[entry["category_id"]], 40)
    if entry.get("iscrowd"):
        return f"{name} (crowd)"
    return f"{name} {entry['score']:.0%}" if "score" in entry else name
