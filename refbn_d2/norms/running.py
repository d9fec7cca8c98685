"""The moving averages of BatchNorm, for norms that average something else than BatchNorm does."""

from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["count_batch", "update_running_stats"]


def count_batch(norm: _NormBase) -> float:
    """Counts one more batch in ``num_batches_tracked``; returns the weight it has in the average.

    ``momentum``, or 1 / num_batches_tracked where that is None (a cumulative average).
    """
    norm.num_batches_tracked.add_(1)
    return 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


def update_running_stats(norm: _NormBase, mean: Tensor, var: Tensor) -> None:
    """Moves the running statistics of ``norm`` towards (C,) ``mean`` and ``var``, without gradient.

    Does nothing in eval mode or without running statistics, as BatchNorm.
    """
    if not norm.training or norm.running_mean is None:
        return
    factor = count_batch(norm)
    for running, value in ((norm.running_mean, mean), (norm.running_var, var)):
        running.lerp_(value.to(running.dtype), factor)
