"""Small versions of the detectors that come with the package, and data to train them on."""

from pathlib import Path
from typing import Dict, List, NamedTuple

import cv2
import numpy as np
import tiny
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from torch import nn

from refbn_d2.config import load_config
from refbn_d2.config_files import get_config_file
from refbn_d2.engine import Trainer
from refbn_d2.statistics.reference import reference_layers

NUM_STUFF = 3


class Detector(NamedTuple):
    """A detector, or a segmentation model, with RefBN wherever it has a NORM key.

    Attributes:
        config: name of its config.
        places: key of a norm -> what the names of its layers begin with or contain.
        data: data set, without _train or _val.
    """

    config: str
    places: Dict[str, str]
    data: str


_BACKBONE = {"MODEL.RESNETS.NORM": "bottom_up.", "MODEL.FPN.NORM": "backbone.fpn_"}
_BOX = {"MODEL.ROI_BOX_HEAD.NORM": "box_head"}
_MASK = {"MODEL.ROI_MASK_HEAD.NORM": "mask_head"}
_SEM_SEG = {"MODEL.SEM_SEG_HEAD.NORM": "sem_seg_head"}

DETECTORS = {
    "Mask R-CNN C4": Detector(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x_refbn.yaml",
        {"MODEL.RESNETS.NORM": ""},  # res5 is the RoI head
        "tiny",
    ),
    "Mask R-CNN FPN": Detector(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_refbn.yaml",
        {**_BACKBONE, **_BOX, **_MASK},
        "tiny",
    ),
    "Faster R-CNN FPN": Detector(
        "COCO-Detection/faster_rcnn_R_50_FPN_1x_refbn.yaml", {**_BACKBONE, **_BOX}, "tiny"
    ),
    "RetinaNet": Detector(
        "COCO-Detection/retinanet_R_50_FPN_1x_refbn.yaml",
        {**_BACKBONE, "MODEL.RETINANET.NORM": "head."},
        "tiny",
    ),
    "Cascade Mask R-CNN": Detector(
        "Misc/cascade_mask_rcnn_R_50_FPN_1x_refbn.yaml", {**_BACKBONE, **_BOX, **_MASK}, "tiny"
    ),
    "Panoptic FPN": Detector(
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x_refbn.yaml",
        {**_BACKBONE, **_BOX, **_MASK, **_SEM_SEG},
        "tiny_panoptic",
    ),
    "Semantic FPN": Detector(
        "Misc/semantic_R_50_FPN_1x_refbn.yaml", {**_BACKBONE, **_SEM_SEG}, "tiny_semantic"
    ),
}


def write_segmentation(folder: Path) -> None:
    """Registers tiny_panoptic_* and tiny_semantic_*: the tiny images, a class for each pixel."""
    for split in ("train", "val"):
        images = folder / "coco" / f"{split}2017"
        labels = folder / "coco" / f"labels_{split}"
        labels.mkdir(exist_ok=True)
        for file in images.iterdir():
            brightness = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
            classes = np.clip(brightness // 90, 0, NUM_STUFF - 1).astype(np.uint8)
            cv2.imwrite(str(labels / f"{file.stem}.png"), classes)
        json_file = folder / "coco/annotations" / f"instances_{split}2017.json"
        for kind, evaluator in (("panoptic", "coco"), ("semantic", "sem_seg")):
            name = f"tiny_{kind}_{split}"
            for catalog in (DatasetCatalog, MetadataCatalog):
                if name in catalog.list():
                    catalog.remove(name)
            DatasetCatalog.register(
                name,
                lambda n=name, j=json_file, i=images, s=labels, k=kind: _dicts(n, j, i, s, k),
            )
            MetadataCatalog.get(name).set(
                evaluator_type=evaluator,
                stuff_classes=[str(k) for k in range(NUM_STUFF)],
                ignore_label=255,
                json_file=str(json_file),
                image_root=str(images),
            )


def _dicts(name: str, json_file: Path, images: Path, labels: Path, kind: str) -> List[dict]:
    dicts = load_coco_json(str(json_file), str(images), name if kind == "panoptic" else None)
    for d in dicts:
        d["sem_seg_file_name"] = str(labels / (Path(d["file_name"]).stem + ".png"))
        if kind == "semantic":
            del d["annotations"]
    return dicts


def small_opts(detector: Detector, **changes) -> List[str]:
    """KEY VALUE pairs that make a detector small: an eighth of its width, the tiny data."""
    small = {
        "DATASETS__TRAIN": (f"{detector.data}_train",),
        "DATASETS__TEST": (f"{detector.data}_val",),
        "MODEL__WEIGHTS": "",
        "MODEL__FPN__OUT_CHANNELS": 8,
        "MODEL__ANCHOR_GENERATOR__SIZES": [[8], [16], [24], [32], [48]],
        "MODEL__ROI_BOX_HEAD__CONV_DIM": 8,
        "MODEL__ROI_BOX_HEAD__FC_DIM": 8,
        "MODEL__ROI_MASK_HEAD__POOLER_RESOLUTION": 6,
        "MODEL__SEM_SEG_HEAD__CONVS_DIM": 8,
        "MODEL__SEM_SEG_HEAD__NUM_CLASSES": NUM_STUFF,
        "SOLVER__BASE_LR": 0.001,
    }
    if "C4" in detector.config:
        del small["MODEL__ANCHOR_GENERATOR__SIZES"]
    return tiny.opts(**{**small, **changes})


def count_layers(model: nn.Module, detector: Detector) -> Dict[str, int]:
    """Layers with a reference in each place of a detector."""
    names = list(reference_layers(model))
    return {key: sum(part in n for n in names) for key, part in detector.places.items()}


def train(detector: Detector, folder: Path, max_iter: int, resume: bool = False) -> Trainer:
    """Trains a small version of the detector, reference and evaluation included."""
    opts = small_opts(detector, OUTPUT_DIR=folder, SOLVER__MAX_ITER=max_iter)
    cfg = load_config(get_config_file(detector.config), opts)
    folder.mkdir(exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer
