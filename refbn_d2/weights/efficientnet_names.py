"""Converts names of an EfficientNet's weights from the package efficientnet_pytorch to timm's."""

import re
from typing import Dict, Mapping

from torch import Tensor

__all__ = ["timm_names"]

_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(.+)")
# Layers of a block that first expands its channels, and below of a block that does not.
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN = {**_EXPANDED, "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def timm_names(weights: Mapping[str, Tensor]) -> Dict[str, str]:
    """Maps the names in a file to timm's; names that are not efficientnet_pytorch's are kept.

    efficientnet_pytorch numbers all blocks consecutively. timm numbers the stages, and the blocks
    within each stage. A stage begins where the number of output channels of the blocks changes.
    """
    if "_conv_stem.weight" not in weights:
        return {name: name for name in weights}
    blocks = {int(m[1]) for m in map(_BLOCK.fullmatch, weights) if m}
    places, channels = {}, None
    stage, position = -1, 0
    for block in sorted(blocks):
        project = weights[f"_blocks.{block}._project_conv.weight"]
        stage, position = (stage, position + 1) if len(project) == channels else (stage + 1, 0)
        channels, places[block] = len(project), f"blocks.{stage}.{position}"
    return {name: _renamed(name, weights, places) for name in weights}


def _renamed(name: str, weights: Mapping[str, Tensor], places: Dict[int, str]) -> str:
    found = _BLOCK.fullmatch(name)
    if found is None:
        layer, _, key = name.partition(".")
        return f"{_OUTSIDE.get(layer, layer)}.{key}"
    block, layer, key = found.groups()
    layers = _EXPANDED if f"_blocks.{block}._expand_conv.weight" in weights else _PLAIN
    return f"{places[int(block)]}.{layers.get(layer, layer)}.{key}"
