"""Captures the references of all reference norms of a model in one forward pass."""

from contextlib import contextmanager
from typing import Iterator, List, Optional, Tuple

import torch
from torch import nn

from .moments import Gather, Moments
from .reference_norm import ReferenceNorm2d

__all__ = ["capture"]


@contextmanager
def capture(model: nn.Module, gather: Optional[Gather] = None) -> Iterator[List[Tuple[str, int]]]:
    """Context manager: forward passes of ``model`` within the block set the references.

    The model runs without gradients. Each module keeps its mode, so that modules which the caller
    has put in evaluation mode, such as a frozen BatchNorm, evaluate. Reference norms, in either
    mode, normalize by the reference that they are capturing, so that deeper layers see normalized
    input (eq. 11-12). At the end of the block, running statistics and all other buffers are
    restored. References are restored too if the block raises an exception, or if a layer saw too
    few values to take a reference from.

    Args:
        model: Module with layers derived from :class:`~refbn_d2.norms.ReferenceNorm2d`.
        gather: Function that exchanges statistics between processes; see :class:`Moments`.

    Yields:
        An empty list. At the end of the block it is filled with (name, number of elements per
        channel) of each layer that took a reference, in module order. A layer that no forward pass
        reached is absent and keeps its reference.

    Raises:
        ValueError: If a layer saw only one value per channel; see
            :meth:`ReferenceNorm2d.check_reference`.

    Example::

        with capture(model):
            model(images)
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, ReferenceNorm2d)]
    # A forward pass in training mode also updates the statistics of norms without a reference,
    # either in place or by replacing the tensor.
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
    for _, layer, m in reached:  # check all before setting any, so that an error changes nothing
        layer.check_reference(m.count, m.samples)
    for name, layer, m in reached:
        layer.set_reference(m.mean, m.var, m.count, m.samples)
        taken.append((name, m.count))
