"""The arithmetic of the norms: forward, gradient, and nothing else."""

import os
from types import ModuleType
from typing import Callable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import cpu_aten, cpu_cpp, cuda_aten, formulas
from .kernels.formulas import per_channel, statistics_dtype

__all__ = [
    "BatchStatistics",
    "batch_moments",
    "batch_statistics",
    "mixed_norm",
    "ref_batch_norm",
    "sample_norm",
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


def _kernels(x: Tensor) -> ModuleType:
    """The kernels for x; formulas says what they are."""
    if torch.compiler.is_compiling():
        return formulas
    if x.is_cpu:
        return cpu_cpp if cpu_cpp.available_for(x) else cpu_aten
    if x.is_cuda:
        if os.getenv("REFBN_TRITON") == "1":  # opt-in: nobody has measured it yet
            try:
                from .kernels import cuda_triton

                return cuda_triton
            except ImportError:
                pass
        return cuda_aten
    return formulas


def _dense(x: Tensor) -> Tensor:
    """x, or a contiguous copy unless it is contiguous or channels_last: kernels want either."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _like(g: Tensor, x: Tensor) -> Tensor:
    """g in the memory format of x, which is dense."""
    if x.is_contiguous():
        return g.contiguous()
    return g.contiguous(memory_format=torch.channels_last)


def _check_vectors(x: Tensor, *vectors: Optional[Tensor]) -> None:
    """Kernels would read on behind a vector that is too short."""
    for v in vectors:
        if v is not None and (v.numel() != x.shape[1] or v.device != x.device):
            raise ValueError(
                f"expected {x.shape[1]} values, one for each channel, on {x.device}, got a tensor "
                f"of shape {tuple(v.shape)} on {v.device}"
            )


def batch_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over N, H and W (Algorithm 2, lines 3-4).

    Args:
        x: (N, C, H, W), not empty, any floating dtype.

    Returns:
        Two (C,) tensors without gradient, float64 for float64 input and float32 for every other
        dtype.
    """
    x = _dense(x.detach())
    return _kernels(x).moments(x)


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
    def forward(ctx, x, weight, bias, ref_mean, ref_var, pseudo_count, eps, batch, all_reduce):
        _check_vectors(x, weight, bias, ref_mean, ref_var)
        x = _dense(x)
        samples, count = (x.shape[0], x.numel() // x.shape[1]) if batch is None else batch[:2]
        lambda1 = pseudo_count / (samples + pseudo_count)  # eq. 13
        lambda2 = 1.0 - lambda1  # eq. 14
        reference, affine, kernels = (ref_mean, ref_var), (weight, bias), _kernels(x)
        if batch is None and kernels is cpu_cpp:
            results = kernels.forward(x, *reference, *affine, lambda1, eps)
        else:
            if batch is None:
                batch = batch_statistics(x)
            results = _forward_by_pieces(kernels, x, batch, *reference, *affine, lambda1, eps)
        y, mean, var, batch_mean, invstd = results
        ctx.save_for_backward(x, weight, batch_mean, mean, invstd)
        ctx.kernels, ctx.share, ctx.all_reduce = kernels, lambda2 / count, all_reduce
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # of these two, which nobody reads
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, g, *_):
        x, weight, batch_mean, mean, invstd = ctx.saved_tensors
        kernels = ctx.kernels
        g = torch.zeros_like(x) if g is None else _like(g, x)
        if kernels is cpu_cpp and ctx.all_reduce is None and ctx.needs_input_grad[0]:
            vectors = weight, batch_mean, mean, invstd
            grad_x, sum_g, sum_g_xhat = kernels.backward(g, x, *vectors, ctx.share)
        else:
            grad_x, sum_g, sum_g_xhat = _backward_by_pieces(ctx, g)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = sum_g_xhat.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = sum_g.to(g.dtype if weight is None else weight.dtype)
        return (grad_x, grad_weight, grad_bias) + (None,) * 6


def _forward_by_pieces(kernels, x, batch, ref_mean, ref_var, weight, bias, lambda1, eps):
    """What cpu_cpp.forward does, of a batch of which x may be a part."""
    # Kernels want the per-channel vectors in one dtype, x may be narrower.
    dtype = batch.mean.dtype
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    mean = torch.lerp(batch.mean, ref_mean.to(dtype), lambda1)  # eq. 15
    mixed = torch.lerp(batch.var, ref_var.to(dtype), lambda1)  # eq. 16
    # Only the batch's share is a sample variance, so only it takes Bessel's correction; with a
    # single value it is zero whatever the factor.
    excess = 1.0 / max(batch.count - 1, 1)  # of n / (n - 1) over 1
    var = torch.add(mixed, batch.var, alpha=(1.0 - lambda1) * excess)
    if x.numel() == 0:
        y = torch.empty_like(x)
    else:
        y = kernels.normalize(x, mean, mixed, weight, bias, eps)
    return y, mean, var, batch.mean, torch.rsqrt(mixed + eps)


def _backward_by_pieces(ctx, g):
    """What cpu_cpp.backward does, of a batch of which x may be a part."""
    kernels = ctx.kernels
    x, weight, batch_mean, mean, invstd = ctx.saved_tensors
    empty = x.numel() == 0
    if empty:
        sum_g = sum_g_xhat = torch.zeros_like(mean)
    else:
        sum_g, sum_g_xhat = kernels.sums(g, x, mean, invstd)
    total_g, total_g_xhat = sum_g, sum_g_xhat
    if ctx.all_reduce is not None:
        # Whatever this process needs, the others wait for its part.
        totals = torch.stack([sum_g, sum_g_xhat])
        ctx.all_reduce(totals)
        total_g, total_g_xhat = totals
    if not ctx.needs_input_grad[0]:
        return None, sum_g, sum_g_xhat
    if empty:
        return torch.empty_like(x), sum_g, sum_g_xhat
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    mean_g, slope = total_g * ctx.share, invstd * total_g_xhat * ctx.share
    grad_x = kernels.input_gradient(g, x, batch_mean, scale, mean_g, slope)
    return grad_x, sum_g, sum_g_xhat


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
    return _MixedNorm.apply(
        x, weight, bias, ref_mean, ref_var, pseudo_count, eps, batch, all_reduce
    )


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
    return _MixedNorm.apply(x, weight, bias, ref_mean, ref_var, pseudo_count, eps, None, None)


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
