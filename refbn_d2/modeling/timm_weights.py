"""Converts timm's names of weights to the names in a detector with a timm backbone."""

from typing import Dict, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from ..weights.efficientnet_names import timm_names
from .timm_backbone import TimmBackbone

__all__ = ["with_detector_names"]

_STATISTICS = ("running_mean", "running_var")


def with_detector_names(model: nn.Module, weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Gives the weights of a network of timm the names that they have in a detector.

    Args:
        model: detector.
        weights: weights of the network that is its backbone, or of a detector.

    Returns:
        The weights of the backbone under their new names; ``weights`` themselves if ``model`` has
        no timm backbone or if they already have the names of a detector.

    Raises:
        UserError: if the weights belong to another network.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, TimmBackbone):
            if any(name.startswith(f"{prefix}.features.") for name in weights):
                return weights
            own = _own_names(module, weights)
            return {f"{prefix}.features.{name}": weights[n] for name, n in own.items()}
    return weights


def _own_names(backbone: TimmBackbone, weights: Mapping[str, Tensor]) -> Dict[str, str]:
    """Maps the names in the backbone to the names in a file."""
    renamed = {new: old for old, new in timm_names(weights).items()}
    expected = {_key(name): name for name in backbone.features.state_dict()}
    # The network may be part of another one: each name then has a prefix such as "backbone.".
    first = next(iter(expected))
    prefix = min((k[: -len(first)] for k in map(_key, renamed) if k.endswith(first)), default="")
    found = {_key(new)[len(prefix) :]: old for new, old in renamed.items()}
    own = {name: found[key] for key, name in expected.items() if key in found}
    state = backbone.features.state_dict()
    # Buffers that this package's norms have in addition to BatchNorm's. timm's files lack them.
    optional = {
        f"{path}.{buffer}"
        for path, module in backbone.features.named_modules()
        if isinstance(module, _BatchNorm)
        for buffer in module._buffers
        if buffer not in _STATISTICS
    }
    for name, value in state.items():
        if name not in own:
            if name not in optional:
                raise UserError(f"are not of {backbone.name} (MODEL.TIMM.NAME): they lack {name}")
        elif weights[own[name]].shape != value.shape:
            there, here = tuple(weights[own[name]].shape), tuple(value.shape)
            raise UserError(
                f"are not of {backbone.name} (MODEL.TIMM.NAME): {own[name]} is of shape {there} in "
                f"the file and {here} in the model"
            )
    return own


def _key(name: str) -> str:
    """Replaces dots by underscores: timm's feature extractors flatten modules, a.b into a_b."""
    return name.replace(".", "_")
