"""RefBatchNorm2d: normalizes a batch by its own statistics mixed with those of a reference."""

import math
from typing import Optional

import torch
from torch import Tensor, nn

from .functional import ref_batch_norm
from .reference_norm import ReferenceNorm2d
from .running import update_running_stats

__all__ = ["RefBatchNorm2d"]


class RefBatchNorm2d(ReferenceNorm2d):
    """Reference-batch normalization, RefBN (Luo, Li and Zuo 2020, Algorithm 2).

    A training batch is normalized by its own statistics mixed with those of the reference batch,
    which counts as ``pseudo_count`` further samples (eq. 13-16)::

        lambda1 = pseudo_count / (N + pseudo_count),  lambda2 = 1 - lambda1
        mean = lambda2 mean_B + lambda1 ref_mean
        var  = lambda2 var_B  + lambda1 ref_var
        y    = weight (x - mean) / sqrt(var + eps) + bias

    N is the first dimension of the layer's own input on this process: images in a backbone, RoIs
    in a box or mask head. ``running_mean`` and ``running_var`` average the *mixed* statistics, by
    which training normalizes, with Bessel's correction of the batch variance (Algorithm 3).
    Statistics are computed in float32 (float64 for float64 input) and the output has x's dtype.

    An empty batch gives an empty output that is connected to the autograd graph, and updates
    nothing. An input with one value per channel is allowed if the layer has a reference. With
    ``pseudo_count=0`` this layer computes the same as nn.BatchNorm2d.

    Args:
        num_features: Number of channels C.
        eps: Constant added to the variance.
        momentum: Weight of a batch in the running statistics; None for a cumulative average.
        pseudo_count: Weight of the reference in samples, >= 0; 1 in the paper.
        affine, track_running_stats, device, dtype: Same as in nn.BatchNorm2d.

    Raises:
        ValueError: If ``pseudo_count`` is negative or not finite.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        pseudo_count: float = 1.0,
        **kwargs,
    ):
        if not (math.isfinite(pseudo_count) and pseudo_count >= 0):
            raise ValueError(f"pseudo_count must be a finite number >= 0, got {pseudo_count}")
        super().__init__(num_features, eps, momentum, **kwargs)
        self.pseudo_count = float(pseudo_count)

    @torch.jit.unused
    def _forward_by_batch(self, x: Tensor) -> Tensor:
        # Not for empty input: BatchNorm counts an empty batch in num_batches_tracked, which changes
        # a cumulative average.
        if self.pseudo_count == 0 and self._moments is None and x.numel() > 0:
            return nn.BatchNorm2d.forward(self, x)
        return super()._forward_by_batch(x)

    def _normalize(self, x: Tensor) -> Tensor:
        y, mean, var = ref_batch_norm(
            x, self.ref_mean, self.ref_var, self.weight, self.bias, self.pseudo_count, self.eps
        )
        update_running_stats(self, mean, var)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pseudo_count={self.pseudo_count:g}"
