"""Exchanging the BatchNorm layers of a network that was built elsewhere."""

from detectron2.layers import get_norm
from torch import nn

from ..norms import convert_norm
from ..norms.activated import with_activation
from ..norms.convert import recognized
from ..norms.table import NORM_TYPES

__all__ = ["exchange_norms"]


def exchange_norms(network: nn.Module, norm: str) -> None:
    """Exchanges each BatchNorm2d of a network for another norm; activations inside them stay.

    A norm with BatchNorm's parameters and statistics takes those over, with eps and momentum, which
    are not the default in every network. Others start as ``get_norm`` makes them.

    Args:
        network: changed in place.
        norm: what ``get_norm`` knows, or "" to take the norms out.

    Raises:
        ValueError: the network has no BatchNorm2d, or a subclass with behaviour of its own.
    """
    layers = {m: recognized(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    if norm and not layers:
        raise ValueError("it has no BatchNorm")
    for layer, found in layers.items():
        if found is None:
            raise ValueError(f"its {type(layer).__name__} cannot be exchanged")
    if norm in NORM_TYPES and NORM_TYPES[norm].convertible:
        convert_norm(network, norm)
        return
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if child in layers:
                setattr(parent, name, _made(norm, child, layers[child].activated))


def _made(norm: str, old: nn.Module, activated: bool) -> nn.Module:
    new = get_norm(norm, old.num_features) or nn.Identity()
    if activated:
        new.__class__ = with_activation(type(new))
        new.drop, new.act = old.drop, old.act
    return new
