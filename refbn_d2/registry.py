"""Teaches detectron2's get_norm the names of refbn_d2.norms."""

import functools
import types
from typing import Callable, Dict, List, Optional, Union

from detectron2.layers import FrozenBatchNorm2d, batch_norm
from torch import nn
from torchvision.models.convnext import LayerNorm2d

from .errors import UserError
from .norms import (
    BatchRenorm2d,
    InstanceNorm2d,
    RefBatchNorm2d,
    SwitchableNorm2d,
    SyncRefBatchNorm2d,
    VirtualBatchNorm2d,
)
from .norms.convert import CONVERTIBLE

__all__ = ["NORMS", "UnknownNormError", "known_norms", "register"]

# Norm type -> constructor that takes the number of channels.
NORMS: Dict[str, Callable[[int], nn.Module]] = {
    "RefBN": RefBatchNorm2d,
    "SyncRefBN": SyncRefBatchNorm2d,
    "VBN": VirtualBatchNorm2d,
    "BRN": BatchRenorm2d,
    "SN": SwitchableNorm2d,
    "IN": InstanceNorm2d,
    # GN's 32 groups do not divide the channels of a ResNet of a quarter the width; 8 are its match.
    "GN8": functools.partial(nn.GroupNorm, 8),
    # Layer normalization as in the papers: over channels, height and width. (See LN below.)
    "GN1": functools.partial(nn.GroupNorm, 1),
}

# Upstream's, for versions that lack them (0.6). LN is over the channels of each pixel.
_BACKPORTS: Dict[str, Callable[[int], nn.Module]] = {
    "LN": functools.partial(LayerNorm2d, eps=1e-6),
}

# What upstream's get_norm has known in one version or another; it keeps its table to itself.
_UPSTREAM = ("BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


class UnknownNormError(UserError, KeyError):
    """A norm type nobody knows. (Also a KeyError, which is what upstream raises.)"""

    __str__ = Exception.__str__


def register() -> None:
    """Makes ``get_norm(name, channels)`` know ``NORMS``, wherever detectron2 or others use it.

    ``get_norm`` is imported by name all over, and its table is local to it. So the function object
    everybody holds stays the one it is and only its code is exchanged, for code that asks
    :func:`_get_norm` below. It does not matter who imported it when. Calling this again does
    nothing.
    """
    get_norm = batch_norm.get_norm
    if hasattr(get_norm, "refbn_upstream"):
        return
    upstream = types.FunctionType(
        get_norm.__code__,
        get_norm.__globals__,
        get_norm.__name__,
        get_norm.__defaults__,
        get_norm.__closure__,
    )

    def patched(norm, out_channels):
        # Runs with the globals of detectron2.layers.batch_norm, hence the import.
        from refbn_d2.registry import _get_norm

        return _get_norm(norm, out_channels)

    get_norm.__code__ = patched.__code__.replace(co_name=get_norm.__name__)
    get_norm.refbn_upstream = upstream
    CONVERTIBLE["FrozenBN"] = FrozenBatchNorm2d


def _get_norm(norm: Union[str, Callable, None], out_channels: int) -> Optional[nn.Module]:
    """What get_norm does now: our names first, upstream's for everything else."""
    if isinstance(norm, str) and norm in NORMS:
        return NORMS[norm](out_channels)
    try:
        return batch_norm.get_norm.refbn_upstream(norm, out_channels)
    except KeyError:
        if not isinstance(norm, str):
            raise
        if norm in _BACKPORTS:
            return _BACKPORTS[norm](out_channels)
        raise UnknownNormError(
            f"unknown norm {norm!r}: known are {', '.join(known_norms())} and '' for none"
        ) from None


def known_norms() -> List[str]:
    """All norm types that get_norm knows, upstream's first."""
    known = []
    for name in _UPSTREAM:
        try:
            batch_norm.get_norm.refbn_upstream(name, 32)
        except KeyError:  # not in this version
            if name not in _BACKPORTS:
                continue
        known.append(name)
    return known + list(NORMS)
