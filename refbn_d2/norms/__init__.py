"""The norms, in pure PyTorch: usable with torchvision or timm models, without detectron2."""

from .batch_renorm import BatchRenorm2d
from .capture import capture
from .convert import convert_norm
from .eval_ref_batch_norm import EvalRefBatchNorm2d
from .fold import fold_norms
from .functional import batch_moments, ref_batch_norm
from .instance_norm import InstanceNorm2d
from .moments import Moments
from .moving_average_batch_norm import MovingAverageBatchNorm2d
from .ref_batch_norm import RefBatchNorm2d
from .reference_norm import ReferenceNorm2d
from .switchable_norm import SwitchableNorm2d
from .sync_ref_batch_norm import SyncRefBatchNorm2d
from .table import NORM_TYPES, NormType, register_norm, unregister_norm
from .virtual_batch_norm import VirtualBatchNorm2d

__all__ = [
    "BatchRenorm2d",
    "EvalRefBatchNorm2d",
    "InstanceNorm2d",
    "Moments",
    "MovingAverageBatchNorm2d",
    "NORM_TYPES",
    "NormType",
    "RefBatchNorm2d",
    "ReferenceNorm2d",
    "SwitchableNorm2d",
    "SyncRefBatchNorm2d",
    "VirtualBatchNorm2d",
    "batch_moments",
    "capture",
    "convert_norm",
    "fold_norms",
    "ref_batch_norm",
    "register_norm",
    "unregister_norm",
]
