"""What a set of kernels is: four pieces, and the two passes that are made of them."""

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
    """What a batch, on one process or many, is normalized by.

    Attributes:
        samples: m of the paper, the size of the first dimension.
        count: elements per channel, N H W.
        mean: (C,).
        var: (C,), biased.
    """

    samples: int
    count: int
    mean: Tensor
    var: Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for every other dtype."""
    # Sums over 10^6 bfloat16 values lose all their digits; statistics are never narrower than fp32.
    return torch.promote_types(x.dtype, torch.float32)


def per_channel(v: Tensor) -> Tensor:
    """(C,) as (1, C, 1, 1)."""
    return v.view(1, -1, 1, 1)


def dense(x: Tensor) -> Tensor:
    """x, or a contiguous copy unless it is contiguous or channels_last, as kernels need it."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def like(g: Tensor, x: Tensor) -> Tensor:
    """g in the memory format of x, which is dense."""
    if x.is_contiguous():
        return g.contiguous()
    return g.contiguous(memory_format=torch.channels_last)


def check_vectors(x: Tensor, *vectors: Optional[Tensor]) -> None:
    """Raises a ValueError unless every vector has a value for each channel of x, on its device.

    Compiled kernels would read on behind a vector that is too short.
    """
    for v in vectors:
        if v is not None and (v.numel() != x.shape[1] or v.device != x.device):
            raise ValueError(
                f"expected {x.shape[1]} values, one for each channel, on {x.device}, got a tensor "
                f"of shape {tuple(v.shape)} on {v.device}"
            )


def reference_weight(pseudo_count: float, samples: int) -> float:
    """lambda1 of eq. 13 for a batch of ``samples``; 1 - lambda1 is lambda2, eq. 14."""
    return pseudo_count / (samples + pseudo_count)


def gradient_share(pseudo_count: float, samples: int, count: int) -> float:
    """lambda2 / n: what one of ``count`` elements per channel adds to the mixed mean."""
    return (1.0 - reference_weight(pseudo_count, samples)) / count


class Kernels:
    """The arithmetic of RefBN for one kind of tensor.

    A subclass defines :meth:`moments`, :meth:`sums` and :meth:`input_gradient`, and overrides
    what else it does better. x and g are (N, C, H, W), dense (contiguous or channels_last), in the
    same memory format, and not empty; vectors are (C,) in :func:`statistics_dtype` of x. Autograd
    sees none of it, unless the set is ``differentiable``.

    Attributes:
        name: of the set, as it stands in the log and in docs/performance.md.
        differentiable: whether PyTorch can differentiate through :meth:`forward`.
    """

    name = "kernels"
    differentiable = False

    def moments(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Mean and biased variance over N, H and W, (C,) each.

        They are float64 where the variance of narrower x is beyond float32 and this set can tell.
        """
        raise NotImplementedError

    def normalize(self, x: Tensor, mean: Tensor, scale: Tensor, bias: Optional[Tensor]) -> Tensor:
        """(x - mean) scale + bias, as x in dtype and memory format."""
        # PyTorch's own kernel for evaluation: one pass on every device.
        unit = torch.ones_like(mean)
        return F.batch_norm(x, mean, unit, scale, bias, training=False, eps=0.0)

    def sums(self, g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
        """Sums over N, H and W of g and of g (x - mean) invstd: gradients of bias and weight."""
        raise NotImplementedError

    def input_gradient(
        self, g: Tensor, x: Tensor, center: Tensor, scale: Tensor, mean_g: Tensor, slope: Tensor
    ) -> Tensor:
        """scale (g - mean_g - slope (x - center)), as x in dtype and memory format."""
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
        """Normalizes x by the batch's statistics mixed with those of the reference (eq. 15-16).

        Args:
            x: the batch, or a part of it, which may be empty.
            ref_mean, ref_var, weight, bias: (C,), in any floating dtype.
            pseudo_count: weight of the reference in samples, >= 0.
            eps: added to the mixed variance.
            batch: statistics of the whole batch; None if x is the whole batch.

        Returns:
            ``(y, mean, var, batch_mean, invstd)``: the output; the mixed mean, and the mixed
            variance with Bessel's correction, for moving averages; and what :meth:`backward` needs.
        """
        if batch is None:
            batch = BatchStatistics(x.shape[0], x.numel() // x.shape[1], *self.moments(x))
        narrow, wide = statistics_dtype(x), batch.mean.dtype
        lambda1 = reference_weight(pseudo_count, batch.samples)
        lambda2 = 1.0 - lambda1
        mean = torch.lerp(batch.mean, ref_mean.to(wide), lambda1)  # eq. 15
        # eq. 16; no lerp, which makes NaN of a variance that is infinite in float32.
        mixed = torch.add(ref_var.to(wide) * lambda1, batch.var, alpha=lambda2)
        # Only the batch's share is a sample variance, so only it takes Bessel's correction; with a
        # single value it is zero whatever the factor.
        excess = 1.0 / max(batch.count - 1, 1)  # of n / (n - 1) over 1
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
        """The gradients of x, bias and weight.

        Args:
            g: gradient of the output.
            x, weight: as in :meth:`forward`.
            batch_mean, mean, invstd: what that returned.
            share: :func:`gradient_share` of the whole batch.
            all_reduce: adds up a tensor over the processes in place; None if x is the whole batch.
            input_gradient: whether the gradient of x is needed.

        Returns:
            ``(grad_x, sum_g, sum_g_xhat)``: None or as x, then as :meth:`sums` of this part.
        """
        empty = x.numel() == 0
        if empty:
            sum_g, sum_g_xhat = torch.zeros_like(mean), torch.zeros_like(mean)
        else:
            sum_g, sum_g_xhat = self.sums(g, x, mean, invstd)
        total_g, total_g_xhat = sum_g, sum_g_xhat
        if all_reduce is not None:
            # Also where this process needs no gradient: the others wait for its part.
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
