"""A trained detector on single images, and what two detectors see differently."""

from typing import Any, Dict, List, Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import VisImage, Visualizer

from .trainer import Trainer

__all__ = ["Predictor", "coco_results", "draw", "have_counterpart"]

# Shorter images are drawn enlarged, so that names and scores can be read.
_MIN_SIDE = 400
_GREY = (0.65, 0.65, 0.65)


class Predictor(DefaultPredictor):
    """detectron2's DefaultPredictor whose weights are read and checked as in training.

    Args:
        cfg: of the detector; its norms are built as in training.
        weights: file of the trained weights.

    Attributes:
        model: in evaluation mode.
        metadata: of the first data set of DATASETS.TEST: names of the classes.

    Raises:
        UserError: the weights cannot be read or are of another model.
    """

    def __init__(self, cfg: CfgNode, weights: str):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = ""
        super().__init__(cfg)
        Trainer.build_checkpointer(cfg, self.model).load_to_evaluate(weights, resume=False)
        names = cfg.DATASETS.TEST or cfg.DATASETS.TRAIN
        if names and names[0] in DatasetCatalog.list():
            DatasetCatalog.get(names[0])  # loading it fills in the names of its classes
        self.metadata = MetadataCatalog.get(names[0] if names else "__unnamed")

    def __call__(self, original_image: np.ndarray) -> Dict[str, Any]:
        """The model's outputs for one image, (H, W, 3), uint8, BGR; on the CPU."""
        outputs = super().__call__(original_image)
        return {k: v.to("cpu") if hasattr(v, "to") else v for k, v in outputs.items()}


def coco_results(instances: Instances, image_id: int, metadata: Metadata) -> List[Dict[str, Any]]:
    """Detections of one image as entries of a COCO results file, with the data set's own ids."""
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    original = {v: k for k, v in ids.items()} if ids else {}
    results = instances_to_coco_json(instances, image_id)
    for r in results:
        r["category_id"] = original.get(r["category_id"], r["category_id"])
    return results


def have_counterpart(instances: Instances, others: Instances, min_iou: float = 0.5) -> torch.Tensor:
    """Which detections another model shares: same class, boxes that overlap.

    Args:
        instances: N detections.
        others: those of the other model on the same image.
        min_iou: intersection over union from which two boxes are the same object.

    Returns:
        (N,), bool.
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
    """The image with what a detector, or a segmentation model, found in it.

    Args:
        image: (H, W, 3), uint8, BGR.
        outputs: of :class:`Predictor`.
        metadata: names and colours of the classes.
        shared: (N,), bool, detections to be drawn in grey.

    Returns:
        (H', W', 3), uint8, BGR; at least 400 pixels on the shorter side.
    """
    scale = max(1.0, _MIN_SIDE / min(image.shape[:2]))
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
    labels = [
        # matplotlib takes text between two dollar signs for mathematics
        f"{names[c] if c < len(names) else c} {score:.0%}".replace("$", r"\$")
        for c, score in zip(classes, instances.scores.tolist())
    ]
    # Several classes: a colour each. One class: a colour for each object.
    keys = classes if len(names) > 1 else range(len(classes))
    palette = metadata.get("thing_colors") or colormap(rgb=True)
    colors = [np.array(palette[k % len(palette)]) / 255 for k in keys]
    if shared is not None:
        colors = [_GREY if s else c for s, c in zip(shared.tolist(), colors)]
        labels = ["" if s else label for s, label in zip(shared.tolist(), labels)]
    return visualizer.overlay_instances(
        boxes=instances.pred_boxes,
        masks=np.asarray(instances.pred_masks) if instances.has("pred_masks") else None,
        labels=labels if len(labels) <= 40 else None,  # more would hide the image
        assigned_colors=colors,
        alpha=0.4,
    )
