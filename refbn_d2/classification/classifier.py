"""Image classifiers as meta-architectures: what they share, and the two kinds of network."""

from typing import Any, Dict, List, Union

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from torch.utils.data import default_collate

from .networks import build_network

__all__ = ["Classifier", "ImageClassifier", "TorchvisionClassifier", "collate"]

Batch = Union[Dict[str, Any], List[Dict[str, Any]]]


def collate(batch: Batch) -> Dict[str, Any]:
    """A list of dicts as a dict of tensors, "image" (N, C, H, W) and "label" (N,).

    What is such a dict already is returned: the loaders stack in their workers.
    """
    if isinstance(batch, dict):
        return batch
    return default_collate([{k: d[k] for k in ("image", "label") if k in d} for d in batch])


class Classifier(nn.Module):
    """Normalizes pixels; in training computes the loss and counts what was right.

    Args:
        pixel_mean, pixel_std: one value a channel. Grey images become as many channels.
        label_smoothing: the share of a label that is spread over all classes.

    Attributes:
        counts: int64 (3,), of the images seen in training: their number, how many were right, and
            how many among the best five. Whoever reads it sets it back.
    """

    def __init__(self, pixel_mean, pixel_std, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64), False)

    def scores(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of normalized images (N, C, H, W)."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Union[Dict[str, Tensor], List[Dict[str, Tensor]]]:
        """
        Args:
            batch: dicts with "image", (C, H, W), and in training "label"; or their :func:`collate`.

        Returns:
            In training the losses; otherwise for each image {"scores": (num_classes,)}, logits.
        """
        batch = collate(batch)
        images = batch["image"].to(self.pixel_mean.device, non_blocking=True)
        scores = self.scores((images - self.pixel_mean) / self.pixel_std)
        if not self.training:
            return [{"scores": s} for s in scores]
        labels = batch["label"].to(scores.device, non_blocking=True)
        self.counts += right(scores, labels)
        return {"loss_cls": F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing)}


@torch.no_grad()
def right(scores: Tensor, labels: Tensor) -> Tensor:
    """Number of images, of those that are right, and of those right among the best five.

    Args:
        scores: (N, num_classes).
        labels: (N,), in [0, num_classes).

    Returns:
        int64 (3,).
    """
    best = scores.topk(min(5, scores.shape[1])).indices
    hits = best == labels[:, None]
    return torch.stack(
        [hits.new_tensor(len(hits), dtype=torch.int64), hits[:, 0].sum(), hits.sum()]
    )


@META_ARCH_REGISTRY.register()
class ImageClassifier(Classifier):
    """Classifies images by the average of a backbone's last feature map.

    The backbone is built from MODEL.BACKBONE and MODEL.RESNETS as a detector's is, with
    OUT_FEATURES ["res5"]: its weights fit a detector of the same config name by name.
    """

    @configurable
    def __init__(self, *, backbone: Backbone, num_classes: int, **kwargs):
        super().__init__(**kwargs)
        self.backbone = backbone
        (self._feature,) = backbone.output_shape()
        self.linear = nn.Linear(backbone.output_shape()[self._feature].channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        for block in self.modules():
            if isinstance(block, BottleneckBlock) and hasattr(block.conv3.norm, "weight"):
                # Each block starts as the identity (section 4.2.2 of the paper).
                nn.init.zeros_(block.conv3.norm.weight)

    @classmethod
    def from_config(cls, cfg):
        return {"backbone": build_backbone(cfg), **_common(cfg)}

    def scores(self, images: Tensor) -> Tensor:
        return self.linear(self.backbone(images)[self._feature].mean(dim=(2, 3)))


@META_ARCH_REGISTRY.register()
class TorchvisionClassifier(Classifier):
    """A network of torchvision, timm or of the paper, by name; see :func:`build_network`.

    Its weights are called "network." and what torchvision (timm) calls them.
    """

    @configurable
    def __init__(
        self, *, network: str, norm: str, num_classes: int, channels_last: bool = False, **kwargs
    ):
        super().__init__(**kwargs)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = build_network(network, norm, num_classes).to(memory_format=self._format)

    @classmethod
    def from_config(cls, cfg):
        classifier = cfg.MODEL.CLASSIFIER
        return {
            "network": classifier.NETWORK,
            "norm": classifier.NORM,
            "channels_last": classifier.CHANNELS_LAST,
            **_common(cfg),
        }

    def scores(self, images: Tensor) -> Tensor:
        return self.network(images.contiguous(memory_format=self._format))


def _common(cfg) -> Dict[str, Any]:
    return {
        "num_classes": cfg.MODEL.CLASSIFIER.NUM_CLASSES,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "label_smoothing": cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING,
    }
