"""A classifier's weights as the start of a detector."""

import os
from typing import Dict

import torch
from torch import Tensor

from ..engine.safe_pickle import load_torch
from ..errors import UserError

__all__ = ["convert", "detector_weights"]


def detector_weights(classifier: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """State dict of an ImageClassifier to that of the C4 detector's backbone and RoI head.

    In a C4 detector conv5 is the RoI head: ``backbone.res5`` becomes ``roi_heads.res5``. The linear
    layer is dropped; norms keep all they have, the reference included.
    """
    weights = {}
    for name, value in classifier.items():
        if name.startswith("backbone.res5."):
            weights["roi_heads." + name[len("backbone.") :]] = value
        elif name.startswith("backbone."):
            weights[name] = value
    return weights


def convert(source: str, target: str) -> int:
    """Writes the detector's weights of a classifier's checkpoint.

    Args:
        source: checkpoint of tools/train_classifier.py; read without running code from it.
        target: .pth file to write, for MODEL.WEIGHTS.

    Returns:
        Number of tensors.

    Raises:
        UserError: ``source`` cannot be read, or has no backbone.
    """
    try:
        weights = detector_weights(load_torch(source).get("model", {}))
    except Exception as e:  # whatever a damaged file may raise
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{source}: not a checkpoint that can be read safely: {reason}") from None
    if not all(isinstance(w, Tensor) for w in weights.values()) or not weights:
        raise UserError(f"{source}: no weights of a classifier's backbone in it")
    torch.save({"model": weights}, target + ".partial")
    os.replace(target + ".partial", target)
    return len(weights)
