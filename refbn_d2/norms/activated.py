"""Norms that also apply a drop layer and an activation, as timm's BatchNormAct2d does."""

import sys
from functools import lru_cache
from typing import Optional

from torch import Tensor, nn

from .tracing import as_leaf

__all__ = ["ActivatedNorm", "activated_source", "with_activation"]


class ActivatedNorm(nn.Module):
    """Base of the classes that :func:`with_activation` makes: ``act(drop(norm(x)))``.

    Attributes:
        norm_kind: the norm class without the activation.
        drop, act: modules, as in timm's BatchNormAct2d.
    """

    norm_kind: type

    def forward(self, x: Tensor) -> Tensor:
        """As the norm's, then ``drop`` and ``act``."""
        leaf = as_leaf(self, x)  # here, so that the leaf is the norm with its activation
        if leaf is not None:
            return leaf
        return self.act(self.drop(super().forward(x)))

    def __reduce__(self):
        # The class is made at run time, so pickle cannot find it by its name.
        return _new, (self.norm_kind,), self.__getstate__()

    def __getstate__(self):
        parent = getattr(super(), "__getstate__", None)  # object has it from Python 3.11 on
        return self.__dict__.copy() if parent is None else parent()


@lru_cache(maxsize=None)
def with_activation(kind: type) -> type:
    """The class of norms of class ``kind`` that are followed by ``drop`` and ``act``.

    Its layers are made like those of ``kind``; then the attributes ``drop`` and ``act`` are set.
    """
    return type(f"{kind.__name__}Act", (ActivatedNorm, kind), {"norm_kind": kind})


def _new(kind: type) -> nn.Module:
    activated = with_activation(kind)
    return activated.__new__(activated)


def activated_source(kind: type) -> Optional[type]:
    """The norm class inside an activated one: ours or one of timm's; None for every other class."""
    if issubclass(kind, ActivatedNorm):
        return kind.norm_kind
    # timm is optional. A layer of timm's can only be here if timm has been imported.
    layers = sys.modules.get("timm.layers")
    if layers is None:
        return None
    return {
        layers.BatchNormAct2d: nn.BatchNorm2d,
        layers.SyncBatchNormAct: nn.SyncBatchNorm,
        layers.FrozenBatchNormAct2d: layers.FrozenBatchNormAct2d,
    }.get(kind)
