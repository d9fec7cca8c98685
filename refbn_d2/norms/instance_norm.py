"""InstanceNorm2d: normalizes each channel of each sample by its own statistics."""

import torch
from torch import Tensor, nn

from .functional import check_channels, sample_norm, statistics_dtype
from .tracing import as_leaf

__all__ = ["InstanceNorm2d"]


class InstanceNorm2d(nn.InstanceNorm2d):
    """Instance normalization, IN (Ulyanov, Vedaldi and Lempitsky 2016, arXiv 1607.08022, eq. 3).

    With mean_nc and var_nc (biased) over H and W::

        y = weight (x - mean_nc) / sqrt(var_nc + eps) + bias

    This is ``nn.InstanceNorm2d`` with the affine parameters ``weight`` and ``bias`` and without
    running statistics, so training and evaluation compute the same. An empty batch gives an empty
    output that is connected to the autograd graph.

    torch raises an error if H W = 1. This class evaluates the equation instead: a single value
    equals its own mean, so the output is ``bias`` and the gradient of x is zero. A network learns
    nothing through such a feature map, but a small feature map of a single image should not end a
    training run.

    Args:
        num_features: Number of channels C.
        eps: Constant added to the variance.
        device, dtype: Device and dtype of the parameters.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__(num_features, eps, affine=True, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes (N, C, H, W) input; same shape and dtype out."""
        leaf = as_leaf(self, input)
        if leaf is not None:
            return leaf
        x = input
        check_channels(x, self.num_features)
        if x.numel() == 0 or x.shape[2] * x.shape[3] == 1:
            mean = x.to(statistics_dtype(x)).sum(dim=(2, 3))
            return sample_norm(x, mean, torch.zeros_like(mean), self.weight, self.bias, self.eps)
        return super().forward(x)
