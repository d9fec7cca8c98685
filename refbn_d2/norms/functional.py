"""The arithmetic of the norms: forward, gradient, and nothing else."""

from typing import Callable, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "BatchStatistics",
    "batch_moments",
    "batch_statistics",
    "mixed_norm",
    "ref_batch_norm",
    "sample_norm",
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


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def batch_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over N, H and W (Algorithm 2, lines 3-4).

    Args:
        x: (N, C, H, W), not empty, any floating dtype.

    Returns:
        Two (C,) tensors, float64 for float64 input and float32 for every other dtype.
    """
    x = x.to(statistics_dtype(x))
    if x.device.type == "cpu" and not x.is_contiguous():
        return torch.batch_norm_update_stats(x, None, None, 0.0)  # good in channels_last
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        return mean, var
    return _row_moments(x)


# Elements of a block in _row_moments: a megabyte, which a core's cache holds.
_BLOCK = 1 << 18


def _row_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of a contiguous x, in its own dtype.

    Two passes, as exact as Welford's, over rows of H W. On a CPU, sum and norm are vectorized and
    what is made for the purpose (var_mean, batch_norm_update_stats) is not: it takes 4 to 20 times
    as long. The second pass goes block by block so that x - mean stays in the cache.
    """
    num_samples, num_channels = x.shape[:2]
    rows = x.view(num_samples * num_channels, -1)
    count = num_samples * rows.shape[1]
    mean = rows.sum(1).view(num_samples, num_channels).sum(0) / count
    row_mean = mean.repeat(num_samples).unsqueeze(1)
    step = max(1, _BLOCK // rows.shape[1])
    norms = [
        torch.linalg.vector_norm(block - block_mean, dim=1)
        for block, block_mean in zip(rows.split(step), row_mean.split(step))
    ]
    var = torch.cat(norms).square().view(num_samples, num_channels).sum(0) / count
    return mean, var


def batch_statistics(x: Tensor) -> BatchStatistics:
    """The statistics of x, (N, C, H, W), not empty; without gradient."""
    return BatchStatistics(x.shape[0], x.numel() // x.shape[1], *batch_moments(x.detach()))


class _MixedNorm(torch.autograd.Function):
    """y = weight (x - mu) s + bias with mu, s from mixed statistics; keeps x and (C,) vectors.

    With s = (var + eps)^-1/2, a = weight s and n = N H W, differentiating eq. 15-16 gives

        dx = a [ g - l2 mean(g) - l2 s^2 (x - mu_B) mean(g (x - mu)) ]

    where l2 = N / (N + pseudo_count) and ``share`` = l2 / n. The reference is a constant: no
    gradient reaches it. l2 = 1 is BatchNorm, l2 = 0 a frozen affine map. The two means are over
    the whole batch: where other processes hold parts of it, ``all_reduce`` adds up their sums.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, batch_mean, mean, var, share, eps, all_reduce):
        ctx.save_for_backward(x, weight, batch_mean, mean, var)
        ctx.share, ctx.eps, ctx.all_reduce = share, eps, all_reduce
        # Kernels want the per-channel vectors in one dtype, x may be narrower.
        affine = [None if p is None else p.to(mean.dtype) for p in (weight, bias)]
        return F.batch_norm(x, mean, var, *affine, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, batch_mean, mean, var = ctx.saved_tensors
        invstd = torch.rsqrt(var + ctx.eps)
        # PyTorch's kernel of evaluation-mode BatchNorm has the two sums that everything is made of:
        # those of g (x - mu) s and g, the gradients of weight and bias.
        unit = torch.ones_like(mean)
        if x.numel() > 0:
            _, sum_g_xhat, sum_g = torch.ops.aten.native_batch_norm_backward(
                g, x, unit, mean, var, mean, invstd, False, ctx.eps, [False, True, True]
            )
        else:  # the kernel divides by the number of elements
            sum_g_xhat = sum_g = torch.zeros_like(mean)
        total_g, total_g_xhat = sum_g, sum_g_xhat
        if ctx.all_reduce is not None:
            # Whatever this process needs, the others wait for its part.
            totals = torch.stack([sum_g, sum_g_xhat])
            ctx.all_reduce(totals)
            total_g, total_g_xhat = totals

        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
            slope = scale * invstd * total_g_xhat * ctx.share
            offset = scale * total_g * ctx.share
            # -slope (x - mu_B) - offset in one pass, + scale g in another. In bfloat16 the terms
            # would be rounded one by one, and mean(g) would no longer cancel.
            wide = x.to(mean.dtype)
            grad_x = F.batch_norm(wide, batch_mean, unit, -slope, -offset, training=False, eps=0.0)
            grad_x.addcmul_(g.to(mean.dtype), _per_channel(scale))
            grad_x = grad_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = sum_g_xhat.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = sum_g.to(g.dtype if weight is None else weight.dtype)
        return (grad_x, grad_weight, grad_bias) + (None,) * 6


def mixed_norm(
    x: Tensor,
    batch: BatchStatistics,
    ref_mean: Tensor,
    ref_var: Tensor,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    pseudo_count: float = 1.0,
    eps: float = 1e-5,
    all_reduce: Optional[Callable[[Tensor], object]] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """:func:`ref_batch_norm` of a batch of which x may be only this process's part.

    Args:
        x: (N, C, H, W); empty if the whole batch is not.
        batch: statistics of the whole batch, the same on every process, not empty.
        all_reduce: adds up a tensor over the processes in place; each calls it once a backward
            pass. None if x is the whole batch.
        ref_mean, ref_var, weight, bias, pseudo_count, eps: see :func:`ref_batch_norm`.

    Returns:
        As :func:`ref_batch_norm`.
    """
    with torch.no_grad():
        ref_mean, ref_var = ref_mean.to(batch.mean.dtype), ref_var.to(batch.var.dtype)
        lambda1 = pseudo_count / (batch.samples + pseudo_count)  # eq. 13
        lambda2 = 1.0 - lambda1  # eq. 14
        mean = lambda2 * batch.mean + lambda1 * ref_mean  # eq. 15
        var = lambda2 * batch.var + lambda1 * ref_var  # eq. 16
        # Only the batch's share is a sample variance, so only it takes Bessel's correction; with
        # a single value it is zero whatever the factor.
        bessel = batch.count / max(batch.count - 1, 1)
        var_unbiased = lambda2 * bessel * batch.var + lambda1 * ref_var
    share = lambda2 / batch.count
    y = _MixedNorm.apply(x, weight, bias, batch.mean, mean, var, share, eps, all_reduce)
    return y, mean, var_unbiased


def ref_batch_norm(
    x: Tensor,
    ref_mean: Tensor,
    ref_var: Tensor,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    pseudo_count: float = 1.0,
    eps: float = 1e-5,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Normalize by batch statistics mixed with a reference (Algorithm 2, eq. 13-16).

    The reference weighs as much as ``pseudo_count`` samples: lambda1 = pseudo_count /
    (N + pseudo_count). Gradients flow through the batch statistics, not through the reference.

    Args:
        x: (N, C, H, W), not empty, any floating dtype.
        ref_mean: (C,), mean of the reference batch at this layer (eq. 11).
        ref_var: (C,), its biased variance (eq. 12).
        weight: (C,) scale gamma, or None for 1.
        bias: (C,) shift beta, or None for 0.
        pseudo_count: weight of the reference in samples, >= 0; the paper's is 1.
        eps: added to the mixed variance.

    Returns:
        ``(y, mean, var)``: the output in x's shape, dtype and memory format, and the (C,) mixed
        statistics that a moving average should take, without gradient: the mean of eq. 15 and
        eq. 16 with the batch's share Bessel-corrected by n / (n - 1), n = N H W (Algorithm 3,
        line 9).
    """
    batch = batch_statistics(x)
    return mixed_norm(x, batch, ref_mean, ref_var, weight, bias, float(pseudo_count), eps)


def sample_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> Tensor:
    """weight (x - mean) / sqrt(var + eps) + bias with statistics that differ between samples.

    Args:
        x: (N, C, H, W), may be empty, any floating dtype.
        mean: (N, C), in the dtype to calculate in; differentiable.
        var: (N, C), likewise.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        eps: added to the variance.

    Returns:
        As x in shape, dtype and memory format.
    """
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    y = (x.to(mean.dtype) - mean[:, :, None, None]) * scale[:, :, None, None]
    if bias is not None:
        y = y + _per_channel(bias.to(y.dtype))
    return y.to(x.dtype)
