"""SyncRefBatchNorm2d: RefBN by the statistics of a batch that is split over processes."""

import torch
from torch import Tensor
from torch import distributed as dist

from .functional import BatchStatistics, mixed_norm, statistics_dtype
from .moments import Moments
from .processes import all_gather
from .ref_batch_norm import RefBatchNorm2d
from .running import update_running_stats

__all__ = ["SyncRefBatchNorm2d"]


class SyncRefBatchNorm2d(RefBatchNorm2d):
    """Synchronized RefBN, SyncRefBN: normalizes by the statistics of the batch of all processes.

    mean_B, var_B and m of eq. 13-16 are those of the whole batch of the default process group. The
    parts are combined exactly, weighted by their numbers of elements. Several processes therefore
    give the outputs, the gradients of x and the running statistics that :class:`RefBatchNorm2d`
    gives on one process with the whole batch, up to rounding. Gradients of ``weight`` and ``bias``
    cover the part of this process, as usual; DistributedDataParallel combines them. With
    ``pseudo_count=0`` this layer is synchronized BatchNorm. In evaluation, on one process, or
    without a process group it is :class:`RefBatchNorm2d`.

    Every process communicates once in each forward pass in training (2 C + 2 numbers) and once in
    each backward pass (2 C numbers), also if its part of the batch is empty. Therefore all
    processes must call the layer equally often, and an empty output must enter the loss too, for
    example as ``0 * y.sum()``. DistributedDataParallel requires the same. As in nn.SyncBatchNorm
    the sizes of the parts are read on the host, which waits for the device. If the layer has no
    reference, the first batch that is not empty becomes the reference, the same one on every
    process.

    Args:
        num_features, eps, momentum, pseudo_count, affine, track_running_stats, device, dtype: Same
            as in :class:`RefBatchNorm2d`.

    Raises:
        ValueError: On every process, if the parts of all processes together have one value per
            channel and RefBatchNorm2d would raise an error for such a batch.
    """

    @torch.jit.unused
    def _forward_by_batch(self, x: Tensor) -> Tensor:
        if not self._synchronizes():
            return super()._forward_by_batch(x)
        self._check_channels(x)
        moments = Moments(all_gather())
        moments.add(x)
        if moments.count == 0:
            return self._affine(x)
        dtype = statistics_dtype(x)
        batch = BatchStatistics(
            moments.samples, moments.count, moments.mean.to(dtype), moments.var.to(dtype)
        )
        if self.pseudo_count == 0:
            if batch.count == 1:
                raise ValueError(f"{self!r}: expected more than 1 value per channel, got 1")
        elif not self._is_noted():
            if not self.has_reference:
                self._take_reference(batch)
            self._note_captured()
        reference, affine = (self.ref_mean, self.ref_var), (self.weight, self.bias)
        y, mean, var = mixed_norm(
            x, batch, *reference, *affine, self.pseudo_count, self.eps, dist.all_reduce
        )
        update_running_stats(self, mean, var)
        return y

    def _synchronizes(self) -> bool:
        # During a capture the caller combines the parts. In evaluation the processes may call the
        # layer at different times.
        if self._moments is not None or not self.training:
            return False
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
