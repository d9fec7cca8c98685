"""Constants that mark a norm in a weights file as folded into an affine map."""

import torch

__all__ = ["EPS", "FOLDED_VAR"]

EPS = 1e-5  # default of PyTorch's BatchNorm and of detectron2's FrozenBatchNorm2d

# Running variance of a norm that was folded into x * weight + bias. Its running mean is 0, and the
# variance plus EPS is 1.
FOLDED_VAR = torch.ones(()) - EPS
