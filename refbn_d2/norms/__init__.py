"""The norms, in pure PyTorch: usable with torchvision or timm models, without detectron2."""

from .capture import Moments, capture
from .convert import convert_norm
from .functional import batch_moments, ref_batch_norm
from .ref_batch_norm import ReferenceNorm2d, RefBatchNorm2d

__all__ = [
    "Moments",
    "RefBatchNorm2d",
    "ReferenceNorm2d",
    "batch_moments",
    "capture",
    "convert_norm",
    "ref_batch_norm",
]
