"""Runs a trained detector on single images, and compares the detections of two detectors."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import VisImage, Visualizer

from ..data.sets import load_dicts
from ..errors import UserError
from ..evaluation.printable import drawable
from ..log import get_logger
from .launcher import check_device
from .trainer import Trainer

__all__ = ["Predictor", "coco_results", "draw", "have_counterpart"]

logger = get_logger(__name__)

# Minimum length of the shorter side in pixels. Smaller images are enlarged to make text legible.
_MIN_SIDE = 400
_MAX_SIDE = 4000  # of an enlarged image
_GREY = (0.65, 0.65, 0.65)


class Predictor(DefaultPredictor):
    """detectron2's DefaultPredictor that loads and checks weights like :class:`Trainer`.

    Args:
        cfg: Config of the detector. Its norms are built as in training.
        weights: Path of the trained weights.

    Attributes:
        model: Detector in evaluation mode.
        metadata: Metadata of the first data set of DATASETS.TEST, with the names of the classes.
        image_ids: Path -> id of the images of DATASETS.TEST, so that results can be evaluated.

    Raises:
        UserError: If the weights cannot be read or do not fit the model, or if the config has
            another device or format of images than can be used here.
    """

    def __init__(self, cfg: CfgNode, weights: str):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = ""
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT}: predictions need RGB or BGR")
        check_device(cfg.MODEL.DEVICE)
        super().__init__(cfg)
        Trainer.build_checkpointer(cfg, self.model).load_to_evaluate(weights, resume=False)
        names = cfg.DATASETS.TEST or cfg.DATASETS.TRAIN[:1]
        # This also sets the names of the classes in the metadata.
        dicts = [d for name in names for d in _dicts_if_there(cfg, name)]
        if cfg.DATASETS.TEST:
            self.image_ids = {Path(d["file_name"]).resolve(): d["image_id"] for d in dicts}
        else:
            self.image_ids = {}
        self.metadata = MetadataCatalog.get(names[0] if names else "__unnamed")

    def __call__(self, original_image: np.ndarray) -> Dict[str, Any]:
        """Returns the model's outputs on the CPU for one image, uint8 (H, W, 3) in BGR.

        Raises:
            UserError: If nothing of the image would be left at the size that the config demands.
        """
        height, width = original_image.shape[:2]
        most = self.cfg.INPUT.MAX_SIZE_TEST
        if self.cfg.INPUT.MIN_SIZE_TEST and min(height, width) * most < max(height, width) / 2:
            raise UserError(
                f"an image of {height} x {width} pixels (height x width) is too narrow to be "
                f"resized to INPUT.MAX_SIZE_TEST {most}: use a larger one"
            )
        outputs = super().__call__(original_image)
        return {k: v.to("cpu") if hasattr(v, "to") else v for k, v in outputs.items()}


def _dicts_if_there(cfg: CfgNode, name: str) -> List[Dict[str, Any]]:
    """Loads a data set for the names of its classes and the ids of its images.

    A detector can be used on a machine that does not have the data set: the result is then empty.
    """
    try:
        return load_dicts(name, cfg, evaluated=False)
    except UserError as e:
        logger.warning("names of classes and ids of images are unknown: %s", e)
        return []


def coco_results(instances: Instances, image_id: int, metadata: Metadata) -> List[Dict[str, Any]]:
    """Converts the detections of one image to entries of a COCO results file.

    Args:
        instances: Detections.
        image_id: Id of the image in the data set.
        metadata: Metadata of the data set, by which classes are mapped to its category ids.
    """
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    original = {v: k for k, v in ids.items()} if ids else {}
    results = instances_to_coco_json(instances, image_id)
    for r in results:
        r["category_id"] = original.get(r["category_id"], r["category_id"])
    return results


def have_counterpart(instances: Instances, others: Instances, min_iou: float = 0.5) -> torch.Tensor:
    """Finds detections to which another model has one of the same class with an overlapping box.

    Args:
        instances: N detections of one model.
        others: Detections of the other model on the same image.
        min_iou: Minimum intersection over union of the two boxes.

    Returns:
        Whether each detection has a counterpart, bool (N,).
    """
    if len(instances) == 0 or len(others) == 0:
        return torch.zeros(len(instances), dtype=torch.bool)
    same = instances.pred_classes[:, None] == others.pred_classes[None, :]
    overlap = pairwise_iou(instances.pred_boxes, others.pred_boxes) >= min_iou
    return (same & overlap).any(dim=1)


def draw(
    image: np.ndarray,
    outputs: Dict[str, Any],
    metadata: Metadata,
    shared: Optional[torch.Tensor] = None,
) -> np.ndarray:
    """Draws the outputs of a detector or a segmentation model on the image.

    Args:
        image: Image, uint8 (H, W, 3) in BGR.
        outputs: Outputs of :class:`Predictor`.
        metadata: Metadata with the names and colours of the classes.
        shared: Detections to draw in grey, bool (N,); None for none.

    Returns:
        The drawing, uint8 (H', W', 3) in BGR. Its shorter side has at least 400 pixels, or its
        longer side 4000.
    """
    scale = max(1.0, min(_MIN_SIDE / min(image.shape[:2]), _MAX_SIDE / max(image.shape[:2])))
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale)
    if "panoptic_seg" in outputs:
        drawn = visualizer.draw_panoptic_seg_predictions(*outputs["panoptic_seg"])
    elif "instances" in outputs:
        drawn = _draw_instances(visualizer, outputs["instances"], metadata, shared)
    else:
        drawn = visualizer.draw_sem_seg(outputs["sem_seg"].argmax(dim=0))
    return drawn.get_image()[:, :, ::-1]


def _draw_instances(
    visualizer: Visualizer, instances: Instances, metadata: Metadata, shared: Optional[torch.Tensor]
) -> VisImage:
    names = metadata.get("thing_classes", [])
    classes = instances.pred_classes.tolist()
    # With only one class its name has no information, and would hide small objects.
    named = [f"{names[c] if c < len(names) else c} " if len(names) != 1 else "" for c in classes]
    labels = [
        f"{drawable(name)}{score:.0%}" for name, score in zip(named, instances.scores.tolist())
    ]
    # One colour for each class, or for each object if there is only one class.
    keys = classes if len(names) > 1 else range(len(classes))
    palette = metadata.get("thing_colors") or colormap(rgb=True)
    colors: List[Union[np.ndarray, Tuple[float, ...]]] = [
        np.array(palette[k % len(palette)]) / 255 for k in keys
    ]
    if shared is not None:
        colors = [_GREY if s else c for s, c in zip(shared.tolist(), colors)]
        labels = ["" if s else label for s, label in zip(shared.tolist(), labels)]
    return visualizer.overlay_instances(
        boxes=instances.pred_boxes,
        masks=np.asarray(instances.pred_masks) if instances.has("pred_masks") else None,
        labels=labels if len(labels) <= 20 else None,  # more would hide the objects
        assigned_colors=colors,
        alpha=0.4,
    )
