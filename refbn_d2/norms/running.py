"""Updates of BatchNorm's running statistics, for norms that average other values than BatchNorm."""

from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["count_batch", "update_running_stats"]


def count_batch(norm: _NormBase) -> float:
    """Increments ``num_batches_tracked`` and returns the weight of this batch in the average.

    The weight is ``momentum``, or 1 / num_batches_tracked if ``momentum`` is None (a cumulative
    average).
    """
    norm.num_batches_tracked.add_(1)
    return 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


def update_running_stats(norm: _NormBase, mean: Tensor, var: Tensor) -> None:
    """Updates the running statistics of ``norm`` with the statistics of one batch.

    Like BatchNorm, this does nothing in eval mode or if the norm tracks no running statistics, also
    if that was switched off later, so that they stay as they are.

    Args:
        norm: Layer whose ``running_mean`` and ``running_var`` are updated in place.
        mean, var: Tensors of shape (C,) without gradient.
    """
    if not norm.training or not norm.track_running_stats or norm.running_mean is None:
        return
    factor = count_batch(norm)
    for running, value in ((norm.running_mean, mean), (norm.running_var, var)):
        running.lerp_(value.to(running.dtype), factor)
