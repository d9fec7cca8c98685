"""BatchRenorm2d: BatchNorm with a correction towards its moving averages."""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch_norm_like import BatchNormLike2d
from .functional import batch_moments
from .repeated import RecentPasses
from .running import count_batch
from .tracing import in_backward

__all__ = ["BatchRenorm2d"]

_R_MAX, _D_MAX = 3.0, 5.0
# The paper's schedule (section 4.2): plain BatchNorm for 5k steps, then d_max grows until step 25k
# and r_max until step 40k. These are the same steps as fractions of 40k.
_START, _D_END, _R_END = 5 / 40, 25 / 40, 1.0


class BatchRenorm2d(BatchNormLike2d):
    """Batch Renormalization, BRN (Ioffe 2017, arXiv 1702.03275, Algorithm 1).

    With sigma_B = sqrt(var_B + eps), biased var_B, and moving averages mu and sigma, training
    computes::

        r = clip(sigma_B / sigma, 1 / r_max, r_max)       without gradient
        d = clip((mean_B - mu) / sigma, -d_max, d_max)    without gradient
        y = weight ((x - mean_B) / sigma_B r + d) + bias
        mu    <- mu + momentum (mean_B - mu)
        sigma <- sigma + momentum (sigma_B - sigma)

    and evaluation computes y = weight (x - mu) / sigma + bias. For the first 1/8 of the
    ``schedule_steps`` training steps r_max = 1 and d_max = 0, which is BatchNorm. Then d_max grows
    linearly to 5 at 5/8 of the steps, and r_max to 3 at the end, as in the paper, where
    ``schedule_steps`` is 40,000. ``num_batches_tracked`` is the position in the schedule, so the
    state dict contains it.

    **sigma and running_var.** This class averages sigma_B and not its square, as the paper does, so
    that E[r] = 1. The buffer, however, stores ``running_var`` = sigma^2 - eps. The state dict is
    therefore BatchNorm's, the statistics of a BatchNorm checkpoint keep their meaning, and
    evaluation is ``F.batch_norm``: freezing, fusing and exporting need no special case. Unlike
    BatchNorm's, this ``running_var`` has no Bessel correction, because the paper has none.

    **Activation checkpointing** repeats the forward pass during the backward pass, after the moving
    averages have been updated. The repeated pass uses the r and d of the first pass and does not
    update the averages again. This works for the last 32 calls of the layer before the backward
    pass.

    An empty batch gives an empty output that is connected to the autograd graph, and updates
    nothing.

    Args:
        num_features: Number of channels C.
        eps: Constant added to the variance.
        momentum: Weight of a batch in the moving averages, 0.01 in the paper; None for cumulative
            averages.
        schedule_steps: Length of the schedule in training steps, >= 1.
        affine, track_running_stats, device, dtype: Same as in nn.BatchNorm2d.

    Raises:
        ValueError: If ``schedule_steps`` < 1 or ``track_running_stats`` is False (training needs
            the moving averages), or if a training batch has one value per channel, as in BatchNorm.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.01,
        schedule_steps: int = 40_000,
        **kwargs,
    ):
        if schedule_steps < 1:
            raise ValueError(f"schedule_steps must be >= 1, got {schedule_steps}")
        if not kwargs.get("track_running_stats", True):
            raise ValueError(
                "Batch Renormalization needs running statistics in training too: do not set "
                "track_running_stats=False"
            )
        super().__init__(num_features, eps, momentum, **kwargs)
        self.schedule_steps = schedule_steps
        self._recent = RecentPasses()

    def limits(self) -> Tuple[Tensor, Tensor]:
        """Returns (r_max, d_max) of the next training step as float64 scalar tensors."""
        # Computed on the device, because reading the step on the host would wait for the GPU.
        time = self.num_batches_tracked.double() / self.schedule_steps - _START
        r_max = 1 + (_R_MAX - 1) * (time / (_R_END - _START)).clamp(0, 1)
        d_max = _D_MAX * (time / (_D_END - _START)).clamp(0, 1)
        return r_max, d_max

    @torch.jit.unused  # scripted models only evaluate
    def _forward_by_batch(self, x: Tensor) -> Tensor:
        if self.running_mean is None:  # taken away, as torch.func's replace_all_batch_norm_modules_
            return nn.BatchNorm2d.forward(self, x)
        if x.numel() == 0:
            return self._normalize_by_running_stats(x)

        recomputes = not torch.compiler.is_compiling() and in_backward()
        with torch.no_grad():
            mean, var = batch_moments(x)
            sigma_batch = torch.sqrt(var + self.eps)
            sigma = torch.sqrt(self.running_var.to(var.dtype) + self.eps)
            r_max, d_max = (limit.to(var.dtype) for limit in self.limits())
            r = torch.clamp(sigma_batch / sigma, 1 / r_max, r_max)
            d = torch.clamp((mean - self.running_mean.to(mean.dtype)) / sigma, -d_max, d_max)
            if recomputes:
                r, d = self._recent.recall(mean, r, d)
            elif not torch.compiler.is_compiling():
                self._recent.remember(mean, r, d)
        # weight (x_hat r + d) + bias is BatchNorm with the weight and bias below, so BatchNorm's
        # kernel computes it and its gradient.
        weight, bias = r, d
        if self.weight is not None:
            weight, bias = self.weight.to(r.dtype) * r, self.weight.to(d.dtype) * d
        if self.bias is not None:
            bias = bias + self.bias.to(d.dtype)
        y = F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)

        if recomputes or not self.track_running_stats:
            return y  # the first pass has already updated the averages, or they are to stay
        with torch.no_grad():
            factor = count_batch(self)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
            # Rounding can make the difference slightly negative.
            running_var = torch.lerp(sigma, sigma_batch, factor).square() - self.eps
            self.running_var.copy_(running_var.clamp_(min=0))
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, schedule_steps={self.schedule_steps}"
