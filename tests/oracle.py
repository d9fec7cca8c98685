"""The papers' equations, written down once more: plain autograd, elementary operations, no helper
of the package. Statistics come as (C,) or (N, C) tensors; all of it in the dtype of x."""

import torch


def channel(v):
    return v.view(1, -1, 1, 1)


def mean_over(x, *dims):
    size = 1
    for d in dims:
        size *= x.shape[d]
    return x.sum(dims, keepdim=True) / size


def moments(x, *dims):
    """Mean and biased variance over ``dims``, which are kept with size 1."""
    mean = mean_over(x, *dims)
    return mean, mean_over((x - mean) ** 2, *dims)


def normalized(x, mean, var, weight, bias, eps):
    return channel(weight) * (x - mean) / (var + eps) ** 0.5 + channel(bias)


def ref_bn(x, ref_mean, ref_var, weight, bias, k=1.0, eps=1e-5):
    """RefBN, Luo, Li and Zuo 2020, eq. 13-16. Returns y, mixed mean, variance to average."""
    m, n = x.shape[0], x.shape[0] * x.shape[2] * x.shape[3]
    l1 = k / (m + k)
    mean_b, var_b = moments(x, 0, 2, 3)
    mean = (1 - l1) * mean_b + l1 * channel(ref_mean)
    var = (1 - l1) * var_b + l1 * channel(ref_var)
    unbiased = (1 - l1) * var_b * (n / (n - 1) if n > 1 else 1) + l1 * channel(ref_var)
    return normalized(x, mean, var, weight, bias, eps), mean.flatten(), unbiased.flatten()


def renorm(x, mu, sigma, weight, bias, r_max, d_max, eps=1e-5):
    """Batch Renormalization, Ioffe 2017, Algorithm 1. Returns y, mean_B, sigma_B."""
    mean_b, var_b = moments(x, 0, 2, 3)
    sigma_b = (var_b + eps) ** 0.5
    r = (sigma_b.detach() / channel(sigma)).clip(1 / r_max, r_max)
    d = ((mean_b.detach() - channel(mu)) / channel(sigma)).clip(-d_max, d_max)
    y = channel(weight) * ((x - mean_b) / sigma_b * r + d) + channel(bias)
    return y, mean_b.flatten(), sigma_b.flatten()


def switchable(x, weight, bias, mean_weight, var_weight, batch=None, eps=1e-5):
    """Switchable Normalization, Luo et al. 2018, eq. 3-4; ``batch`` is BN's (mean, var) in eval."""
    layers = [moments(x, 2, 3), moments(x, 1, 2, 3)]
    layers.append(moments(x, 0, 2, 3) if batch is None else tuple(map(channel, batch)))
    a, b = mean_weight.exp() / mean_weight.exp().sum(), var_weight.exp() / var_weight.exp().sum()
    mean = sum(a[k] * layers[k][0] for k in range(3))
    var = sum(b[k] * layers[k][1] for k in range(3))
    return normalized(x, mean, var, weight, bias, eps)


def virtual(x, ref_mean, ref_var, n, weight, bias, eps=1e-5):
    """Virtual Batch Normalization, Salimans et al. 2016: mixes the mean and the mean of squares."""
    own, ref = 1 / (n + 1), n / (n + 1)
    mean = own * mean_over(x, 2, 3) + ref * channel(ref_mean)
    sq = own * mean_over(x**2, 2, 3) + ref * channel(ref_var + ref_mean**2)
    return normalized(x, mean, sq - mean**2, weight, bias, eps), mean, sq - mean**2


def instance(x, weight, bias, eps=1e-5):
    """Instance normalization, Ulyanov et al. 2016, eq. 3."""
    return normalized(x, *moments(x, 2, 3), weight, bias, eps)


def gradients(y, g, *inputs):
    """Gradients of sum(y g)."""
    return torch.autograd.grad((y * g).sum(), inputs)


def relative_error(actual, expected, unit=0.0):
    """Largest deviation in units of the largest expected value, or of ``unit`` if that is more."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if expected.numel() == 0:
        return 0.0 if actual.shape == expected.shape else float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=max(unit, 1e-30)))


def check_module(
    module, expected, shape, dtype, tol, *names, channels_last=False, scale=3.0, cancels=False
):
    """Compares output and gradients of ``module`` with ``expected`` in float64.

    Args:
        expected: maps x and the parameters called ``names``, float64, to y.
        names: parameters of ``module`` whose gradients are compared, too.
    """
    x = torch.randn(shape, dtype=torch.float64) * scale + 1
    x = x.to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    params = [getattr(module, n) for n in names]
    with torch.no_grad():
        for p in params:
            p.copy_(torch.randn(p.shape) + 0.5)
    inputs = [t.detach().double().requires_grad_() for t in [x, *params]]
    wanted = expected(*inputs)
    g = torch.randn(shape, dtype=torch.float64)

    y = module(x)
    assert y.dtype == dtype and y.shape == x.shape
    if channels_last:
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, wanted) < tol
    grads = gradients(y, g.to(dtype), x, *params)
    wanted_grads = gradients(wanted, g.to(dtype).double(), *inputs)
    # If all terms of a gradient cancel, a relative error is meaningless.
    unit = max(float(grad.abs().max()) for grad in wanted_grads) if cancels else 0.0
    for actual, wanted_grad in zip(grads, wanted_grads):
        assert relative_error(actual, wanted_grad, unit) < tol
    assert grads[0].dtype == dtype
