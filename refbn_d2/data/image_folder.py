"""Data sets in the layout of ImageNet: one folder per split with one folder of images per class."""

import os
from pathlib import Path
from typing import Any, Dict, List

from detectron2.data import DatasetCatalog, MetadataCatalog
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset, pil_loader
from torchvision.transforms import InterpolationMode, v2

from ..errors import UserError

__all__ = ["ImageFolderMapper", "register", "register_image_folders"]

CROP_SIZE = 224
SPLITS = ("train", "val")


class ImageFolderMapper:
    """Dataset mapper that reads an image as uint8 (3, 224, 224) in RGB, and its label.

    In training it takes a random crop and flips it with probability 1/2. In evaluation it resizes
    the shorter side to 256 pixels and takes the center crop. Images stay uint8 while resized.
    """

    def __init__(self, is_train: bool):
        # With antialiasing, as in Pillow, with which published accuracies were measured.
        options = {"interpolation": InterpolationMode.BILINEAR, "antialias": True}
        if is_train:
            steps = [v2.RandomResizedCrop(CROP_SIZE, **options), v2.RandomHorizontalFlip()]
        else:
            steps = [v2.Resize(256, **options), v2.CenterCrop(CROP_SIZE)]
        self._transform = v2.Compose([v2.PILToTensor(), *steps])

    def __call__(self, d: Dict[str, Any]) -> Dict[str, Any]:
        image = self._transform(pil_loader(d["file_name"]))
        return {"image": image, "label": d["label"], "image_id": d["image_id"]}


def _classes(folder: Path) -> List[str]:
    try:
        return find_classes(str(folder))[0]
    except FileNotFoundError as e:
        if not folder.is_dir():
            raise FileNotFoundError(None, None, str(folder)) from e
        raise UserError(
            f"{folder}: has no folders; ImageNet's layout has one folder of images per class here"
        ) from None


def _load(root: Path, split: str) -> List[Dict[str, Any]]:
    classes = _classes(root / split)
    for other in SPLITS:
        if (root / other).is_dir() and (difference := set(classes) ^ set(_classes(root / other))):
            raise UserError(
                f"{root / split} and {root / other} differ in {len(difference)} classes, e.g. "
                f"{min(difference)!r}: a class must have a folder in both"
            )
    numbers = {name: k for k, name in enumerate(classes)}
    try:
        samples = make_dataset(str(root / split), numbers, IMG_EXTENSIONS)
    except FileNotFoundError as e:
        raise UserError(f"{root / split}: {str(e).splitlines()[0]}") from None
    return [{"image_id": k, "label": y, "file_name": f} for k, (f, y) in enumerate(samples)]


def register_image_folders(name: str, root: str) -> None:
    """Registers {name}_train and {name}_val for ``root``/train and ``root``/val.

    Each folder in them is a class. The label is the index of its name in the sorted list of names.
    MODEL.CLASSIFIER.NUM_CLASSES must be the number of folders.

    Args:
        name: Prefix of the names of the data sets.
        root: Path of the folder with "train" and "val".
    """
    for split in SPLITS:
        full_name = f"{name}_{split}"
        DatasetCatalog.register(full_name, lambda split=split: _load(Path(root), split))
        MetadataCatalog.get(full_name).set(
            evaluator_type="classification", mapper=ImageFolderMapper
        )


def register() -> None:
    """Registers imagenet_train and imagenet_val in the folder $DETECTRON2_DATASETS/imagenet."""
    if "imagenet_train" not in DatasetCatalog.list():
        register_image_folders(
            "imagenet", os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "imagenet")
        )
