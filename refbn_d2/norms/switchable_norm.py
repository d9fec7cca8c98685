"""SwitchableNorm2d: a learned mixture of instance, layer and batch statistics."""

from typing import Optional

import torch
from torch import Tensor, nn

from .functional import check_channels, sample_norm, statistics_dtype
from .running import update_running_stats
from .tracing import as_leaf

__all__ = ["SwitchableNorm2d"]


class SwitchableNorm2d(nn.InstanceNorm2d):
    """Switchable Normalization, SN (Luo et al. 2018, arXiv 1806.10779, eq. 3-6).

    It mixes the means and biased variances of IN (over H, W), LN (over C, H, W) and BN (over
    N, H, W)::

        mean = sum_k softmax(mean_weight)_k mean_k        k in IN, LN, BN
        var  = sum_k softmax(var_weight)_k var_k
        y    = weight (x - mean) / sqrt(var + eps) + bias

    In evaluation the BN statistics are ``running_mean`` and ``running_var``: moving averages over
    the training batches, without Bessel's correction, as in the paper. (The paper also describes
    averages over a few batches.) The IN and LN statistics come from the current input, so
    evaluation is not an affine map. For that reason this class is *not* an ``nn.BatchNorm2d``:
    code that freezes or fuses BatchNorm layers must not treat this layer as one. It is an
    ``nn.InstanceNorm2d``, so that code which looks for norm layers, such as detectron2's weight
    decay of norms, finds it. The state dict has BatchNorm's names and, in addition,
    ``mean_weight`` and ``var_weight``, 3 values each in the order IN, LN, BN.

    Statistics are computed in float32 (float64 for float64 input) and the output has x's dtype. An
    empty batch gives an empty output that is connected to the autograd graph, and updates nothing.
    An input with one value per channel is allowed, because LN's variance is still defined.

    Args:
        num_features: Number of channels C.
        eps: Constant added to the variance.
        momentum: Weight of a batch in the running statistics; None for a cumulative average.
        device, dtype: Device and dtype of parameters and running statistics.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        device=None,
        dtype=None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            num_features, eps, momentum, affine=True, track_running_stats=True, **factory
        )
        self.mean_weight = nn.Parameter(torch.ones(3, **factory))
        self.var_weight = nn.Parameter(torch.ones(3, **factory))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "mean_weight"):  # the base class calls this before they exist
            nn.init.ones_(self.mean_weight)
            nn.init.ones_(self.var_weight)

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes (N, C, H, W) input; same shape and dtype out."""
        leaf = as_leaf(self, input)
        if leaf is not None:
            return leaf
        x = input
        check_channels(x, self.num_features)
        dtype = statistics_dtype(x)
        if x.numel() > 0:
            var_in, mean_in = torch.var_mean(x.to(dtype), dim=(2, 3), correction=0)  # (N, C)
            # LN's and BN's statistics follow from IN's, as in the paper (eq. 5). Unlike the paper,
            # _pool does not subtract squared means, which would lose digits.
            mean_ln, var_ln = _pool(mean_in, var_in, dim=1)  # (N, 1)
        else:  # zeros, so that every parameter gets a gradient of zeros
            mean_in = var_in = mean_ln = var_ln = x.to(dtype).sum(dim=(2, 3))
        if self.training and x.numel() > 0:
            mean_bn, var_bn = _pool(mean_in, var_in, dim=0)  # (1, C)
            update_running_stats(self, mean_bn[0].detach(), var_bn[0].detach())
        else:
            mean_bn, var_bn = self.running_mean.to(dtype)[None], self.running_var.to(dtype)[None]

        a, b, c = self.mean_weight.to(dtype).softmax(0)
        mean = a * mean_in + b * mean_ln + c * mean_bn
        a, b, c = self.var_weight.to(dtype).softmax(0)
        var = a * var_in + b * var_ln + c * var_bn
        return sample_norm(x, mean, var, self.weight, self.bias, self.eps)


def _pool(mean: Tensor, var: Tensor, dim: int):
    """Mean and variance of the union of equally large groups along ``dim``.

    The total variance is the mean of the group variances plus the variance of the group means.
    """
    between, pooled_mean = torch.var_mean(mean, dim=dim, correction=0, keepdim=True)
    return pooled_mean, var.mean(dim=dim, keepdim=True) + between
