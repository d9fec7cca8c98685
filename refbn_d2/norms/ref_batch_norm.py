"""RefBatchNorm2d: a batch normalized by its own statistics mixed with the reference's."""

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
    in a box or mask head. ``running_mean`` and ``running_var`` average the *mixed* statistics, the
    ones training normalized by, with Bessel's correction on the batch's share (Algorithm 3).
    Statistics are kept in float32 (float64 for float64 input) and the output has x's dtype.

    An empty batch gives an empty output that carries a gradient, and updates nothing. One value
    per channel is legal once a reference is held. With ``pseudo_count=0`` this is nn.BatchNorm2d.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics; None for a cumulative average.
        pseudo_count: weight of the reference in samples, >= 0; the paper's is 1.
        affine, track_running_stats, device, dtype: as in nn.BatchNorm2d.

    Raises:
        ValueError: ``pseudo_count`` is negative or not finite.
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
    def _forward_by_reference(self, x: Tensor) -> Tensor:
        # BatchNorm counts an empty batch, which moves a cumulative average.
        if self.pseudo_count == 0 and self._moments is None and x.numel() > 0:
            return nn.BatchNorm2d.forward(self, x)
        return super()._forward_by_reference(x)

    def _normalize(self, x: Tensor) -> Tensor:
        y, mean, var = ref_batch_norm(
            x, self.ref_mean, self.ref_var, self.weight, self.bias, self.pseudo_count, self.eps
        )
        update_running_stats(self, mean, var)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pseudo_count={self.pseudo_count:g}"
