"""The kernels on CUDA: those of PyTorch's SyncBatchNorm.

PyTorch's BatchNorm calls the same kernels when it does not call cuDNN, in both memory formats. The
kernel for the gradient of x takes the two sums as arguments, so no further pass is needed. The
speed on a GPU has not been measured.
"""

from typing import Tuple

import torch
from torch import Tensor

from .base import Kernels

__all__ = ["CudaAten"]


class CudaAten(Kernels):
    """PyTorch's kernels of SyncBatchNorm."""

    name = "cuda_aten"

    def moments(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        # batch_norm_stats returns 1 / sqrt(var + eps), from which var cannot be recovered exactly.
        return torch.batch_norm_update_stats(x, None, None, 0.0)

    def sums(self, g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
        # The kernel takes the dtype of the vectors from the weight.
        weight = invstd
        sum_g, sum_g_xmu, _, _ = torch.batch_norm_backward_reduce(
            g, x, mean, invstd, weight, True, False, False
        )
        return sum_g, sum_g_xmu * invstd

    def input_gradient(
        self, g: Tensor, x: Tensor, center: Tensor, scale: Tensor, mean_g: Tensor, slope: Tensor
    ) -> Tensor:
        unit = torch.ones_like(center)
        # The kernel divides both sums by the number of elements. mean_g and slope are already
        # divided, so the number is 1.
        count = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(g, x, center, unit, scale, mean_g, slope, count)
