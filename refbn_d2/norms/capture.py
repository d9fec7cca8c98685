"""Captures the references of all reference norms of a model in one forward pass."""

from contextlib import contextmanager, suppress
from typing import Iterator, List, Optional, Tuple

import torch
from torch import nn

from .moments import Gather, Moments
from .reference_norm import ReferenceNorm2d

__all__ = ["buffers_restored", "capture"]


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Context manager: at its end all buffers of ``model`` are as they were, the same tensors."""
    # A forward pass changes buffers either in place or by replacing the tensor.
    buffers = [
        (m, name, b, b.clone())
        for m in model.modules()
        for name, b in m.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for m, name, buffer, value in buffers:
                # What cannot be written (an expanded tensor, one of inference mode) was not.
                with suppress(RuntimeError):
                    buffer.copy_(value)
                m._buffers[name] = buffer


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
            :meth:`ReferenceNorm2d.check_reference`. Or if another block captures the same layers.

    Example::

        with capture(model):
            model(images)
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, ReferenceNorm2d)]
    if any(layer._moments is not None for _, layer in layers):
        raise ValueError("another capture of the same layers is running: it would lose its values")
    taken: List[Tuple[str, int]] = []
    moments = {layer: Moments(gather) for _, layer in layers}
    for layer, m in moments.items():
        layer._moments = m
    try:
        # Norms without a reference update their statistics in training mode.
        with buffers_restored(model), torch.no_grad():
            yield taken
    finally:
        for layer in moments:
            layer._moments = None
    reached = [(name, layer, moments[layer]) for name, layer in layers if moments[layer].count > 0]
    for _, layer, m in reached:  # check all before setting any, so that an error changes nothing
        layer.check_reference(m.count, m.samples)
    for name, layer, m in reached:
        layer.set_reference(m.mean, m.var, m.count, m.samples)
        taken.append((name, m.count))
