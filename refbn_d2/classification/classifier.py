"""ImageClassifier: a detectron2 ResNet with a linear layer, as a meta-architecture."""

from typing import Dict, List, Union

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import ImageList
from torch import Tensor, nn

__all__ = ["ImageClassifier"]


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """Classifies images by the average of a backbone's last feature map.

    The backbone is built from MODEL.BACKBONE and MODEL.RESNETS as a detector's is, with
    OUT_FEATURES ["res5"]: its weights fit a detector of the same config name by name.
    """

    @configurable
    def __init__(self, *, backbone: Backbone, num_classes: int, pixel_mean, pixel_std):
        super().__init__()
        self.backbone = backbone
        (self._feature,) = backbone.output_shape()
        self.linear = nn.Linear(backbone.output_shape()[self._feature].channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        for block in self.modules():
            if isinstance(block, BottleneckBlock) and hasattr(block.conv3.norm, "weight"):
                # Each block starts as the identity (section 4.2.2 of the paper).
                nn.init.zeros_(block.conv3.norm.weight)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        return {
            "backbone": build_backbone(cfg),
            "num_classes": cfg.MODEL.CLASSIFIER.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(
        self, batched_inputs: List[Dict]
    ) -> Union[Dict[str, Tensor], List[Dict[str, Tensor]]]:
        """
        Args:
            batched_inputs: dicts with "image", (C, H, W), and in training "label", int.

        Returns:
            In training the losses; otherwise for each image {"scores": (num_classes,)}, logits.
        """
        device = self.pixel_mean.device
        images = [
            (d["image"].to(device) - self.pixel_mean) / self.pixel_std for d in batched_inputs
        ]
        images = ImageList.from_tensors(images, self.backbone.size_divisibility).tensor
        features = self.backbone(images)[self._feature]
        scores = self.linear(features.mean(dim=(2, 3)))
        if self.training:
            labels = torch.tensor([d["label"] for d in batched_inputs], device=device)
            return {"loss_cls": F.cross_entropy(scores, labels)}
        return [{"scores": s} for s in scores]
