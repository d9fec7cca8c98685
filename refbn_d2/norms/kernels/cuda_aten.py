"""The kernels on CUDA: the building blocks of PyTorch's own SyncBatchNorm.

They are the kernels that PyTorch's own BatchNorm calls where it does not call cuDNN, in both memory
formats, and their last one takes the two sums as arguments: the gradient needs no further pass.
Speed on a GPU is unmeasured.
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
        # Unlike batch_norm_stats, which returns 1 / sqrt(var + eps), this keeps the digits of var.
        return torch.batch_norm_update_stats(x, None, None, 0.0)

    def sums(self, g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
        # The dtype of the weight tells the kernel that of the vectors.
        weight = invstd
        sum_g, sum_g_xmu, _, _ = torch.batch_norm_backward_reduce(
            g, x, mean, invstd, weight, True, False, False
        )
        return sum_g, sum_g_xmu * invstd

    def input_gradient(
        self, g: Tensor, x: Tensor, center: Tensor, scale: Tensor, mean_g: Tensor, slope: Tensor
    ) -> Tensor:
        unit = torch.ones_like(center)
        # The kernel divides both sums by the number of elements: they have been.
        count = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(g, x, center, unit, scale, mean_g, slope, count)
