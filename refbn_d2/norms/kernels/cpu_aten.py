"""The kernels on a CPU without a C++ compiler: PyTorch's own vectorized kernels.

docs/performance.md lists their costs and the alternatives that were tried.
"""

from typing import Iterator, Tuple

import torch
from torch import Tensor

from .base import Kernels, per_channel, statistics_dtype
from .formulas import Formulas

__all__ = ["CpuAten"]

# Number of elements in a block. A block of float32 takes 1 MiB, which stays in the cache; smaller
# blocks would need more calls.
_BLOCK = 1 << 18
# Largest number of values per channel in a block of channels_last input. PyTorch's kernel adds them
# in float32, divided among the threads; the variance of 10^5 values then has only 5 correct digits.
_ROWS = 1 << 15
# If a mean is more than this many standard deviations from zero, the native kernel loses digits of
# the variance, and another pass is worth its time.
_FAR = 8.0
# Number of elements from which on summing by rows is faster; shorter rows do not fill a vector
# register.
_SHORT_ROW = 16

_FORMULAS = Formulas()


class CpuAten(Kernels):
    """PyTorch's vectorized kernels."""

    name = "cpu_aten"

    def moments(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        if x.is_contiguous() and x.shape[2] * x.shape[3] >= _SHORT_ROW and not _is_narrow(x):
            mean, var = _row_moments(x)
        else:
            mean, var = _native_moments(x)
            if (mean.abs() > _FAR * var.sqrt()).any():
                mean, var = _row_moments(x) if x.is_contiguous() else _column_moments(x)
        if x.dtype != torch.float64 and not var.isfinite().all():  # squares beyond 1e38
            var, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
        return mean, var

    def sums(self, g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
        # BatchNorm's backward kernel without the gradient of x returns just these sums. It requires
        # weight and running statistics as arguments but does not use them.
        _, sum_g_xhat, sum_g = torch.ops.aten.native_batch_norm_backward(
            g, x, mean, mean, mean, mean, invstd, True, 0.0, [False, True, True]
        )
        return sum_g, sum_g_xhat

    def input_gradient(
        self, g: Tensor, x: Tensor, center: Tensor, scale: Tensor, mean_g: Tensor, slope: Tensor
    ) -> Tensor:
        unit = torch.ones_like(center)
        weight, bias = -scale * slope, -scale * mean_g
        if ((weight == 0) & (scale * slope.sign() != 0)).any():  # too small for float32
            return _FORMULAS.input_gradient(g, x, center, scale, mean_g, slope)
        if x.dtype == center.dtype:
            grad = torch.native_batch_norm(x, weight, bias, center, unit, False, 0.0, 0.0)[0]
            return grad.addcmul_(g, per_channel(scale))
        # In bfloat16 each term would be rounded on its own, and mean_g would not cancel exactly.
        grad = torch.empty_like(x)
        blocks = list(_blocks(x))
        size = x[blocks[0]].numel()
        scratch, scratch_g = torch.empty(2, size, dtype=center.dtype)
        vectors = [per_channel(v) for v in (center, weight, bias, scale)]
        for block in blocks:
            part = grad[block]
            wide, wide_g = (s.as_strided(part.shape, part.stride()) for s in (scratch, scratch_g))
            c, w, b, a = (v[:, block[1]] for v in vectors)
            wide.copy_(x[block]).sub_(c).mul_(w).add_(b)
            part.copy_(wide.addcmul_(wide_g.copy_(g[block]), a))
        return grad


def _is_narrow(x: Tensor) -> bool:
    return x.dtype != statistics_dtype(x)


def _native_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and variance by PyTorch's batch norm kernel, applied to blocks.

    For bfloat16, float16 and channels_last input the kernel has one float32 accumulator per
    channel, so the variance of 10^6 values has only 3 correct digits. Applied to blocks whose
    results are then combined, it has 6. All passes of the kernel but the first find x in the cache.
    """
    # With float32 running statistics the kernel computes and returns float32 for 16-bit input.
    dtype = statistics_dtype(x)
    unused_mean, unused_var = (
        torch.zeros(2, x.shape[1], dtype=dtype) if _is_narrow(x) else (None, None)
    )
    blocks = [x] if x.is_contiguous() else [x[b] for b in _blocks(x)]
    moments = [torch.batch_norm_update_stats(b, unused_mean, unused_var, 0.0) for b in blocks]
    if len(moments) == 1:
        return moments[0]
    means, variances = (torch.stack(vectors) for vectors in zip(*moments))
    # Not a matrix product, because torch.autocast would round that to 16 bits.
    share = torch.tensor([[b.numel() / x.numel()] for b in blocks], dtype=means.dtype)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def _column_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and variance of channels_last x, precise for every mean.

    Sums the squared deviations in each block and then combines the blocks.
    """
    dtype = statistics_dtype(x)
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    step = max(1, _BLOCK // rows.shape[1])
    scratch = torch.empty_like(rows[:step], dtype=dtype)
    sizes, means, norms = [], [], []
    for block in rows.split(step):
        mean = block.mean(0, dtype=dtype)
        centered = torch.sub(block, mean, out=scratch[: block.shape[0]])
        sizes.append(block.shape[0])
        means.append(mean)
        norms.append(centered.square_().sum(0))
    share = torch.tensor(sizes, dtype=torch.float64) / rows.shape[0]
    block_mean = torch.stack(means).double()
    mean = share @ block_mean
    within = torch.stack(norms).double().sum(0) / rows.shape[0]
    between = share @ (block_mean - mean).square()
    return mean.to(dtype), (within + between).to(dtype)


def _row_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and variance of contiguous x: those of each row of H W elements, then combined.

    The combination is that of Chan, Golub and LeVeque (1979). PyTorch's batch norm kernel adds
    contiguous input value by value and takes 4 to 20 times as long as sum and norm, which are
    vectorized. x is read from memory only once: each block is centered in a buffer that stays in
    the cache.
    """
    samples, channels = x.shape[:2]
    rows = x.view(samples * channels, -1)
    step = max(1, _BLOCK // rows.shape[1])
    dtype = statistics_dtype(x)
    scratch = torch.empty_like(rows[:step], dtype=dtype)
    means, norms = [], []
    for block in rows.split(step):
        mean = block.mean(1, keepdim=True, dtype=dtype)
        centered = torch.sub(block, mean, out=scratch[: block.shape[0]])
        means.append(mean)
        norms.append(torch.linalg.vector_norm(centered, dim=1))
    row_mean = torch.cat(means).view(samples, channels)
    row_norm = torch.cat(norms).view(samples, channels)
    mean = row_mean.mean(0)
    within = row_norm.square_().sum(0).div_(rows.shape[1])
    between = row_mean.sub_(mean).square_().sum(0)
    return mean, within.add_(between).div_(samples)


def _blocks(x: Tensor) -> Iterator[Tuple[slice, slice, slice]]:
    """Slices of the first three dimensions that divide a dense x into blocks, in memory order."""
    size, per_sample = x.shape, x[0].numel()
    largest = _BLOCK if x.is_contiguous() else min(_BLOCK, _ROWS * size[1])
    everything = slice(None)
    if per_sample <= largest:
        step = largest // per_sample
        for n in range(0, size[0], step):
            yield slice(n, n + step), everything, everything
        return
    dim = 1 if x.is_contiguous() else 2
    step = max(1, largest // (per_sample // size[dim]))
    for n in range(size[0]):
        for i in range(0, size[dim], step):
            part = slice(i, i + step)
            both = (part, everything) if dim == 1 else (everything, part)
            yield (slice(n, n + 1), *both)
