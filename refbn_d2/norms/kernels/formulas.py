"""The kernels as formulas of elementary PyTorch operations.

They work on every device, torch.compile can fuse them, and all of PyTorch's forms of automatic
differentiation apply to them.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from .base import Kernels, per_channel, statistics_dtype

__all__ = ["Fallback", "Formulas", "differentiable_backward"]


class Formulas(Kernels):
    """Elementary operations only; differentiable in all arguments."""

    name = "formulas"
    differentiable = True

    def moments(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        wide = statistics_dtype(x)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            wide = torch.float64  # PyTorch's BatchNorm on a CPU also sums in float64
        var, mean = torch.var_mean(x.to(wide), dim=(0, 2, 3), correction=0)
        return mean, var

    def normalize(self, x: Tensor, mean: Tensor, scale: Tensor, bias: Optional[Tensor]) -> Tensor:
        y = (x.to(mean.dtype) - per_channel(mean)) * per_channel(scale)
        if bias is not None:
            y = y + per_channel(bias)
        return y.to(x.dtype)

    def sums(self, g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
        g = g.to(mean.dtype)
        sum_g_xmu = (g * (x.to(mean.dtype) - per_channel(mean))).sum((0, 2, 3))
        return g.sum((0, 2, 3)), sum_g_xmu * invstd

    def input_gradient(
        self, g: Tensor, x: Tensor, center: Tensor, scale: Tensor, mean_g: Tensor, slope: Tensor
    ) -> Tensor:
        drop = per_channel(mean_g) + per_channel(slope) * (x.to(center.dtype) - per_channel(center))
        return (per_channel(scale) * (g.to(center.dtype) - drop)).to(x.dtype)


class Fallback(Formulas):
    """Formulas for torch.compile, which fuses them, and for devices without their own kernels.

    It normalizes by PyTorch's batch norm, which is faster but not differentiable in the statistics.
    """

    name = "fallback"
    differentiable = False

    normalize = Kernels.normalize


def differentiable_backward(
    g: Tensor,
    x: Tensor,
    weight: Optional[Tensor],
    batch_mean: Tensor,
    mean: Tensor,
    invstd: Tensor,
    share: float,
) -> Tuple[Optional[Tensor], Tensor, Tensor]:
    """Computes :meth:`Kernels.backward` of a whole batch, differentiable in g, x and weight.

    The vectors that the forward pass saved are constants for autograd. This function replaces them
    by functions of x with the same values and the right derivatives: the derivative of the mixed
    variance is lambda2 times that of the batch variance, and the same holds for the mean.
    """
    formulas = Formulas()
    lambda2 = share * (x.numel() // x.shape[1])
    batch_mean, batch_var = formulas.moments(x)
    narrow, wide = mean.dtype, batch_var.dtype
    mean = mean + lambda2 * (batch_mean - batch_mean.detach()).to(narrow)
    mixed = invstd.to(wide).pow(-2) + lambda2 * (batch_var - batch_var.detach())
    vectors = batch_mean.to(narrow), mean, torch.rsqrt(mixed).to(narrow)
    return formulas.backward(g, x, weight, *vectors, share)
