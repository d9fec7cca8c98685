"""Helpers for torch.fx tracing and for activation checkpointing."""

from typing import Any, cast

import torch
from torch import fx, nn

__all__ = ["as_leaf", "in_backward"]


def as_leaf(module: nn.Module, x: object) -> Any:
    """Records ``module`` as one node of the graph that :mod:`torch.fx` is tracing.

    fx treats the layers of ``torch.nn`` as leaves, but traces into the forward pass of every other
    module, which must then not branch on values. A layer that calls this function first in its
    ``forward`` is a leaf for every tracer: ``torch.fx.symbolic_trace`` as well as torchvision's
    feature extractor.

    Returns:
        The traced output, a :class:`torch.fx.Proxy` that stands for a tensor, or None if x is not a
        proxy, i.e. no tracing is in progress.
    """
    if not isinstance(x, fx.Proxy):
        return None
    path = cast(fx.Tracer, x.tracer).path_of_module(module)
    return x.tracer.create_proxy("call_module", path, (x,), {})


def in_backward() -> bool:
    """Whether a backward pass is running.

    A forward pass within it is one that activation checkpointing repeats.
    """
    # This function is private, but torch.utils.checkpoint uses it for the same purpose.
    return torch._C._current_graph_task_id() != -1
