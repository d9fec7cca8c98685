"""timm's names of weights, in a detector whose backbone is timm's."""

from typing import Dict, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from ..weights.efficientnet_names import timm_names
from .timm_backbone import TimmBackbone

__all__ = ["with_detector_names"]

_STATISTICS = ("running_mean", "running_var")


def with_detector_names(model: nn.Module, weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Weights of a network of timm under the names that they have in a detector.

    Args:
        model: the detector.
        weights: of the network that its backbone is made of, or of anything else.

    Returns:
        The backbone's part of ``weights``, or ``weights`` themselves if ``model`` has no backbone
        of timm's or they are a detector's.

    Raises:
        UserError: they are another network's.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, TimmBackbone):
            if any(name.startswith(f"{prefix}.features.") for name in weights):
                return weights
            own = _own_names(module, weights)
            return {f"{prefix}.features.{name}": weights[n] for name, n in own.items()}
    return weights


def _own_names(backbone: TimmBackbone, weights: Mapping[str, Tensor]) -> Dict[str, str]:
    """Names in the backbone -> those in a file."""
    renamed = {new: old for old, new in timm_names(weights).items()}
    expected = {_key(name): name for name in backbone.features.state_dict()}
    # The network may be part of another one: "module." before each name, "backbone.".
    first = next(iter(expected))
    prefix = min((k[: -len(first)] for k in map(_key, renamed) if k.endswith(first)), default="")
    found = {_key(new)[len(prefix) :]: old for new, old in renamed.items()}
    own = {name: found[key] for key, name in expected.items() if key in found}
    state = backbone.features.state_dict()
    # What the norms of this package hold beyond BatchNorm's weights is in no file of timm's.
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
                raise UserError(f"are not of {backbone.name} (MODEL.TIMM.NAME): it has {name}")
        elif weights[own[name]].shape != value.shape:
            there, here = tuple(weights[own[name]].shape), tuple(value.shape)
            raise UserError(
                f"are not of {backbone.name} (MODEL.TIMM.NAME): {own[name]} is of shape {there} in "
                f"the file and {here} in the model"
            )
    return own


def _key(name: str) -> str:
    """A name without the dots: timm's feature extractors flatten modules, a.b into a_b."""
    return name.replace(".", "_")
