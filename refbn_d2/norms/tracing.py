"""How norms behave in symbolic traces and in recomputed forward passes."""

from typing import Optional

import torch
from torch import fx, nn

__all__ = ["as_leaf", "in_backward"]


def as_leaf(module: nn.Module, x: object) -> Optional[fx.Proxy]:
    """A call of ``module`` in the graph that :mod:`torch.fx` traces; None if it traces none.

    fx treats the layers of ``torch.nn`` as leaves, and looks into everybody else's forward passes,
    which must then not branch on values. Called first in ``forward``, this makes a leaf of a layer
    for every tracer: ``torch.fx.symbolic_trace``, and the one of torchvision's feature extractor.
    """
    if not isinstance(x, fx.Proxy):
        return None
    path = x.tracer.path_of_module(module)
    return x.tracer.create_proxy("call_module", path, (x,), {})


def in_backward() -> bool:
    """Whether a backward pass is running: a forward pass is then recomputed by checkpointing."""
    # Private, but what torch.utils.checkpoint goes by, too.
    return torch._C._current_graph_task_id() != -1
