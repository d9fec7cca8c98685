"""The quick data set: generated scenes of handwritten digits in COCO format.

The digits are real: scikit-learn's copy of the UCI digits (1,797 samples of 8x8 pixels, CC BY 4.0).
A scene has several digits, scaled, rotated and overlapping, on textured noise. Train and val scenes
use disjoint digits.
"""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
from detectron2.data.datasets import load_coco_json
from pycocotools import mask as mask_util

from ..extras import needs_extra
from ..io.atomic import PARTIAL
from ..io.lock import folder_lock
from .catalog import register_once
from .coco_json import read_coco

__all__ = [
    "SPLITS",
    "STYLES",
    "background",
    "digit_samples",
    "generate",
    "light",
    "paste",
    "register",
    "root",
]

IMAGE_SIZE = 128
# Name -> (number of scenes, seed). With these sizes a run takes minutes on one CPU core.
SPLITS: Dict[str, Tuple[int, int]] = {"train": (1200, 1), "val": (300, 2)}
# Lighting of a scene: gain and offset of its pixels. A batch with one style is not i.i.d.
STYLES: Dict[str, Tuple[float, float]] = {
    "plain": (1.0, 0.0),
    "dim": (0.5, 5.0),
    "bright": (0.75, 60.0),
    "fog": (0.45, 125.0),
}
CLASSES = [str(d) for d in range(10)]
_VERSION = "v1"  # part of the folder's name; increase it when the contents change


def root() -> Path:
    """Returns the folder of the data set, which may not exist yet, in $DETECTRON2_DATASETS."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / f"quick_digits_{_VERSION}"


def digit_samples(split: str) -> Tuple[np.ndarray, np.ndarray]:
    """Returns the digits and labels that the scenes of ``split`` ("train" or "val") use.

    Returns:
        float32 (n, 8, 8) in [0, 1] and int64 (n,) in 0..9.
    """
    with needs_extra():
        from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 4 == 3) == (split == "val")
    return (digits.images[chosen] / 16).astype("float32"), digits.target[chosen]


def paste(
    image: np.ndarray, stroke: np.ndarray, size: float, center: Tuple[float, float], angle: float
) -> np.ndarray:
    """Draws a digit into a grey image.

    Args:
        image: Grey image, float32 (H, W) in [0, 255], changed in place.
        stroke: Digit, float32 (8, 8) in [0, 1].
        size: Height and width of the digit in the image, in pixels.
        center: Center (x, y) of the digit in pixels.
        angle: Rotation in degrees.

    Returns:
        Mask of the pixels that the digit covers, bool (H, W).
    """
    import cv2

    scale = size / 8
    matrix: np.ndarray = cv2.getRotationMatrix2D((3.5, 3.5), angle, scale)
    matrix[:, 2] += np.asarray(center) - 3.5
    height, width = image.shape
    ink = cv2.warpAffine(stroke, matrix, (width, height), flags=cv2.INTER_CUBIC)
    alpha = np.clip((ink - 0.25) * 4, 0, 1)
    # A dark rim, so that the edges of overlapping digits are visible.
    image *= 1 - 0.8 * cv2.dilate(alpha, np.ones((5, 5), "uint8"))
    image *= 1 - alpha
    image += alpha * 255 * np.clip(0.6 + 0.4 * ink, 0, 1)
    return ink > 0.375


def background(rng: np.random.Generator, size: int = IMAGE_SIZE) -> np.ndarray:
    """Draws a background of dark clouds with fine noise, float32 (size, size) in [0, 255]."""
    import cv2

    coarse = rng.uniform(0, 90, (6, 6)).astype("float32")
    clouds = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(clouds + rng.normal(0, 12, (size, size)).astype("float32"), 0, 255)


def light(image: np.ndarray, style: str) -> np.ndarray:
    """Applies the lighting ``style`` to an image, float32 in [0, 255]; returns uint8."""
    gain, offset = STYLES[style]
    return np.clip(image * gain + offset, 0, 255).astype("uint8")


def _scene(rng: np.random.Generator, strokes: np.ndarray, labels: np.ndarray):
    """Draws a scene: an image, uint8 (H, W), its style, and its objects as (label, mask)."""
    style = str(rng.choice(list(STYLES)))
    image = background(rng)
    objects: List[Tuple[int, np.ndarray]] = []
    for _ in range(rng.integers(2, 7)):
        k = rng.integers(len(labels))
        size = rng.uniform(28, 72)
        center = rng.uniform(size * 0.35, IMAGE_SIZE - size * 0.35, 2)
        mask = paste(image, strokes[k], size, tuple(center), rng.uniform(-12, 12))
        # The new digit covers the older ones.
        objects = [(label, old & ~mask) for label, old in objects]
        objects.append((int(labels[k]), mask))
    return light(image, style), style, [(label, m) for label, m in objects if m.sum() >= 60]


def generate(folder: Path) -> None:
    """Writes the images and instances_{train,val}.json to ``folder``, the same bytes each time."""
    from tqdm import tqdm

    with needs_extra():
        import cv2

    for split, (num_scenes, seed) in SPLITS.items():
        rng = np.random.default_rng(seed)
        strokes, labels = digit_samples(split)
        (folder / split).mkdir(parents=True)
        images: List[Dict[str, Any]] = []
        annotations: List[Dict[str, Any]] = []
        for image_id in tqdm(range(1, num_scenes + 1), desc=f"quick data, {split}"):
            image, style, objects = _scene(rng, strokes, labels)
            file_name = f"{image_id:06d}.png"
            cv2.imwrite(str(folder / split / file_name), image)
            images.append(
                {
                    "id": image_id,
                    "file_name": file_name,
                    "height": IMAGE_SIZE,
                    "width": IMAGE_SIZE,
                    "style": style,
                }
            )
            for label, mask in objects:
                rle = mask_util.encode(np.asfortranarray(mask))
                rle["counts"] = rle["counts"].decode()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": label + 1,
                        "bbox": mask_util.toBbox(rle).tolist(),
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": rle,
                    }
                )
        content = {
            "info": {"description": "Scenes of handwritten digits, generated by refbn_d2"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": d + 1, "name": name} for d, name in enumerate(CLASSES)],
        }
        (folder / f"instances_{split}.json").write_text(json.dumps(content))


def _ensure() -> Path:
    """Generates the data set if it does not exist. One process generates it, others wait."""
    folder = root()
    if not folder.exists():
        with folder_lock(folder.parent, name=f".{folder.name}.lock", wait=True):
            partial = folder.with_name(folder.name + PARTIAL)
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            if not folder.exists():
                partial.mkdir()
                try:
                    generate(partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return folder


def _load(split: str) -> List[dict]:
    folder = _ensure()
    json_file = folder / f"instances_{split}.json"
    images = read_coco(str(json_file)).imgs
    dicts = load_coco_json(str(json_file), str(folder / split), f"quick_digits_{split}")
    # load_coco_json drops keys that are not in COCO's format, such as "style".
    for d in dicts:
        d["style"] = images[d["image_id"]]["style"]
    return dicts


def register() -> None:
    """Registers quick_digits_train and quick_digits_val. They are generated at their first use."""
    for split in SPLITS:
        name = f"quick_digits_{split}"
        register_once(
            name,
            functools.partial(_load, split),
            json_file=str(root() / f"instances_{split}.json"),
            image_root=str(root() / split),
            evaluator_type="coco",
        )
