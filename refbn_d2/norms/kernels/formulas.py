"""The kernels of functional.py as formulas: for torch.compile, which fuses them, and any device.

This is also what a set of kernels is: each such module has these four functions. x and g are
(N, C, H, W), not empty; vectors are (C,) in :func:`statistics_dtype` of x; nothing is
differentiated through.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["input_gradient", "moments", "normalize", "per_channel", "statistics_dtype", "sums"]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for every other dtype."""
    # Sums over 10^6 bfloat16 values lose all their digits; statistics are never narrower than fp32.
    return torch.promote_types(x.dtype, torch.float32)


def per_channel(v: Tensor) -> Tensor:
    """(C,) as (1, C, 1, 1)."""
    return v.view(1, -1, 1, 1)


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance over N, H and W, (C,) each."""
    var, mean = torch.var_mean(x.to(statistics_dtype(x)), dim=(0, 2, 3), correction=0)
    return mean, var


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
) -> Tensor:
    """weight (x - mean) / sqrt(var + eps) + bias, as x in dtype and memory format."""
    return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)


def sums(g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
    """Sums over N, H and W of g and of g (x - mean) invstd: the gradients of bias and weight."""
    g = g.to(mean.dtype)
    sum_g_xmu = (g * (x.to(mean.dtype) - per_channel(mean))).sum((0, 2, 3))
    return g.sum((0, 2, 3)), sum_g_xmu * invstd


def input_gradient(
    g: Tensor, x: Tensor, center: Tensor, scale: Tensor, mean_g: Tensor, slope: Tensor
) -> Tensor:
    """scale (g - mean_g - slope (x - center)), as x in dtype and memory format."""
    drop = per_channel(mean_g) + per_channel(slope) * (x.to(center.dtype) - per_channel(center))
    return (per_channel(scale) * (g.to(center.dtype) - drop)).to(x.dtype)
