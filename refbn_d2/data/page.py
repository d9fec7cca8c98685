"""Writes a page about a data set: sample images with boxes and masks, counts, sizes, groups."""

import base64
import html
import io
from pathlib import Path
from typing import Any, Counter, Dict, List, Sequence, Tuple

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from ..evaluation.printable import drawable
from ..io.atomic import atomic_write
from .errors import naming_the_file

__all__ = ["write_page"]

Part = Tuple[str, Any, List[str], Tuple[Counter, Counter, List[int], List[float]]]
_WIDTH = 360  # maximum width of a sample image in pixels

_read = naming_the_file(lambda d: read_image(d["file_name"], format="RGB"))
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
    "img{max-width:23em;margin:.3em}figure{display:inline-block;margin:0;vertical-align:top}"
    "td{padding:0 .8em}td.bar div{background:#4477aa;height:.9em}figcaption{font-size:80%}"
)


def write_page(path: Path, parts: Sequence[Part], samples: int) -> None:
    """Writes the page as one HTML file that needs no other files.

    Args:
        path: path of the page.
        parts: name, data set, lines of summary, and counts (objects of each class, images of each
            group, objects in each image, square roots of the boxes' areas in pixels) of each part.
        samples: number of images to draw from each part, spread over its groups.
    """
    blocks = [f"<!DOCTYPE html><meta charset=utf-8><title>data</title><style>{_STYLE}</style>"]
    for name, data, summary, (classes, groups, per_image, sizes) in parts:
        blocks.append(f"<h1>{html.escape(name)}</h1>")
        blocks += [f"<p>{html.escape(line)}</p>" for line in summary]
        blocks += [_bars("Objects of each class", classes), _bars("Images of each group", groups)]
        blocks.append(_histogram("Objects in an image", per_image))
        blocks.append(
            _histogram("Size of an object (square root of its box's area, pixels)", sizes)
        )
        blocks.append("<h2>Samples</h2>")
        blocks += [_sample(name, data.dicts[n]) for n in _chosen(data, samples)]
    with atomic_write(str(path), "wb") as f:
        f.write("\n".join(blocks).encode("utf-8", "backslashreplace"))


def _chosen(data: Any, number: int) -> List[int]:
    """Chooses images from all groups in turn; the choice is the same in every call."""
    groups: Dict[str, List[int]] = {}
    for n, d in enumerate(data.dicts):
        groups.setdefault(str(d.get("group")), []).append(n)
    rng = np.random.default_rng(0)
    orders = [rng.permutation(members).tolist() for _, members in sorted(groups.items())]
    turns = [order[k] for k in range(max(map(len, orders))) for order in orders if k < len(order)]
    return turns[:number]


def _drawn(d: Dict[str, Any], metadata: Metadata) -> np.ndarray:
    names = [drawable(name) for name in metadata.thing_classes]
    visualizer = Visualizer(_read(d), Metadata(**{**metadata.as_dict(), "thing_classes": names}))
    annotations = d["annotations"]
    if len(metadata.thing_classes) > 1 or not annotations:
        return visualizer.draw_dataset_dict(d).get_image()
    # With only one class its name on each object has no information, and would hide small objects.
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    has_masks = all(a.get("segmentation") for a in annotations)
    masks = [a["segmentation"] for a in annotations] if has_masks else None
    return visualizer.overlay_instances(boxes=np.array(boxes), masks=masks).get_image()


def _sample(name: str, d: Dict[str, Any]) -> str:
    image = Image.fromarray(_drawn(d, MetadataCatalog.get(name)))
    image.thumbnail((_WIDTH, _WIDTH * 4))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    source = base64.b64encode(file.getvalue()).decode()
    group = f", group {d['group']}" if "group" in d else ""
    caption = html.escape(f"{Path(d['file_name']).name}{group}")
    return (
        f'<figure><img src="data:image/jpeg;base64,{source}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _bars(title: str, counts: Counter) -> str:
    if not counts:
        return ""
    largest = max(1, *counts.values())
    rows = "".join(
        f"<tr><td>{html.escape(str(label))}<td>{n}"
        f'<td class=bar><div style="width:{20 * n / largest:.2f}em"></div>'
        for label, n in counts.most_common()
    )
    return f"<h2>{html.escape(title)}</h2><table>{rows}</table>"


def _histogram(title: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    numbers, edges = np.histogram(values, bins=12)
    rows = "".join(
        f"<tr><td>{low:.0f} to {high:.0f}<td>{n}"
        f'<td class=bar><div style="width:{20 * n / numbers.max():.2f}em"></div>'
        for n, low, high in zip(numbers, edges, edges[1:])
    )
    return f"<h2>{html.escape(title)}</h2><table>{rows}</table>"
