"""Safe reading of YAML: it cannot run code, and its expanded size is limited."""

import math
import os
import re
from typing import Any, Dict, List, cast

import yaml

from ..errors import UserError

__all__ = ["read"]

_MAX_CHARACTERS = 1_000_000
# Number of values after the expansion of aliases. Nested aliases grow exponentially.
_MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1:30 as text, as YAML 1.2 does, and not as a base-60 number.

    PyYAML needs quadratic time for base-60 numbers.
    """


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(0b[01_]+|0x[\da-fA-F_]+|0[0-7_]+|0|[1-9][\d_]*)\Z"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"([-+]?\d[\d_]*\.[\d_]*(e[-+]\d+)?|\.\d[\d_]*(e[-+]\d+)?|[-+]?\.inf|\.nan)\Z",
        re.IGNORECASE,
    ),
    list("-+0123456789."),
)


def _construct_number(loader: _Loader, node: yaml.Node) -> Any:
    if ":" in loader.construct_scalar(cast(yaml.ScalarNode, node)):  # refuses other nodes
        raise yaml.constructor.ConstructorError(
            None, None, f"{node.value[:20]} is not a number", node.start_mark
        )
    return yaml.SafeLoader.yaml_constructors[node.tag](loader, node)


for _tag in _NUMBERS:
    _Loader.add_constructor(_tag, _construct_number)


# Anchor sizes in detectron2's own RetinaNet configs, which are Python expressions to evaluate.
_ANCHOR_SIZES = re.compile(r"\[\s*\[(?P<terms>[^]]+)\]\s*for x in\s*\[(?P<sizes>[\d\s,.]+)\]\s*\]")
_TERM = re.compile(r"x(?:\s*\*\s*2\s*\*\*\s*\(\s*(\d+(?:\.\d+)?)\s*/\s*([1-9]\d*(?:\.\d+)?)\s*\))?")


def _construct_anchor_sizes(loader: _Loader, node: yaml.Node) -> List[List[float]]:
    """Computes [[x, x * 2**(1.0/3), ...] for x in [32, ...]] by parsing its numbers.

    Other code is an error.
    """
    text = node.value[0].value if isinstance(node.value, list) and len(node.value) == 1 else ""
    found = _ANCHOR_SIZES.fullmatch(text.strip()) if isinstance(text, str) else None
    parts = found["terms"].split(",") if found else []
    terms = [t for t in (_TERM.fullmatch(part.strip()) for part in parts) if t]
    if not found or len(terms) < len(parts):
        raise yaml.constructor.ConstructorError(
            None, None, "a value is code to evaluate; write what it evaluates to", node.start_mark
        )
    sizes = [float(x) if "." in x else int(x) for x in found["sizes"].replace(",", " ").split()]
    exponents = [float(t[1]) / float(t[2]) if t[1] else None for t in terms]
    return [[x if e is None else x * 2**e for e in exponents] for x in sizes]


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _construct_anchor_sizes)


def read(path: str) -> Any:
    """Reads a YAML file into dicts, lists, strings, numbers, booleans, dates and None.

    Args:
        path: Path of the file.

    Raises:
        UserError: If the file is missing, is not plain YAML (tags of Python objects are an error),
            or exceeds the size limits of a config.
    """
    try:
        # Excludes devices and pipes, which may never end.
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file")
        with open(path, encoding="utf-8") as f:
            text = f.read(_MAX_CHARACTERS + 1)
        if len(text) > _MAX_CHARACTERS:
            raise UserError(
                f"{path}: is not a config, it has more than {_MAX_CHARACTERS} characters"
            )
        loader = _Loader(text)
        node = loader.get_single_node()
        if _expanded_size(node, {}) > _MAX_VALUES:
            raise UserError(
                f"{path}: is not a config, its aliases expand beyond {_MAX_VALUES} values"
            )
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(e, "problem", None) or getattr(e, "reason", None) or e
        raise UserError(f"{path}{line}: not plain YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{path}: not plain YAML: nested too deeply") from None
    except (OSError, ValueError, OverflowError, AttributeError, KeyError) as e:  # PyYAML's numbers
        raise UserError(f"{path}: not plain YAML: {e}") from None


def _expanded_size(node: Any, sizes: Dict[int, float]) -> float:
    """Number of values in a YAML node after alias expansion; infinite if it contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]
