"""Norms that also apply a drop layer and an activation, as timm's BatchNormAct2d does."""

import sys
from functools import lru_cache
from types import FunctionType
from typing import Callable, Optional, Type

import torch
from torch import Tensor, nn

from .tracing import as_leaf

__all__ = ["ActivatedNorm", "activated_source", "with_activation"]


class ActivatedNorm(nn.Module):
    """Base of the classes that :func:`with_activation` makes: ``act(drop(norm(x)))``.

    Attributes:
        norm_kind: Norm class without the activation.
        normalized: Its forward pass. (TorchScript cannot call super().forward.)
        drop, act: Modules that are applied after the norm, as in timm's BatchNormAct2d.
    """

    norm_kind: Type[nn.Module]
    normalized: Callable

    def forward(self, x: Tensor) -> Tensor:
        """Applies the norm, then ``drop``, then ``act``."""
        if not torch.jit.is_scripting():
            leaf = as_leaf(self, x)  # the leaf must include the activation, not only the norm
            if leaf is not None:
                return leaf
        return self.act(self.drop(self.normalized(x)))

    def __reduce__(self):
        # The class is made at run time, so pickle cannot find it by its name.
        return _new, (self.norm_kind,), self.__getstate__()

    def __getstate__(self):
        parent = getattr(super(), "__getstate__", None)  # object defines it since Python 3.11
        return self.__dict__.copy() if parent is None else parent()


@lru_cache(maxsize=None)
def with_activation(kind: Type[nn.Module]) -> Type[nn.Module]:
    """Returns the subclass of ``kind`` that applies ``drop`` and ``act`` after the norm.

    Its constructor is that of ``kind``. The caller then sets the attributes ``drop`` and ``act``.
    """
    forward = kind.forward
    # Under a name of its own, because TorchScript takes the name of a method from its function.
    normalized = FunctionType(
        forward.__code__, forward.__globals__, "normalized", closure=forward.__closure__
    )
    attributes = {"norm_kind": kind, "normalized": normalized}
    return type(f"{kind.__name__}Act", (ActivatedNorm, kind), attributes)


def _new(kind: Type[nn.Module]) -> nn.Module:
    activated = with_activation(kind)
    return activated.__new__(activated)


def activated_source(kind: type) -> Optional[type]:
    """Returns the norm class of a norm with activation, ours or timm's; None for other classes."""
    if issubclass(kind, ActivatedNorm):
        return kind.norm_kind
    # timm is optional. If it has not been imported, ``kind`` cannot be one of its classes.
    layers = sys.modules.get("timm.layers")
    if layers is None:
        return None
    return {
        layers.BatchNormAct2d: nn.BatchNorm2d,
        layers.SyncBatchNormAct: nn.SyncBatchNorm,
        layers.FrozenBatchNormAct2d: layers.FrozenBatchNormAct2d,
    }.get(kind)
