"""Image classifiers as detectron2 meta-architectures: a base class and two kinds of network."""

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
    """Stacks a list of dicts to a dict of tensors, "image" (N, C, H, W) and "label" (N,).

    A dict is returned unchanged, because the loaders already stack in their workers.
    """
    if isinstance(batch, dict):
        return batch
    return default_collate([{k: d[k] for k in ("image", "label") if k in d} for d in batch])


class Classifier(nn.Module):
    """Base of the classifiers: normalizes pixels, computes the loss, and counts correct images.

    Args:
        pixel_mean, pixel_std: Mean and standard deviation of each channel. A grey image is
            broadcast to this number of channels.
        label_smoothing: Fraction of each label that is distributed over all classes.

    Attributes:
        counts: Sums over the training images since the last reset, int64 (3,): the number of
            images, of images whose label had the highest score, and of images whose label was
            among the five highest scores. The reader resets it to zero.
    """

    def __init__(self, pixel_mean, pixel_std, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64), False)

    def scores(self, images: Tensor) -> Tensor:
        """Computes logits (N, num_classes) from normalized images (N, C, H, W)."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Union[Dict[str, Tensor], List[Dict[str, Tensor]]]:
        """Computes the loss in training, and the logits in evaluation.

        Args:
            batch: Dicts with "image" of shape (C, H, W) and, in training, "label"; or the result
                of :func:`collate` for them.

        Returns:
            In training the losses by name; in evaluation a dict {"scores": logits of shape
            (num_classes,)} for each image.
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
    """Counts images, top-1 correct images, and top-5 correct images.

    Args:
        scores: Scores, shape (N, num_classes).
        labels: Labels in [0, num_classes), shape (N,).

    Returns:
        The three counts, int64 (3,).
    """
    best = scores.topk(min(5, scores.shape[1])).indices
    hits = best == labels[:, None]
    return torch.stack(
        [hits.new_tensor(len(hits), dtype=torch.int64), hits[:, 0].sum(), hits.sum()]
    )


@META_ARCH_REGISTRY.register()
class ImageClassifier(Classifier):
    """Classifies images by the average of a backbone's last feature map.

    The backbone is built from MODEL.BACKBONE and MODEL.RESNETS like that of a detector, with
    OUT_FEATURES ["res5"]. Its weights have the same names as in a detector of the same config.
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
    """A network of torchvision, of timm or of the paper; see :func:`build_network`.

    The names of its weights are "network." followed by the names in torchvision (timm).
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
