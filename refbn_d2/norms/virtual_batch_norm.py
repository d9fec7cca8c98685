"""VirtualBatchNorm2d: each sample by its own statistics and those of the reference batch."""

from typing import Optional

import torch
from torch import Tensor

from .functional import sample_norm, statistics_dtype
from .reference_norm import ReferenceNorm2d
from .running import update_running_stats

__all__ = ["VirtualBatchNorm2d"]


class VirtualBatchNorm2d(ReferenceNorm2d):
    """Virtual Batch Normalization, VBN (Salimans et al. 2016, arXiv 1606.03498, section 3.5).

    Each sample is normalized by the statistics of itself together with the n samples of the
    reference batch. With its own mean_x and mean of squares sq_x over H and W::

        mean = 1 / (n + 1) mean_x + n / (n + 1) ref_mean
        sq   = 1 / (n + 1) sq_x   + n / (n + 1) (ref_var + ref_mean^2)
        y    = weight (x - mean) / sqrt(sq - mean^2 + eps) + bias

    Unlike RefBN the samples of a batch do not influence each other, n is the size of the reference
    batch and not of the current one, and mixing mean squares adds a between-means term to the
    variance. n is ``ref_size``: images in a backbone, RoIs in a box or mask head; a layer that is
    used k times in a forward pass counts each image k times.

    **Evaluation** is the same, per sample, as in the paper. Only where no reference is held (a
    BatchNorm checkpoint was loaded) it is BatchNorm's. The running statistics average what
    training normalized by, over samples and batches; evaluation does not need them, but freezing
    this layer, or converting it to a norm whose evaluation is one affine map, does. That map is
    therefore the mean behaviour of this layer, not the same outputs.

    **Departures from the paper.** There the statistics of the reference batch come from a second
    forward pass in every step, with the current weights and with a gradient; here, as in RefBN,
    they are captured and constant. (Capturing them again every step gives the former.)

    Statistics are kept in float32 (float64 for float64 input) and the output has x's dtype. An
    empty batch gives an empty output that carries a gradient, and updates nothing. One value per
    channel is legal once a reference is held.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics; None for a cumulative average.
        affine, track_running_stats, device, dtype: as in nn.BatchNorm2d.
    """

    def check_reference(self, count: Optional[int], size: int) -> None:
        super().check_reference(count, size)
        if size < 1:
            raise ValueError(
                f"{self!r}: the weight of a reference depends on the number of samples it comes "
                "from, which is unknown for this one; capture it again"
            )

    def _by_running_stats(self) -> bool:
        if self.training or self.running_mean is None or self._is_noted():
            return False
        held = None if torch.compiler.is_compiling() else self._read()
        if held:
            self._note_captured()
        return held is False

    def _normalize(self, x: Tensor) -> Tensor:
        dtype = statistics_dtype(x)
        own_var, own_mean = torch.var_mean(x.to(dtype), dim=(2, 3), correction=0)  # (N, C)
        ref_mean, ref_var = self.ref_mean.to(dtype), self.ref_var.to(dtype)
        own = (self.ref_size + 1).to(dtype).reciprocal()
        mean = own * own_mean + (1 - own) * ref_mean
        # sq - mean^2, rearranged: as it stands it loses its digits where the mean is large.
        between = own * (1 - own) * (own_mean - ref_mean).square()
        var = own * own_var + (1 - own) * ref_var + between
        if not self.training and self.running_mean is not None and not self._is_noted():
            # In a trace, where the host cannot read which of the two it is.
            held = self.ref_captured >= 0.5
            mean = torch.where(held, mean, self.running_mean.to(dtype))
            var = torch.where(held, var, self.running_var.to(dtype))
        update_running_stats(self, mean.detach().mean(dim=0), var.detach().mean(dim=0))
        return sample_norm(x, mean, var, self.weight, self.bias, self.eps)
