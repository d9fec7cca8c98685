"""Converts names of a ResNet's weights between detectron2 and torchvision (also timm)."""

import re
from typing import Dict, Iterable

from ..errors import UserError

__all__ = ["detectron2_names", "torchvision_names"]

# Names in torchvision and in detectron2, whose number of a stage is larger by 1.
_PAIRS = (
    ("conv1.", "stem.conv1."),
    ("bn1.", "stem.conv1.norm."),
    ("layer{stage}.{block}.conv{n}.", "res{stage}.{block}.conv{n}."),
    ("layer{stage}.{block}.bn{n}.", "res{stage}.{block}.conv{n}.norm."),
    ("layer{stage}.{block}.downsample.0.", "res{stage}.{block}.shortcut."),
    ("layer{stage}.{block}.downsample.1.", "res{stage}.{block}.shortcut.norm."),
    ("fc.", "linear."),
)
# Name of a weight that every ResNet has.
_MARK = {"torchvision": "layer1.0.conv1.weight", "detectron2": "res2.0.conv1.weight"}
# Names outside a head. If one of them is not in _PAIRS, the network is not torchvision's ResNet.
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
    """Converts a name to the convention ``to``; '' if torchvision's ResNet has no such weight."""
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
    """Maps the names of a ResNet's weights in a state dict to those in a detectron2 backbone file.

    Args:
        names: names of a ResNet of torchvision or timm, alone or inside another network (a
            classifier of this package, self-supervised pretraining), or of any detectron2 model
            with a ResNet. Heads are left out.

    Raises:
        UserError: if there is no ResNet, or if it has layers that torchvision's ResNet lacks.
    """
    names = list(names)
    if any(n.endswith(_MARK["detectron2"]) for n in names):
        found = ((n, _IN_A_DETECTOR.fullmatch(n)) for n in names)
        # detectron2's own converter from torchvision names the linear layer "stem.fc".
        return {n: m[1].replace("stem.fc.", "linear.") for n, m in found if m}
    marked = [n for n in names if n.endswith(_MARK["torchvision"])]
    if not marked:
        raise UserError(
            f"no ResNet in it, neither torchvision's or timm's ({_MARK['torchvision']}) nor "
            f"detectron2's ({_MARK['detectron2']})"
        )
    # Prefix of a network around the ResNet, or of the first of several, such as MoCo's encoder_q.
    prefix = marked[0][: -len(_MARK["torchvision"])]
    renamed = {n: _renamed(n[len(prefix) :], "detectron2") for n in names if n.startswith(prefix)}
    for name, new in renamed.items():
        if not new and _OF_THE_TRUNK.match(name[len(prefix) :]):
            raise UserError(f"a ResNet that detectron2 does not build: it has no place for {name}")
    return {old: new for old, new in renamed.items() if new}


def torchvision_names(names: Iterable[str]) -> Dict[str, str]:
    """Maps the names in a detectron2 backbone file to those of torchvision's ResNet."""
    return {n: _renamed(n, "torchvision") for n in names}
