"""VirtualBatchNorm2d: normalizes each sample by its own and the reference batch's statistics."""

from typing import Optional

import torch
from torch import Tensor

from .functional import sample_norm, statistics_dtype
from .reference_norm import ReferenceNorm2d
from .running import update_running_stats

__all__ = ["VirtualBatchNorm2d"]


class VirtualBatchNorm2d(ReferenceNorm2d):
    """Virtual Batch Normalization, VBN (Salimans et al. 2016, arXiv 1606.03498, section 3.5).

    Each sample is normalized by the statistics of itself and the n samples of the reference batch
    together. With the sample's mean mean_x and mean of squares sq_x over H and W::

        mean = 1 / (n + 1) mean_x + n / (n + 1) ref_mean
        sq   = 1 / (n + 1) sq_x   + n / (n + 1) (ref_var + ref_mean^2)
        y    = weight (x - mean) / sqrt(sq - mean^2 + eps) + bias

    There are three differences to RefBN. The samples of a batch do not influence each other. n is
    the size of the reference batch, not of the current batch. Mixing the means of squares adds the
    variance between the two means to the mixed variance. n is stored in ``ref_size``: the number of
    images in a backbone, of RoIs in a box or mask head. A layer that is used k times in a forward
    pass counts each image k times.

    **Evaluation** computes the same as training, per sample, as in the paper. If the layer has no
    reference, for example because a BatchNorm checkpoint was loaded, it evaluates like BatchNorm.
    The running statistics average the statistics that training normalizes by, over samples and
    batches. Evaluation does not use them, but freezing this layer, or converting it to a norm that
    is an affine map in evaluation, does. That affine map approximates this layer on average; its
    outputs are not the same.

    **Difference to the paper.** In the paper the statistics of the reference batch come from a
    second forward pass in every step, with the current weights and with gradients. Here they are
    captured once and then constant, as in RefBN. (Capturing them again in every step gives the
    paper's values, but no gradients.)

    Statistics are computed in float32 (float64 for float64 input) and the output has x's dtype. An
    empty batch gives an empty output that is connected to the autograd graph, and updates nothing.
    An input with one value per channel is allowed if the layer has a reference.

    Args:
        num_features: Number of channels C.
        eps: Constant added to the variance.
        momentum: Weight of a batch in the running statistics; None for a cumulative average.
        affine, track_running_stats, device, dtype: Same as in nn.BatchNorm2d.
    """

    def check_reference(self, count: Optional[int], size: int) -> None:
        super().check_reference(count, size)
        if size < 1:
            raise ValueError(
                f"{self!r}: the weight of a reference depends on the number of samples it comes "
                "from, which is unknown for this one; capture it again"
            )

    def _by_running_stats(self) -> bool:
        if not super()._by_running_stats() or self._is_noted():
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
        # Equals sq - mean^2, which would lose digits by cancellation if the mean is large.
        between = own * (1 - own) * (own_mean - ref_mean).square()
        var = own * own_var + (1 - own) * ref_var + between
        if not self.training and self.running_mean is not None and not self._is_noted():
            # In a trace the host cannot read the flag, so the traced graph selects the statistics.
            held = self.ref_captured >= 0.5
            mean = torch.where(held, mean, self.running_mean.to(dtype))
            var = torch.where(held, var, self.running_var.to(dtype))
        update_running_stats(self, mean.detach().mean(dim=0), var.detach().mean(dim=0))
        return sample_norm(x, mean, var, self.weight, self.bias, self.eps)
