"""A COCO data set of a few small images, and a Mask R-CNN C4 that trains on it in a second."""

import json
import os
from pathlib import Path
from typing import Dict, List

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

ROOT = Path(__file__).parents[1]
# Wide, tall and square ones, so that the loader groups them and batches are padded.
SIZES = [(64, 80), (80, 64), (64, 64), (48, 80), (80, 56), (64, 72), (72, 64)]  # height, width

CONFIG = str(ROOT / "configs/Quick/mask_rcnn_R_50_C4_quick_refbn.yaml")

# An eighth of the quick configuration's width, and of everything else as little as goes.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 8,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 6,
    "MODEL.ROI_HEADS.NUM_CLASSES": 80,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 6,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 6,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "INPUT.MIN_SIZE_TRAIN": (64, 80),
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.RANDOM_FLIP": "horizontal",
    "INPUT.MASK_FORMAT": "polygon",
    "DATASETS.TRAIN": ("tiny_train",),
    "DATASETS.TEST": ("tiny_val",),
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1000,
    "TEST.DETECTIONS_PER_IMAGE": 5,
}


def opts(**changes) -> List[str]:
    """``KEY VALUE ...`` of SMALL; changes are keys with __ for the dot."""
    merged: Dict[str, object] = {**SMALL, **{k.replace("__", "."): v for k, v in changes.items()}}
    return [str(x) for pair in merged.items() for x in pair]


def cut_coco(source: Path, target: Path, **images: int) -> None:
    """COCO with the first images of each split ("train", "val") that have objects."""
    (target / "annotations").mkdir(parents=True)
    for split, number in images.items():
        (target / f"{split}2017").symlink_to((source / f"{split}2017").resolve())
        name = f"annotations/instances_{split}2017.json"
        content = json.loads((source / name).read_text())
        annotated = {a["image_id"] for a in content["annotations"]}
        content["images"] = [i for i in content["images"] if i["id"] in annotated][:number]
        kept = {i["id"] for i in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        (target / name).write_text(json.dumps(content))


def write_split(folder: Path, split: str, num_images: int) -> None:
    """Images and annotations of one split, in the layout of COCO 2017 below ``folder``/coco."""
    rng = np.random.default_rng(len(split))
    image_root = folder / "coco" / f"{split}2017"
    image_root.mkdir(parents=True)
    (folder / "coco" / "annotations").mkdir(exist_ok=True)
    categories = [c for c in COCO_CATEGORIES if c["isthing"]]
    images, annotations = [], []
    for n in range(num_images):
        height, width = SIZES[n % len(SIZES)]
        image = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
        for _ in range(2):
            w, h = rng.integers(16, 40, 2).tolist()
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            image[y : y + h, x : x + w] += 120
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": n + 1,
                    "category_id": categories[int(rng.integers(3))]["id"],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        cv2.imwrite(str(image_root / f"{n + 1:012d}.jpg"), image)
        images.append(
            {"id": n + 1, "file_name": f"{n + 1:012d}.jpg", "height": height, "width": width}
        )
    content = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c["id"], "name": c["name"]} for c in categories],
    }
    path = folder / "coco" / "annotations" / f"instances_{split}2017.json"
    path.write_text(json.dumps(content))


def write(folder: Path) -> Path:
    """The whole data set: 12 training and 3 validation images. Returns ``folder``."""
    write_split(folder, "train", 12)
    write_split(folder, "val", 3)
    return folder


def register(folder: Path, prefix: str = "tiny") -> None:
    """Registers ``{prefix}_train`` and ``{prefix}_val``, replacing what had these names."""
    for split in ("train", "val"):
        name = f"{prefix}_{split}"
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog.list():
                catalog.remove(name)
        json_file = str(folder / "coco" / "annotations" / f"instances_{split}2017.json")
        image_root = str(folder / "coco" / f"{split}2017")
        DatasetCatalog.register(
            name, lambda j=json_file, i=image_root, n=name: load_coco_json(j, i, n)
        )
        MetadataCatalog.get(name).set(
            json_file=json_file, image_root=image_root, evaluator_type="coco"
        )


def environment(**more: str) -> Dict[str, str]:
    """For subprocesses: the package from here, one thread."""
    path = os.pathsep.join(p for p in (str(ROOT), os.getenv("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}
