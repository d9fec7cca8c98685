"""Images of single handwritten digits, drawn as in the quick data set, for pretraining."""

import functools
from typing import Any, Dict, List

import numpy as np
import torch

from . import quick
from .catalog import register_once

__all__ = ["CropMapper", "register"]

CROP_SIZE = 64


class CropMapper:
    """Dataset mapper that draws a digit on a background, in a random pose.

    In evaluation the pose depends on the sample only.
    """

    def __init__(self, is_train: bool):
        self._is_train = is_train

    def __call__(self, d: Dict[str, Any]) -> Dict[str, Any]:
        # Seeded from np.random, which detectron2's augmentations use and its workers seed.
        rng = np.random.default_rng(
            np.random.randint(2**31) if self._is_train else [0, d["image_id"]]
        )
        image = quick.background(rng, CROP_SIZE)
        if rng.random() < 0.5:  # a partly hidden neighbour, as in the scenes
            corner = rng.choice([0.0, CROP_SIZE], 2)
            quick.paste(image, d["stroke"][::-1], rng.uniform(28, 56), tuple(corner), 0.0)
        size = rng.uniform(28, 72)
        center = CROP_SIZE / 2 + rng.uniform(-6, 6, 2)
        quick.paste(image, d["stroke"], size, tuple(center), rng.uniform(-12, 12))
        pixels = torch.from_numpy(quick.light(image, str(rng.choice(list(quick.STYLES))))).expand(
            3, -1, -1
        )
        return {"image": pixels, "label": d["label"], "image_id": d["image_id"]}


def _load(split: str) -> List[Dict[str, Any]]:
    strokes, labels = quick.digit_samples(split)
    return [
        {"image_id": k, "label": int(y), "stroke": s, "width": CROP_SIZE, "height": CROP_SIZE}
        for k, (s, y) in enumerate(zip(strokes, labels))
    ]


def register() -> None:
    """Registers quick_digits_crops_train and quick_digits_crops_val."""
    for split in quick.SPLITS:
        name = f"quick_digits_crops_{split}"
        load = functools.partial(_load, split)
        register_once(name, load, evaluator_type="classification", mapper=CropMapper)
