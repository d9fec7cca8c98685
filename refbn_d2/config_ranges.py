"""Ranges of the values of config keys, of detectron2's own keys too."""

import math
from dataclasses import dataclass
from typing import Any, Callable, Dict

import torch
from detectron2.config import CfgNode as CN
from detectron2.solver import build as solver
from PIL import Image, ImageMode

from .errors import UserError

__all__ = ["UPSTREAM_RANGES", "Range", "between", "check_upstream_keys", "one_of"]


@dataclass(frozen=True)
class Range:
    """Values that a key may have.

    Attributes:
        text: description of the values, for the documentation and after "use" in an error message.
        holds: function that returns whether a value of the default's type is one of them.
    """

    text: str
    holds: Callable[[Any], bool]


def between(low: float, high: float, text: str) -> Range:
    """Returns the range of finite numbers from ``low`` to ``high``, both included."""
    return Range(
        text, lambda value: _is_number(value) and low <= value <= high and math.isfinite(value)
    )


def one_of(*values: str) -> Range:
    """Returns the range of these texts."""
    return Range(" or ".join(f'"{v}"' for v in values), lambda value: value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _list_of(each: Range, text: str, sorted_: bool = False) -> Range:
    """Returns the range of lists that are not empty and whose values are all in ``each``."""

    def holds(values: Any) -> bool:
        return (
            isinstance(values, (list, tuple))
            and len(values) > 0
            and all(map(each.holds, values))
            and (not sorted_ or all(a < b for a, b in zip(values, values[1:])))
        )

    return Range(text, holds)


def _positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _is_device(value: Any) -> bool:
    try:
        torch.device(value)
    except (RuntimeError, TypeError):
        return False
    return True


def _whole(low: int) -> Range:
    text = f"a whole number >= {low}"
    return Range(text, lambda value: isinstance(value, int) and value >= low)


_NOT_NEGATIVE = between(0, math.inf, "a finite number >= 0")
_SHARE = between(0, 1, "a number from 0 to 1")
_POSITIVE = Range("a finite number > 0", _positive)
_POSITIVES = Range("finite numbers > 0", _positive)
_NUMBERS = between(-math.inf, math.inf, "finite numbers")
_POOLERS = one_of("ROIAlignV2", "ROIAlign", "ROIPool", "ROIAlignRotated")
_REGRESSION = one_of("smooth_l1", "giou", "diou", "ciou")
_SCHEDULES = ["WarmupMultiStepLR", "WarmupCosineLR"]
if hasattr(solver, "StepWithFixedGammaParamScheduler"):  # later than 0.6
    _SCHEDULES.append("WarmupStepWithFixedGammaLR")
_SIZES = _list_of(_whole(0), "a list of whole numbers >= 0, such as (640, 800)")

# Ranges of detectron2's own keys. Outside of them detectron2 fails while it builds or trains, with
# a traceback that does not name the key, or trains nonsense.
UPSTREAM_RANGES: Dict[str, Range] = {
    "SEED": between(-1, 2**31 - 1, "a whole number >= 0, or -1 for a random one"),
    "SOLVER.MAX_ITER": _whole(1),
    "SOLVER.CHECKPOINT_PERIOD": _whole(1),
    "SOLVER.BASE_LR": _NOT_NEGATIVE,
    "SOLVER.GAMMA": _NOT_NEGATIVE,
    "SOLVER.MOMENTUM": _SHARE,
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.WARMUP_ITERS": _whole(0),
    "SOLVER.WARMUP_FACTOR": _SHARE,
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.LR_SCHEDULER_NAME": one_of(*_SCHEDULES),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Range("a number > 0, or .inf", lambda v: v > 0),
    "SOLVER.REFERENCE_WORLD_SIZE": _whole(0),
    "TEST.PRECISE_BN.NUM_ITER": _whole(1),
    "TEST.AUG.MIN_SIZES": _SIZES,
    "INPUT.MIN_SIZE_TRAIN": _SIZES,
    "INPUT.MAX_SIZE_TRAIN": _whole(1),
    "INPUT.MIN_SIZE_TEST": _whole(0),
    "INPUT.MAX_SIZE_TEST": _whole(1),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "INPUT.FORMAT": Range(
        '"BGR", "RGB", "L" or another mode of Pillow',
        lambda value: value in ("BGR", "YUV-BT.601", *Image.MODES),
    ),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "INPUT.CROP.TYPE": one_of("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": _list_of(_POSITIVES, "two numbers > 0, of height and width"),
    "MODEL.DEVICE": Range('"cuda", "cpu" or another device of PyTorch', _is_device),
    "MODEL.PIXEL_MEAN": _list_of(_NUMBERS, "a finite number for each channel of INPUT.FORMAT"),
    "MODEL.PIXEL_STD": _list_of(_POSITIVES, "a number > 0 for each channel of INPUT.FORMAT"),
    "MODEL.RESNETS.DEPTH": Range(
        "18, 34, 50, 101 or 152", lambda value: value in (18, 34, 50, 101, 152)
    ),
    "MODEL.RESNETS.NUM_GROUPS": _whole(1),
    "MODEL.RESNETS.WIDTH_PER_GROUP": _whole(1),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _whole(1),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _whole(1),
    "MODEL.RESNETS.RES5_DILATION": Range("1 or 2", lambda value: value in (1, 2)),
    "MODEL.ANCHOR_GENERATOR.SIZES": _list_of(
        _list_of(_POSITIVES, ""), "lists of numbers > 0, such as [[32, 64, 128]]"
    ),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _list_of(
        _list_of(_POSITIVES, ""), "lists of numbers > 0, such as [[0.5, 1.0, 2.0]]"
    ),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _whole(1),
    "MODEL.RPN.IOU_THRESHOLDS": _list_of(_SHARE, "numbers from 0 to 1 in ascending order", True),
    "MODEL.RPN.NMS_THRESH": _SHARE,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _whole(1),
    "MODEL.RPN.POST_NMS_TOPK_TEST": _whole(1),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _whole(1),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _whole(1),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _REGRESSION,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _whole(1),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _SHARE,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _REGRESSION,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": _NOT_NEGATIVE,
    **{f"MODEL.{head}.POOLER_RESOLUTION": _whole(1) for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD")},
    **{f"MODEL.{head}.POOLER_TYPE": _POOLERS for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD")},
    "DATALOADER.NUM_WORKERS": _whole(0),
    "DATALOADER.REPEAT_THRESHOLD": _NOT_NEGATIVE,
}


def check_upstream_keys(cfg: CN) -> None:
    """Checks values of detectron2's keys that have to fit each other.

    Raises:
        UserError: if two of them do not.
    """
    means, stds = len(cfg.MODEL.PIXEL_MEAN), len(cfg.MODEL.PIXEL_STD)
    pixels = cfg.INPUT.FORMAT
    channels = 3 if pixels in ("BGR", "YUV-BT.601") else len(ImageMode.getmode(pixels).bands)
    # With one channel, means and deviations for three make three equal channels of it.
    if means != stds or (channels > 1 and means != channels):
        raise UserError(
            f"MODEL.PIXEL_MEAN and MODEL.PIXEL_STD have {means} and {stds} values: use one for "
            f"each of the {channels} channels of INPUT.FORMAT {pixels}"
        )
    crop = cfg.INPUT.CROP
    if crop.ENABLED and (len(crop.SIZE) != 2 or "relative" in crop.TYPE and max(crop.SIZE) > 1):
        limit = " and at most 1" if "relative" in crop.TYPE else ""
        raise UserError(
            f"INPUT.CROP.SIZE is {list(crop.SIZE)}: use two numbers above 0{limit}, because "
            f"CROP.TYPE is {crop.TYPE}"
        )
    size, world = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if world and size % world:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {size}: use a multiple of SOLVER.REFERENCE_WORLD_SIZE {world}"
        )
