"""Reading YAML as data: no code in it runs, and its size is what it looks like."""

import math
import os
from typing import Any, Dict

import yaml

from ..errors import UserError

__all__ = ["read"]

_MAX_CHARACTERS = 1_000_000
# With every alias in place of what it stands for; nested ones grow exponentially.
_MAX_VALUES = 100_000


def read(path: str) -> Any:
    """The content of a YAML file: dicts, lists, text, numbers, booleans, dates and None.

    Raises:
        UserError: the file is missing, not plain YAML (tags of Python objects included), or larger
            than anybody would write.
    """
    try:
        # A device or a pipe might have no end.
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file")
        with open(path, encoding="utf-8") as f:
            text = f.read(_MAX_CHARACTERS + 1)
        if len(text) > _MAX_CHARACTERS:
            raise UserError(f"{path}: is no config, it has more than {_MAX_CHARACTERS} characters")
        if _expanded_size(yaml.compose(text, yaml.SafeLoader), {}) > _MAX_VALUES:
            raise UserError(f"{path}: is no config, its aliases expand beyond {_MAX_VALUES} values")
        return yaml.safe_load(text)
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
    """Number of values below a YAML node; infinite if it contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]
