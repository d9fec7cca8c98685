"""The arithmetic of the norms: forward, gradient, and nothing else."""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import (
    BatchStatistics,
    check_vectors,
    dense,
    differentiable_backward,
    gradient_share,
    kernels_for,
    like,
    per_channel,
    statistics_dtype,
)

__all__ = [
    "BatchStatistics",
    "batch_moments",
    "batch_statistics",
    "mixed_norm",
    "ref_batch_norm",
    "sample_norm",
    "statistics_dtype",
]


def batch_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over N, H and W (Algorithm 2, lines 3-4).

    Args:
        x: (N, C, H, W), not empty, any floating dtype.

    Returns:
        Two (C,) tensors without gradient, float64 for float64 input and float32 for every other
        dtype.
    """
    x = dense(x.detach())
    mean, var = kernels_for(x).moments(x)
    dtype = statistics_dtype(x)
    return mean.to(dtype), var.to(dtype)


def batch_statistics(x: Tensor) -> BatchStatistics:
    """The statistics of x, (N, C, H, W), not empty; without gradient."""
    return BatchStatistics(x.shape[0], x.numel() // x.shape[1], *batch_moments(x))


class _MixedNorm(torch.autograd.Function):
    """y = weight (x - mu) s + bias with mu, s from mixed statistics; keeps x and (C,) vectors.

    With s = (var + eps)^-1/2, a = weight s and n = N H W, differentiating eq. 15-16 gives

        dx = a [ g - l2 mean(g) - l2 s^2 (x - mu_B) mean(g (x - mu)) ]

    where l2 = N / (N + pseudo_count) and ``share`` = l2 / n. The reference is a constant: no
    gradient reaches it. l2 = 1 is BatchNorm, l2 = 0 a frozen affine map. The two means are over
    the whole batch: where other processes hold parts of it, ``batch`` has its statistics and
    ``all_reduce`` adds up their sums. Without ``batch``, x is all of it.
    """

    @staticmethod
    def forward(
        ctx, x, weight, bias, ref_mean, ref_var, pseudo_count, eps, batch, all_reduce, kernels
    ):
        y, mean, var, batch_mean, invstd = kernels.forward(
            x, ref_mean, ref_var, weight, bias, pseudo_count, eps, batch
        )
        ctx.save_for_backward(x, weight, batch_mean, mean, invstd)
        ctx.kernels, ctx.all_reduce = kernels, all_reduce
        samples, count = (x.shape[0], x.numel() // x.shape[1]) if batch is None else batch[:2]
        ctx.share = gradient_share(pseudo_count, samples, count)
        # mean and var are non-differentiable outputs: allocate no zero gradients for them.
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx, g, *_):
        # Read once: checkpointing refuses to unpack a tensor twice.
        x, weight, batch_mean, mean, invstd = ctx.saved_tensors
        saved = weight, batch_mean, mean, invstd, ctx.share
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        g = torch.zeros_like(x) if g is None else like(g, x)
        if torch.is_grad_enabled() and ctx.all_reduce is None:  # create_graph=True
            results = differentiable_backward(g, x, *saved)
        else:
            results = ctx.kernels.backward(g, x, *saved, ctx.all_reduce, needs_x)
        grad_x, sum_g, sum_g_xhat = results
        grad_weight = sum_g_xhat.to(weight.dtype) if needs_weight else None
        grad_bias = None
        if needs_bias:
            grad_bias = sum_g.to(g.dtype if weight is None else weight.dtype)
        return (grad_x, grad_weight, grad_bias) + (None,) * 7


class _MixedNormOfAPart(_MixedNorm):
    """The same of a part of the batch, whose gradient asks the other processes: only once."""

    forward = _MixedNorm.forward
    backward = staticmethod(once_differentiable(_MixedNorm.backward))


def _mixed_norm(x, weight, bias, ref_mean, ref_var, pseudo_count, eps, batch=None, all_reduce=None):
    check_vectors(x, weight, bias, ref_mean, ref_var)
    kernels = kernels_for(x)
    if kernels.differentiable and all_reduce is None:
        reference = ref_mean.detach(), ref_var.detach()
        y, mean, var, *_ = kernels.forward(x, *reference, weight, bias, pseudo_count, eps)
        return y, mean.detach(), var.detach()
    function = _MixedNorm if all_reduce is None else _MixedNormOfAPart
    constants = ref_mean, ref_var, pseudo_count, eps, batch, all_reduce, kernels
    return function.apply(dense(x), weight, bias, *constants)


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
    return _mixed_norm(x, weight, bias, ref_mean, ref_var, pseudo_count, eps, batch, all_reduce)


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

    Raises:
        ValueError: a vector has not C values, or is on another device than x.

    Returns:
        ``(y, mean, var)``: the output in x's shape, dtype and memory format, and the (C,) mixed
        statistics that a moving average should take, without gradient: the mean of eq. 15 and
        eq. 16 with the batch's share Bessel-corrected by n / (n - 1), n = N H W (Algorithm 3,
        line 9).
    """
    return _mixed_norm(x, weight, bias, ref_mean, ref_var, pseudo_count, eps)


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
        y = y + per_channel(bias.to(y.dtype))
    return y.to(x.dtype)
