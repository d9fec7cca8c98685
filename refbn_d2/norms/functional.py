"""The norms as functions: forward pass and gradient, without state."""

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
    "check_channels",
    "mixed_norm",
    "ref_batch_norm",
    "sample_norm",
    "statistics_dtype",
]


def check_channels(x: Tensor, num_features: int) -> None:
    """Raises a ValueError if x is not of shape (N, num_features, H, W)."""
    if x.dim() != 4 or x.shape[1] != num_features:
        raise ValueError(
            f"expected (N, {num_features}, H, W), got an input of shape {tuple(x.shape)}"
        )


def batch_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over N, H and W (Algorithm 2, lines 3-4).

    Args:
        x: Tensor of shape (N, C, H, W), not empty, of any floating dtype.

    Returns:
        Two (C,) tensors without gradient, float64 for float64 input and float32 for every other
        dtype.
    """
    x = dense(x.detach())
    mean, var = kernels_for(x).moments(x)
    dtype = statistics_dtype(x)
    return mean.to(dtype), var.to(dtype)


def batch_statistics(x: Tensor) -> BatchStatistics:
    """Returns the statistics of x, of shape (N, C, H, W) and not empty, without gradient."""
    return BatchStatistics(x.shape[0], x.numel() // x.shape[1], *batch_moments(x))


class _MixedNorm(torch.autograd.Function):
    """y = weight (x - mu) s + bias, where mu and s come from the mixed statistics.

    With s = (var + eps)^-1/2, a = weight s and n = N H W, differentiating eq. 15-16 gives

        dx = a [ g - l2 mean(g) - l2 s^2 (x - mu_B) mean(g (x - mu)) ]

    where l2 = N / (N + pseudo_count) and ``share`` = l2 / n. The reference is a constant and gets
    no gradient. l2 = 1 is BatchNorm; l2 = 0 is a frozen affine map. Only x and vectors of shape
    (C,) are saved for the backward pass.

    The two means in dx are over the whole batch. If x is only this process's part of it, ``batch``
    contains the statistics of the whole batch, and ``all_reduce`` sums over the processes. If
    ``batch`` is None, x is the whole batch.
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
        # Read only once, because activation checkpointing forbids unpacking a tensor twice.
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
    """_MixedNorm of one process's part of a batch.

    Its gradient communicates with the other processes and cannot be differentiated again.
    """

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
    """:func:`ref_batch_norm` of a batch that may be split over processes.

    Args:
        x: Tensor of shape (N, C, H, W), the batch or this process's part of it. A part may be
            empty, the whole batch may not.
        batch: Statistics of the whole batch, the same on every process.
        ref_mean, ref_var, weight, bias, pseudo_count, eps: Same as in :func:`ref_batch_norm`.
        all_reduce: Function that sums a tensor over the processes, in place. Every process calls it
            once in each backward pass. None if x is the whole batch.

    Returns:
        The same as :func:`ref_batch_norm`.
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
    """Normalizes x by batch statistics mixed with those of a reference (Algorithm 2, eq. 13-16).

    The reference counts as ``pseudo_count`` samples: lambda1 = pseudo_count / (N + pseudo_count).
    Gradients flow through the batch statistics, not through the reference.

    Args:
        x: Tensor of shape (N, C, H, W), not empty, of any floating dtype.
        ref_mean: Mean of the reference batch at this layer, shape (C,) (eq. 11).
        ref_var: Biased variance of the reference batch, shape (C,) (eq. 12).
        weight: Scale gamma, shape (C,), or None for 1.
        bias: Shift beta, shape (C,), or None for 0.
        pseudo_count: Weight of the reference in samples, >= 0; 1 in the paper.
        eps: Constant added to the mixed variance.

    Returns:
        ``(y, mean, var)``: y is the output, with the shape, dtype and memory format of x. mean and
        var, of shape (C,) and without gradient, are the mixed statistics for a moving average:
        the mean of eq. 15, and the variance of eq. 16 with the batch variance Bessel-corrected by
        n / (n - 1), n = N H W (Algorithm 3, line 9).

    Raises:
        ValueError: If a vector does not have C values or is on another device than x.
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
    """Computes weight (x - mean) / sqrt(var + eps) + bias with statistics for each sample.

    The result is differentiable in all tensor arguments.

    Args:
        x: Tensor of shape (N, C, H, W) and any floating dtype. It may be empty.
        mean: Means, shape (N, C). The computation uses their dtype.
        var: Variances, shape (N, C), in the dtype of ``mean``.
        weight: Scale, shape (C,), or None for 1.
        bias: Shift, shape (C,), or None for 0.
        eps: Constant added to the variance.

    Returns:
        A tensor with the shape, dtype and memory format of x.
    """
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    y = (x.to(mean.dtype) - mean[:, :, None, None]) * scale[:, :, None, None]
    if bias is not None:
        y = y + per_channel(bias.to(y.dtype))
    return y.to(x.dtype)
