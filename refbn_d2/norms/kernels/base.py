"""The interface of a set of kernels: four functions, and the two passes that consist of them."""

from typing import Callable, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "BatchStatistics",
    "Kernels",
    "check_vectors",
    "dense",
    "gradient_share",
    "like",
    "per_channel",
    "reference_weight",
    "statistics_dtype",
]


class BatchStatistics(NamedTuple):
    """The statistics of a batch, which may be split over several processes.

    Attributes:
        samples: Number of samples N, the size of the first dimension; m in the paper.
        count: Number of elements per channel, N H W.
        mean: Means, shape (C,).
        var: Biased variances, shape (C,).
    """

    samples: int
    count: int
    mean: Tensor
    var: Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics: float64 for float64 input, float32 for every other dtype."""
    # A sum over 10^6 values in bfloat16 has no correct digits.
    return torch.promote_types(x.dtype, torch.float32)


def per_channel(v: Tensor) -> Tensor:
    """Reshapes a vector of shape (C,) to (1, C, 1, 1)."""
    return v.view(1, -1, 1, 1)


def dense(x: Tensor) -> Tensor:
    """Returns x if it is contiguous or channels_last, else a contiguous copy for the kernels."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def like(g: Tensor, x: Tensor) -> Tensor:
    """Returns g in the memory format of x, which is contiguous or channels_last."""
    if x.is_contiguous():
        return g.contiguous()
    return g.contiguous(memory_format=torch.channels_last)


def check_vectors(x: Tensor, *vectors: Optional[Tensor]) -> None:
    """Raises a ValueError unless every vector has one value per channel of x and is on its device.

    Compiled kernels would read beyond the end of a shorter vector.
    """
    for v in vectors:
        if v is not None and (v.numel() != x.shape[1] or v.device != x.device):
            raise ValueError(
                f"expected {x.shape[1]} values, one for each channel, on {x.device}, got a tensor "
                f"of shape {tuple(v.shape)} on {v.device}"
            )


def reference_weight(pseudo_count: float, samples: int) -> float:
    """lambda1 of eq. 13 for a batch of ``samples`` samples; lambda2 = 1 - lambda1 (eq. 14)."""
    return pseudo_count / (samples + pseudo_count)


def gradient_share(pseudo_count: float, samples: int, count: int) -> float:
    """lambda2 / n: the derivative of the mixed mean by one of the n = ``count`` elements."""
    return (1.0 - reference_weight(pseudo_count, samples)) / count


class Kernels:
    """The arithmetic of RefBN for one kind of tensor, such as CUDA tensors.

    A subclass defines :meth:`moments`, :meth:`sums` and :meth:`input_gradient`, and overrides other
    methods if it has a faster implementation. x and g have shape (N, C, H, W) and the same memory
    format, contiguous or channels_last, and are not empty. Vectors have shape (C,) and the dtype
    :func:`statistics_dtype` of x. Autograd does not record the operations, unless the set is
    ``differentiable``.

    Attributes:
        name: Name of the set in the log and in docs/performance.md.
        differentiable: Whether PyTorch can differentiate through :meth:`forward`.
    """

    name = "kernels"
    differentiable = False

    def moments(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Mean and biased variance over N, H and W, of shape (C,) each.

        A set may return them in float64 if the variance of x is too large for float32.
        """
        raise NotImplementedError

    def normalize(self, x: Tensor, mean: Tensor, scale: Tensor, bias: Optional[Tensor]) -> Tensor:
        """Returns (x - mean) scale + bias, in the dtype and memory format of x."""
        # PyTorch's kernel for evaluation reads and writes memory only once, on every device.
        unit = torch.ones_like(mean)
        return F.batch_norm(x, mean, unit, scale, bias, training=False, eps=0.0)

    def sums(self, g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
        """Sums over N, H and W of g and of g (x - mean) invstd: gradients of bias and weight."""
        raise NotImplementedError

    def input_gradient(
        self, g: Tensor, x: Tensor, center: Tensor, scale: Tensor, mean_g: Tensor, slope: Tensor
    ) -> Tensor:
        """Returns scale (g - mean_g - slope (x - center)), in the dtype and memory format of x."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        ref_mean: Tensor,
        ref_var: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        pseudo_count: float,
        eps: float,
        batch: Optional[BatchStatistics] = None,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Normalizes x by batch statistics mixed with those of the reference (eq. 15-16).

        Args:
            x: Batch, or this process's part of it. A part may be empty.
            ref_mean, ref_var, weight, bias: Vectors of shape (C,) and any floating dtype.
            pseudo_count: Weight of the reference in samples, >= 0.
            eps: Constant added to the mixed variance.
            batch: Statistics of the whole batch; None if x is the whole batch.

        Returns:
            ``(y, mean, var, batch_mean, invstd)``: the output; the mixed mean, and the mixed
            variance with Bessel's correction, for moving averages; and two vectors that
            :meth:`backward` needs.
        """
        if batch is None:
            batch = BatchStatistics(x.shape[0], x.numel() // x.shape[1], *self.moments(x))
        narrow, wide = statistics_dtype(x), batch.mean.dtype
        lambda1 = reference_weight(pseudo_count, batch.samples)
        lambda2 = 1.0 - lambda1
        mean = torch.lerp(batch.mean, ref_mean.to(wide), lambda1)  # eq. 15
        # eq. 16. Not by lerp, which returns NaN for a variance that is infinite in float32.
        mixed = torch.add(ref_var.to(wide) * lambda1, batch.var, alpha=lambda2)
        # Bessel's correction n / (n - 1) applies to the batch variance only, because the reference
        # is a constant. For n = 1 the batch variance is 0, so the factor does not matter.
        excess = 1.0 / max(batch.count - 1, 1)  # n / (n - 1) - 1
        var = torch.add(mixed, batch.var, alpha=lambda2 * excess).to(narrow)
        mean, invstd = mean.to(narrow), torch.rsqrt(mixed + eps).to(narrow)
        if x.numel() == 0:
            y = torch.empty_like(x)
        else:
            scale = invstd if weight is None else invstd * weight.to(narrow)
            y = self.normalize(x, mean, scale, None if bias is None else bias.to(narrow))
        return y, mean, var, batch.mean.to(narrow), invstd

    def backward(
        self,
        g: Tensor,
        x: Tensor,
        weight: Optional[Tensor],
        batch_mean: Tensor,
        mean: Tensor,
        invstd: Tensor,
        share: float,
        all_reduce: Optional[Callable[[Tensor], object]] = None,
        input_gradient: bool = True,
    ) -> Tuple[Optional[Tensor], Tensor, Tensor]:
        """Computes the gradients of x, bias and weight.

        Args:
            g: Gradient of the output.
            x, weight: Same as in :meth:`forward`.
            batch_mean, mean, invstd: Vectors that :meth:`forward` returned.
            share: :func:`gradient_share` of the whole batch.
            all_reduce: Function that sums a tensor over the processes, in place; None if x is the
                whole batch.
            input_gradient: Whether the gradient of x is needed.

        Returns:
            ``(grad_x, sum_g, sum_g_xhat)``: the gradient of x, or None if it is not needed, and the
            result of :meth:`sums` for this process's part.
        """
        empty = x.numel() == 0
        if empty:
            sum_g, sum_g_xhat = torch.zeros_like(mean), torch.zeros_like(mean)
        else:
            sum_g, sum_g_xhat = self.sums(g, x, mean, invstd)
        total_g, total_g_xhat = sum_g, sum_g_xhat
        if all_reduce is not None:
            # Also if this process needs no gradient of x, because the others wait for its part.
            totals = torch.stack([sum_g, sum_g_xhat])
            all_reduce(totals)
            total_g, total_g_xhat = totals
        if not input_gradient:
            return None, sum_g, sum_g_xhat
        if empty:
            return torch.empty_like(x), sum_g, sum_g_xhat
        scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
        mean_g, slope = total_g * share, invstd * total_g_xhat * share
        grad_x = self.input_gradient(g, x, batch_mean, scale, mean_g, slope)
        return grad_x, sum_g, sum_g_xhat
