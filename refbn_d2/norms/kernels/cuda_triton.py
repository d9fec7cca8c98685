"""The kernels on CUDA in Triton, used if REFBN_TRITON=1.

Their results have been tested with Triton's interpreter only; a test also compiles them for sm_90.
Their speed on a GPU has not been measured, so they are not the default.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .base import Kernels, statistics_dtype

__all__ = ["CudaTriton"]

# Number of programs that a reduction is split into: several for each multiprocessor of a large GPU.
# It is the same on every GPU, so that the order of summation does not depend on the GPU.
_PROGRAMS = 1024
_FLAT = 1024  # number of elements per program of an elementwise kernel
# Number of elements from which on an index may exceed int32. Below it, indices are int32, because
# int64 divisions would take longer than the memory accesses.
_WIDE = 2**30


@triton.jit
def _tile(program, i, chunk, pixels, channels, BR: tl.constexpr, BC: tl.constexpr,
          LAST: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Rows (n, h, w) and channels of a tile, and their offsets in x."""
    if WIDE:
        program = program.to(tl.int64)
    r = program * chunk + i + tl.arange(0, BR)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    r64, c64 = r[:, None].to(tl.int64), c[None, :].to(tl.int64)
    if LAST:
        offsets = r64 * channels + c64
    else:
        n = (r // pixels)[:, None].to(tl.int64)
        offsets = (n * channels + c64) * pixels + (r % pixels)[:, None]
    return r, c, offsets


@triton.jit
def _moments_kernel(x, means, squares, rows, chunk, pixels, channels, BR: tl.constexpr,
                    BC: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
                    ACC: tl.constexpr):  # fmt: skip
    """Mean and sum of squared deviations of a chunk of rows: (splits, C) each."""
    split = tl.program_id(1)
    count = tl.zeros((), ACC)
    mean = tl.zeros((BC,), ACC)
    square = tl.zeros((BC,), ACC)
    for i in range(0, chunk, BR):
        r, c, offsets = _tile(split, i, chunk, pixels, channels, BR, BC, LAST, WIDE)
        inside = (r < rows) & (i + tl.arange(0, BR) < chunk)
        mask = inside[:, None] & (c < channels)[None, :]
        v = tl.load(x + offsets, mask, 0.0).to(ACC)
        tile_count = tl.sum(inside.to(ACC), 0)
        tile_mean = tl.sum(v, 0) / tl.maximum(tile_count, 1.0)
        deviation = tl.where(mask, v - tile_mean[None, :], 0.0)
        total = tl.maximum(count + tile_count, 1.0)
        delta = tile_mean - mean
        # An empty tile has the mean 0, which has no effect because its weight is 0.
        square += tl.sum(deviation * deviation, 0) + delta * delta * (count * tile_count / total)
        mean += delta * (tile_count / total)
        count += tile_count
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    out = split * channels + c
    tl.store(means + out, mean, c < channels)
    tl.store(squares + out, square, c < channels)


@triton.jit
def _merge_kernel(means, squares, mean_out, var_out, rows, chunk, channels, splits,
                  BC: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Combines the moments of all chunks (Chan, Golub and LeVeque 1979)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = c < channels
    count = tl.zeros((), ACC)
    mean = tl.zeros((BC,), ACC)
    square = tl.zeros((BC,), ACC)
    first = tl.zeros((), tl.int64)  # first row of the chunk
    for k in range(splits):
        part = tl.load(means + k * channels + c, mask, 0.0)
        part_count = tl.minimum(rows - first, chunk).to(ACC)
        first += chunk
        total = count + part_count
        delta = part - mean
        square += tl.load(squares + k * channels + c, mask, 0.0)
        square += delta * delta * (count * part_count / total)
        mean += delta * (part_count / total)
        count = total
    tl.store(mean_out + c, mean, mask)
    tl.store(var_out + c, square / count, mask)


@triton.jit
def _sums_kernel(g, x, mean, invstd, out, rows, chunk, pixels, channels, splits, BR: tl.constexpr,
                 BC: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
                 ACC: tl.constexpr):  # fmt: skip
    """Sums of g and g (x - mean) invstd over a chunk of rows: (2, splits, C)."""
    split = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mu = tl.load(mean + c, c < channels, 0.0)
    sum_g = tl.zeros((BC,), ACC)
    sum_g_xmu = tl.zeros((BC,), ACC)
    for i in range(0, chunk, BR):
        r, c, offsets = _tile(split, i, chunk, pixels, channels, BR, BC, LAST, WIDE)
        inside = (r < rows) & (i + tl.arange(0, BR) < chunk)
        mask = inside[:, None] & (c < channels)[None, :]
        gv = tl.load(g + offsets, mask, 0.0).to(ACC)
        xmu = tl.load(x + offsets, mask, 0.0).to(ACC) - mu[None, :]
        sum_g += tl.sum(gv, 0)
        sum_g_xmu += tl.sum(tl.where(mask, gv * xmu, 0.0), 0)
    s = tl.load(invstd + c, c < channels, 0.0)
    tl.store(out + split * channels + c, sum_g, c < channels)
    tl.store(out + (splits + split) * channels + c, sum_g_xmu * s, c < channels)


@triton.jit
def _flat_indices(size, pixels, channels, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Positions in memory, a mask of the positions inside the tensor, and their channels."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    return i, i < size, (i // pixels) % channels


@triton.jit
def _normalize_kernel(x, y, mean, scale, bias, size, pixels, channels,
                      WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i, mask, c = _flat_indices(size, pixels, channels, WIDE, BLOCK)
    mu = tl.load(mean + c, mask)
    out = (tl.load(x + i, mask).to(mu.dtype) - mu) * tl.load(scale + c, mask)
    if bias is not None:
        out += tl.load(bias + c, mask)
    tl.store(y + i, out, mask)


@triton.jit
def _input_gradient_kernel(g, x, out, center, scale, mean_g, slope, size, pixels, channels,
                           WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i, mask, c = _flat_indices(size, pixels, channels, WIDE, BLOCK)
    mu = tl.load(center + c, mask)
    drop = tl.load(mean_g + c, mask)
    drop += tl.load(slope + c, mask) * (tl.load(x + i, mask).to(mu.dtype) - mu)
    dx = tl.load(scale + c, mask) * (tl.load(g + i, mask).to(mu.dtype) - drop)
    tl.store(out + i, dx, mask)


def _split(x: Tensor):
    """Divides a reduction into programs: returns the grid, the arguments and the constants."""
    samples, channels, height, width = x.shape
    last = not x.is_contiguous()
    block_rows, block_channels = (64, 32) if last else (1024, 1)
    rows = samples * height * width
    across = triton.cdiv(channels, block_channels)
    splits = max(1, min(_PROGRAMS // across, triton.cdiv(rows, block_rows)))
    chunk = triton.cdiv(rows, splits)
    splits = triton.cdiv(rows, chunk)  # so that no split is empty
    constants = {
        "BR": block_rows,
        "BC": block_channels,
        "LAST": last,
        "WIDE": rows >= _WIDE,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }
    return (across, splits), (rows, chunk, height * width, channels), constants


def _flat(x: Tensor):
    """Divides an elementwise kernel into programs.

    Returns:
        The grid, and the arguments size, pixels, channels, WIDE and BLOCK.
    """
    pixels = x.shape[2] * x.shape[3] if x.is_contiguous() else 1
    size = x.numel()
    return (triton.cdiv(size, _FLAT),), (size, pixels, x.shape[1], size >= _WIDE, _FLAT)


class CudaTriton(Kernels):
    """Triton kernels, for every floating dtype."""

    name = "cuda_triton"

    def moments(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        grid, sizes, constants = _split(x)
        rows, chunk, _, channels = sizes
        means, squares = x.new_empty(2, grid[1], channels, dtype=statistics_dtype(x))
        mean, var = torch.empty_like(means[0]), torch.empty_like(means[0])
        with torch.cuda.device_of(x):
            _moments_kernel[grid](x, means, squares, *sizes, **constants)
            _merge_kernel[(triton.cdiv(channels, 128),)](
                means, squares, mean, var, rows, chunk, channels, grid[1], 128, constants["ACC"]
            )
        return mean, var

    def sums(self, g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
        grid, sizes, constants = _split(x)
        out = mean.new_empty(2, grid[1], x.shape[1])
        with torch.cuda.device_of(x):
            _sums_kernel[grid](g, x, mean, invstd, out, *sizes, grid[1], **constants)
        sum_g, sum_g_xhat = out.sum(1)
        return sum_g, sum_g_xhat

    def normalize(self, x: Tensor, mean: Tensor, scale: Tensor, bias: Optional[Tensor]) -> Tensor:
        y = torch.empty_like(x)
        grid, sizes = _flat(x)
        with torch.cuda.device_of(x):
            _normalize_kernel[grid](x, y, mean, scale, bias, *sizes)
        return y

    def input_gradient(
        self, g: Tensor, x: Tensor, center: Tensor, scale: Tensor, mean_g: Tensor, slope: Tensor
    ) -> Tensor:
        grad = torch.empty_like(x)
        grid, sizes = _flat(x)
        with torch.cuda.device_of(x):
            _input_gradient_kernel[grid](g, x, grad, center, scale, mean_g, slope, *sizes)
        return grad
