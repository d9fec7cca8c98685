"""Mean and variance of a batch that is split over several calls or processes."""

from typing import Callable, Optional, Sequence

import torch
from torch import Tensor

from .functional import batch_moments

__all__ = ["Gather", "Moments"]

Gather = Callable[[Tensor], Sequence[Tensor]]


class Moments:
    """Element count, mean and biased variance per channel of all inputs so far, in float64.

    Parts are combined exactly, weighted by their numbers of elements (Chan, Golub and LeVeque
    1979). The result does not depend on how the batch was split over calls or processes.

    Args:
        gather: Function that takes a 1-D float64 tensor of this process and returns the tensors of
            all processes that share the batch, in rank order. Every process must then call
            :meth:`add` equally often, also with empty inputs. None for a single process.

    Attributes:
        count: Number of elements per channel.
        samples: Sum of the first dimensions of all non-empty inputs.
        mean, var: Tensors of shape (C,), or None while ``count`` is 0.
    """

    def __init__(self, gather: Optional[Gather] = None):
        self._gather = gather
        self.count = 0
        self.samples = 0
        self.mean: Optional[Tensor] = None
        self.var: Optional[Tensor] = None

    def add(self, x: Tensor) -> None:
        """Adds the elements of x, of shape (N, C, H, W). x may be empty."""
        count, num_channels = x.numel() // x.shape[1], x.shape[1]
        part = x.new_zeros(2 + 2 * num_channels, dtype=torch.float64)
        if count > 0:
            part[0], part[1] = count, x.shape[0]
            part[2:] = torch.cat(batch_moments(x.detach()))
        parts = [part] if self._gather is None else self._gather(part)
        sizes = torch.stack([p[:2] for p in parts]).tolist()  # the only device sync
        for (other_count, samples), other in zip(sizes, parts):
            self.samples += int(samples)
            self._merge(int(other_count), *other[2:].split(num_channels))

    def _merge(self, count: int, mean: Tensor, var: Tensor) -> None:
        if count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.var = count, mean, var
            return
        total = self.count + count
        share, delta = count / total, mean - self.mean
        self.mean = self.mean + delta * share
        self.var = self.var * (1 - share) + var * share + delta.square() * (share * (1 - share))
        self.count = total
