"""A classifier's weights as the start of a detector."""

from typing import Dict

from torch import Tensor

__all__ = ["detector_weights"]


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
