"""Replaces the BatchNorm layers of a network that another library has built."""

from typing import Dict

from detectron2.layers import get_norm
from torch import nn

from ..norms import convert_norm
from ..norms.activated import with_activation
from ..norms.convert import NormLayer, recognized
from ..norms.table import NORM_TYPES

__all__ = ["exchange_norms"]


def exchange_norms(network: nn.Module, norm: str) -> None:
    """Replaces each BatchNorm2d of a network by another norm; activations inside them are kept.

    If the new norm has BatchNorm's parameters and statistics, they are copied, and so are eps and
    momentum, which some networks set to other values than the default. Other norms are initialized
    by ``get_norm``.

    Args:
        network: network to change in place.
        norm: name that ``get_norm`` knows, or "" to remove the norms.

    Raises:
        ValueError: if the network has no BatchNorm2d, or a subclass of it with other behaviour.
    """
    layers: Dict[nn.Module, NormLayer] = {}
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            found = recognized(module)
            if found is None:
                raise ValueError(f"its {type(module).__name__} cannot be exchanged")
            layers[module] = found
    if norm and not layers:
        raise ValueError("it has no BatchNorm")
    if norm in NORM_TYPES and NORM_TYPES[norm].convertible:
        convert_norm(network, norm)
        return
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if child in layers:
                setattr(parent, name, _made(norm, child, layers[child].activated))


def _made(norm: str, old: nn.Module, activated: bool) -> nn.Module:
    new: nn.Module = get_norm(norm, old.num_features) or nn.Identity()
    if activated:
        kind: type = type(new)
        new.__class__ = with_activation(kind)
        new.drop, new.act = old.drop, old.act
    return new
