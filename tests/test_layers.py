"""A module of the package imports from lower layers only, and there are no circular imports."""

import ast
from pathlib import Path
from typing import Dict, Iterator, Set

import pytest

PACKAGE = Path(__file__).parents[1] / "refbn_d2"

# From the ground floor up. A part imports only from layers below its own, or from itself.
LAYERS = [
    ["errors", "log"],
    ["config_files", "extras"],
    ["io"],
    ["evaluation", "norms", "rng"],
    ["upstream"],
    ["config_ranges", "registry"],
    ["config"],
    ["statistics", "weights"],
    ["data", "modeling"],
    ["evaluation.coco_evaluator"],  # the one module of evaluation that needs detectron2
    ["engine"],
    ["hooks"],  # what a trainer of one's own takes from the engine
    ["classification"],
    ["benchmarks", "experiments"],
    ["commands"],
    ["__main__"],
]
LEVEL = {part: n for n, parts in enumerate(LAYERS) for part in parts}


def _modules() -> Dict[str, Path]:
    """All modules but the package itself, by their name below refbn_d2."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = _modules()


def _imports(name: str) -> Iterator[str]:
    """The modules of this package that a module imports, anywhere in it."""
    path = MODULES[name]
    package = ["refbn_d2", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [(a.name, "") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            targets = [(base, a.name) for a in node.names]
        else:
            continue
        for base, member in targets:
            if base.split(".")[0] != "refbn_d2":
                continue
            base = base[len("refbn_d2.") :]
            inner = f"{base}.{member}".lstrip(".")
            if inner in MODULES:
                yield inner
            elif base in MODULES:
                yield base


GRAPH: Dict[str, Set[str]] = {name: set(_imports(name)) - {name} for name in MODULES}


def _part(module: str) -> str:
    return module if module in LEVEL else module.split(".")[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    part = _part(name)
    assert part in LEVEL, f"{part} is in no layer of tests/test_layers.py"
    for other in GRAPH[name]:
        target = _part(other)
        assert target == part or LEVEL[target] < LEVEL[part], f"{name} imports {other}"


def test_there_are_no_circles():
    done: Set[str] = set()

    def visit(name: str, path: tuple) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                # A package and its own modules are one: __init__ collects what they have.
                if not name.startswith(other + "."):
                    visit(other, (*path, name))
            done.add(name)

    for name in sorted(GRAPH):
        visit(name, ())
