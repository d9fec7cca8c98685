"""Taking the reference of every reference norm of a model in one forward pass."""

from contextlib import contextmanager
from typing import Iterator, List, Optional, Tuple

import torch
from torch import nn

from .moments import Gather, Moments
from .reference_norm import ReferenceNorm2d

__all__ = ["capture"]


@contextmanager
def capture(model: nn.Module, gather: Optional[Gather] = None) -> Iterator[List[Tuple[str, int]]]:
    """Within the block, each forward pass of ``model`` feeds the references of its layers.

    The model runs without gradients, each module in the mode it is in: what you hold in evaluation,
    such as a frozen BatchNorm, evaluates. Reference layers, in whatever mode, normalize by the
    reference they are taking, so that deeper layers see normalized input (eq. 11-12). Running
    statistics and other buffers are as before when the block ends. If the block raises, or a layer
    saw too little to take a reference from, so are the references.

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
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, ReferenceNorm2d)]
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
        with torch.no_grad():
            yield taken
    finally:
        for layer in moments:
            layer._moments = None
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
