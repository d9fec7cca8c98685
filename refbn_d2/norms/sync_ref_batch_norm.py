"""SyncRefBatchNorm2d: RefBN of a batch that is spread over processes."""

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
    """RefBN by the statistics of the whole batch of all processes, SyncRefBN.

    mean_B, var_B and m of eq. 13-16 are those of the batch of the default process group, combined
    exactly, each process weighing as many elements as it has. k processes so do what
    :class:`RefBatchNorm2d` does on one process with the whole batch: outputs, gradients of x, and
    running statistics, to rounding. Gradients of ``weight`` and ``bias`` are of this process's
    part, as always; DistributedDataParallel combines them. With ``pseudo_count=0`` this is the
    synchronized BatchNorm. In evaluation, on one process, or without a process group it is
    :class:`RefBatchNorm2d`.

    Every process communicates once in each forward pass in training (2 C + 2 numbers) and once in
    each backward pass (2 C numbers), an empty part included. So each process must call the layer
    equally often, and must include an empty output in its loss, such as by ``0 * y.sum()``; as
    DistributedDataParallel demands anyway. As in nn.SyncBatchNorm the sizes of the parts are read
    on the host. If no reference is held, the first batch that is not empty on all processes
    becomes the reference, the same on each.

    Args:
        num_features, eps, momentum, pseudo_count, affine, track_running_stats, device, dtype: as in
            :class:`RefBatchNorm2d`.

    Raises:
        ValueError: one value per channel on all processes together, where RefBatchNorm2d would
            refuse it too; on every process.
    """

    @torch.jit.unused
    def _forward_by_reference(self, x: Tensor) -> Tensor:
        if not self._synchronizes():
            return super()._forward_by_reference(x)
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
        # During a capture the parts are combined by who runs it; in evaluation the processes need
        # not be in step.
        if self._moments is not None or not self.training:
            return False
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
