"""The arithmetic of reference-batch normalization: forward, gradient, and nothing else."""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["batch_moments", "ref_batch_norm"]


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def batch_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over N, H and W (Algorithm 2, lines 3-4).

    Args:
        x: (N, C, H, W), not empty, any floating dtype.

    Returns:
        Two (C,) tensors, float64 for float64 input and float32 for every other dtype.
    """
    # Sums over 10^6 bfloat16 values lose all their digits; statistics are never narrower than fp32.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean, var


class _RefBatchNorm(torch.autograd.Function):
    """y = weight (x - mu) s + bias with mu, s from mixed statistics; keeps x and (C,) vectors.

    With s = (var + eps)^-1/2, a = weight s and n = N H W, differentiating eq. 15-16 gives

        dx = a [ g - l2 mean(g) - l2 s^2 (x - mu_B) mean(g (x - mu)) ]

    where l2 = N / (N + pseudo_count). The reference is a constant: no gradient reaches it. l2 = 1
    is BatchNorm, l2 = 0 a frozen affine map.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, ref_mean, ref_var, pseudo_count, eps):
        num_samples, num_channels = x.shape[:2]
        num_values = x.numel() // num_channels
        batch_mean, batch_var = batch_moments(x)
        ref_mean, ref_var = ref_mean.to(batch_mean.dtype), ref_var.to(batch_mean.dtype)
        lambda1 = pseudo_count / (num_samples + pseudo_count)  # eq. 13
        lambda2 = 1.0 - lambda1  # eq. 14
        mean = lambda2 * batch_mean + lambda1 * ref_mean  # eq. 15
        var = lambda2 * batch_var + lambda1 * ref_var  # eq. 16
        # Only the batch's share is a sample variance, so only it takes Bessel's correction; with
        # a single value it is zero whatever the factor.
        bessel = num_values / max(num_values - 1, 1)
        var_unbiased = lambda2 * bessel * batch_var + lambda1 * ref_var
        # Kernels want the per-channel vectors in one dtype, x may be narrower.
        affine = [None if p is None else p.to(mean.dtype) for p in (weight, bias)]
        y = F.batch_norm(x, mean, var, *affine, training=False, eps=eps)

        ctx.save_for_backward(x, weight, batch_mean, mean, var)
        ctx.lambda2, ctx.num_values, ctx.eps = lambda2, num_values, eps
        ctx.mark_non_differentiable(mean, var_unbiased)
        return y, mean, var_unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _grad_mean, _grad_var):
        x, weight, batch_mean, mean, var = ctx.saved_tensors
        invstd = torch.rsqrt(var + ctx.eps)
        # Dtype of the per-channel vectors: never narrower than float32.
        xf, gf = x.to(mean.dtype), g.to(mean.dtype)
        sum_g = gf.sum(dim=(0, 2, 3))
        # sum of g (x - mu) s: the gradient of weight, and all that dx needs besides sum_g.
        sum_g_xhat = torch.einsum("nchw,nchw->c", gf, xf - _per_channel(mean)) * invstd

        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
            slope = scale * invstd * sum_g_xhat * (ctx.lambda2 / ctx.num_values)
            offset = scale * sum_g * (ctx.lambda2 / ctx.num_values)
            grad_x = gf * _per_channel(scale)
            grad_x -= _per_channel(offset)
            grad_x -= (xf - _per_channel(batch_mean)) * _per_channel(slope)
            grad_x = grad_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = sum_g_xhat.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = sum_g.to(g.dtype if weight is None else weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


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
    return _RefBatchNorm.apply(x, weight, bias, ref_mean, ref_var, float(pseudo_count), eps)
