"""Taking the reference of every reference norm of a model in one forward pass."""

from contextlib import contextmanager
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .functional import batch_moments

__all__ = ["Moments", "capture"]

Gather = Callable[[Tensor], Sequence[Tensor]]


class Moments:
    """Size, mean and biased variance per channel of everything added so far, in float64.

    Parts are combined exactly, each weighing as many elements as it has (Chan, Golub and LeVeque
    1979), so how the reference batch was split over calls or processes does not matter.

    Args:
        gather: maps a 1-D float64 tensor of this process to those of all processes that share the
            reference batch, in rank order. Every process must then add equally often, empty
            inputs included. None for a single process.

    Attributes:
        count: elements per channel.
        samples: sum of the first dimensions of what was added, but for empty inputs.
        mean, var: (C,), or None while count is 0.
    """

    def __init__(self, gather: Optional[Gather] = None):
        self._gather = gather
        self.count = 0
        self.samples = 0
        self.mean: Optional[Tensor] = None
        self.var: Optional[Tensor] = None

    def add(self, x: Tensor) -> None:
        """Adds the elements of x, (N, C, H, W), which may be empty."""
        count, num_channels = x.numel() // x.shape[1], x.shape[1]
        part = x.new_zeros(2 + 2 * num_channels, dtype=torch.float64)
        if count > 0:
            part[0], part[1] = count, x.shape[0]
            part[2:] = torch.cat(batch_moments(x.detach()))
        parts = [part] if self._gather is None else self._gather(part)
        sizes = torch.stack([p[:2] for p in parts]).tolist()  # waits for the device, once
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


@contextmanager
def capture(model: nn.Module, gather: Optional[Gather] = None) -> Iterator[List[Tuple[str, int]]]:
    """Within the block, each forward pass of ``model`` feeds the references of its layers.

    The model runs in training mode without gradients. Each layer normalizes by the reference it is
    taking, so that deeper layers see normalized input (eq. 11-12). Everything else about the model
    is as before when the block ends: training flags, running statistics, other buffers. If the
    block raises, or a layer saw too little to take a reference from, so are the references.

    Args:
        model: a module with layers derived from :class:`~refbn_d2.norms.ReferenceNorm2d`.
        gather: see :class:`Moments`.

    Yields:
        An empty list. When the block has ended it holds (name, elements per channel) of each layer
        that took a reference, in module order; a layer that the block did not reach is absent and
        keeps what it had.

    Example::

        with capture(model):
            model(images)
    """
    from .ref_batch_norm import ReferenceNorm2d  # the layer's module imports Moments from here

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, ReferenceNorm2d)]
    training = {m: m.training for m in model.modules()}
    # A pass in training mode also moves the statistics of norms that take no reference, in place
    # or by putting another tensor there.
    buffers = [
        (m, name, b, b.clone())
        for m in model.modules()
        for name, b in m.named_buffers(recurse=False)
    ]
    taken: List[Tuple[str, int]] = []
    moments = {layer: Moments(gather) for _, layer in layers}
    for layer, m in moments.items():
        layer._moments = m
    try:
        model.train()
        with torch.no_grad():
            yield taken
    finally:
        for layer in moments:
            layer._moments = None
        for m, mode in training.items():
            m.training = mode
        with torch.no_grad():
            for m, name, buffer, value in buffers:
                buffer.copy_(value)
                m._buffers[name] = buffer
    reached = [(name, layer, moments[layer]) for name, layer in layers if moments[layer].count > 0]
    for _, layer, m in reached:  # all before any is set: an error leaves every reference as it was
        layer.check_reference(m.count, m.samples)
    for name, layer, m in reached:
        layer.set_reference(m.mean, m.var, m.count, m.samples)
        taken.append((name, m.count))
