"""The command ``refbn-d2``, also ``python -m refbn_d2``: starts refbn_d2/commands/NAME.py."""

import ast
import importlib
import pkgutil
import sys
from importlib.util import find_spec
from typing import List

from . import __version__, commands
from .errors import UserError, one_line_errors
from .extras import needs_extra

__all__ = ["command_names", "main", "run_command"]


def command_names() -> List[str]:
    """Names of all commands: each module in refbn_d2/commands is one, with - for _ in its name."""
    return [module.name.replace("_", "-") for module in pkgutil.iter_modules(commands.__path__)]


@one_line_errors
def run_command(name: str) -> None:
    """Runs a command on the arguments in ``sys.argv[1:]``. Only its own module is imported.

    Raises:
        SystemExit: a user's mistake (1, after one line), bad usage (2), and what the command
            itself ends with.
    """
    with needs_extra():
        importlib.import_module(_module(name)).main()


@one_line_errors
def main() -> None:
    """Entry point of ``refbn-d2``."""
    arguments = sys.argv[1:]
    if arguments in ([], ["-h"], ["--help"]):
        print(_usage())
        return
    if arguments == ["--version"]:
        print(f"refbn_d2 {__version__}")
        return
    name, *rest = arguments
    if name not in command_names():
        raise UserError(f"refbn-d2 has no command {name!r}; it has {', '.join(command_names())}")
    # argparse and detectron2 print this as the name of the program.
    sys.argv = [f"refbn-d2 {name}", *rest]
    run_command(name)


def _module(name: str) -> str:
    return f"{commands.__name__}.{name.replace('-', '_')}"


def _summary(name: str) -> str:
    """First line of a command's docstring, read from its source: importing it takes seconds."""
    spec = find_spec(_module(name))
    assert spec is not None and spec.loader is not None
    source = spec.loader.get_source(spec.name)  # type: ignore[attr-defined]
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _usage() -> str:
    width = max(map(len, command_names()))
    lines = [f"  {name:{width}}  {_summary(name)}" for name in command_names()]
    return "\n".join(["usage: refbn-d2 COMMAND [-h] ...", "", *lines])


if __name__ == "__main__":
    main()
