"""The names of a ResNet's weights: torchvision's, which are timm's, and detectron2's."""

import re
from typing import Dict, Iterable

from ..errors import UserError

__all__ = ["detectron2_names", "torchvision_names"]

# torchvision, detectron2. A stage has another number in each.
_PAIRS = (
    ("conv1.", "stem.conv1."),
    ("bn1.", "stem.conv1.norm."),
    ("layer{stage}.{block}.conv{n}.", "res{stage}.{block}.conv{n}."),
    ("layer{stage}.{block}.bn{n}.", "res{stage}.{block}.conv{n}.norm."),
    ("layer{stage}.{block}.downsample.0.", "res{stage}.{block}.shortcut."),
    ("layer{stage}.{block}.downsample.1.", "res{stage}.{block}.shortcut.norm."),
    ("fc.", "linear."),
)
# A weight that each ResNet has.
_MARK = {"torchvision": "layer1.0.conv1.weight", "detectron2": "res2.0.conv1.weight"}
# Of torchvision's names, what is no head: an unknown one of these makes it another network.
_OF_THE_TRUNK = re.compile(r"(?:stem|layer\d*|conv\d*|bn\d+|norm\d*|downsample)\.")
_IN_A_DETECTOR = re.compile(
    r"(?:module\.)?(?:backbone\.|roi_heads\.)?(?:bottom_up\.)?((?:stem|res[2-5]|linear)\..+)"
)


def _pattern(template: str) -> "re.Pattern[str]":
    escaped = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(re.sub(r"{(\w+)}", r"(?P<\1>\\d+)", escaped) + r"(?P<key>\w+)")


def _rules(source: int, target: int):
    return [(_pattern(pair[source]), pair[target] + "{key}") for pair in _PAIRS]


_RULES = {"detectron2": _rules(0, 1), "torchvision": _rules(1, 0)}


def _renamed(name: str, to: str) -> str:
    """``name`` in the other convention, or '' if no ResNet of torchvision's has such a weight."""
    for pattern, template in _RULES[to]:
        found = pattern.fullmatch(name)
        if found:
            fields = found.groupdict()
            if "stage" in fields:
                step = 1 if to == "detectron2" else -1
                fields["stage"] = str(int(fields["stage"]) + step)
            return template.format(**fields)
    return ""


def detectron2_names(names: Iterable[str]) -> Dict[str, str]:
    """Names in a state dict -> those in a detectron2 backbone file, of what is part of the ResNet.

    Args:
        names: of torchvision's or timm's ResNet, alone or in a network around it (a classifier of
            this package, self-supervised pretraining), or of any detectron2 model with a ResNet.
            Heads are left out.

    Raises:
        UserError: there is no ResNet, or one with layers that torchvision's has not.
    """
    names = list(names)
    if any(n.endswith(_MARK["detectron2"]) for n in names):
        found = ((n, _IN_A_DETECTOR.fullmatch(n)) for n in names)
        # detectron2's own converter from torchvision names the linear layer so.
        return {n: m[1].replace("stem.fc.", "linear.") for n, m in found if m}
    marked = [n for n in names if n.endswith(_MARK["torchvision"])]
    if not marked:
        raise UserError(
            f"no ResNet in it, neither torchvision's or timm's ({_MARK['torchvision']}) nor "
            f"detectron2's ({_MARK['detectron2']})"
        )
    # Of a classifier around the network; or of the first of several networks, as MoCo's encoder_q.
    prefix = marked[0][: -len(_MARK["torchvision"])]
    renamed = {n: _renamed(n[len(prefix) :], "detectron2") for n in names if n.startswith(prefix)}
    for name, new in renamed.items():
        if not new and _OF_THE_TRUNK.match(name[len(prefix) :]):
            raise UserError(f"a ResNet that detectron2 does not build: it has no place for {name}")
    return {old: new for old, new in renamed.items() if new}


def torchvision_names(names: Iterable[str]) -> Dict[str, str]:
    """Names in a detectron2 backbone file -> those of torchvision's ResNet."""
    return {n: _renamed(n, "torchvision") for n in names}
