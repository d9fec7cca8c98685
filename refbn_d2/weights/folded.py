"""What a norm looks like that was folded into an affine map, in a file of weights."""

import torch

__all__ = ["EPS", "FOLDED_VAR"]

EPS = 1e-5  # of BatchNorm in PyTorch and of FrozenBatchNorm2d in detectron2

# The running variance, beside a mean of 0, of a norm that was folded into x * weight + bias: EPS
# makes it 1.
FOLDED_VAR = torch.ones(()) - EPS
