"""What a norm has to remember because activation checkpointing repeats forward passes."""

from collections import deque
from typing import Deque, Tuple

import torch
from torch import Tensor

__all__ = ["RecentPasses"]

_MAX_PASSES = 32


class RecentPasses:
    """Values of a layer's last forward passes, which activation checkpointing may repeat.

    The backward pass repeats them after the moving averages of the layer have been updated, so that
    what depends on these averages would come out differently. A pass is recognized by the
    statistics of its batch. The last 32 passes before the backward pass are remembered. A copy of
    this object, for example by pickle, is empty.
    """

    def __init__(self):
        self._passes: Deque[Tuple[Tensor, ...]] = deque(maxlen=_MAX_PASSES)
        self._repeated = False

    def remember(self, key: Tensor, *values: Tensor) -> None:
        """Remembers the values of a first pass over the batch with the statistics ``key``."""
        if self._repeated:  # a new step has begun: earlier passes will not be repeated
            self._passes.clear()
            self._repeated = False
        self._passes.append((key, *values))

    def recall(self, key: Tensor, *values: Tensor) -> Tuple[Tensor, ...]:
        """Returns the values of the first pass over that batch, or ``values`` if there was none."""
        self._repeated = True
        for old_key, *old_values in self._passes:
            if type(old_key) is not type(key) or old_key.device != key.device:
                continue  # a pass on the meta device, with fake tensors or of another replica
            # Compared on the device, because reading the result would wait for it.
            same = (old_key == key).all()
            values = tuple(torch.where(same, old, v) for old, v in zip(old_values, values))
        return values

    def __reduce__(self):
        return RecentPasses, ()
