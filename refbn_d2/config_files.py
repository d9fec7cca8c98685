"""The configs that come with the package, found by name."""

import difflib
from pathlib import Path
from typing import List

from .errors import UserError

__all__ = ["config_names", "find_config", "get_config_file"]

_PACKAGE = Path(__file__).parent


def _folder() -> Path:
    """configs/: inside the package in a wheel (setup.py copies it), beside it in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def config_names() -> List[str]:
    """Names of all configs that come with the package, such as "MNIST/lenet5_refbn.yaml"."""
    folder = _folder()
    found = [path for path in folder.rglob("*") if path.suffix in (".yaml", ".py")]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def get_config_file(name: str) -> str:
    """Path of a config that comes with the package, as ``detectron2.model_zoo`` does for its own.

    Args:
        name: path below ``configs/``, such as
            "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x_refbn.yaml".

    Raises:
        UserError: no config has this name.
    """
    if name not in config_names():
        raise UserError(f"no config is called {name!r} in {_folder()}{_hint(name)}")
    return str(_folder() / name)


def find_config(path: str) -> str:
    """The config file that a command line names: a path, or the name of a shipped config.

    A file that exists wins over a shipped config of that name.

    Raises:
        UserError: ``path`` is neither.
    """
    # PathManager reads "scheme://..." from elsewhere; an empty path means detectron2's defaults.
    if not path or "://" in path or Path(path).exists():
        return path
    if path in config_names():
        return get_config_file(path)
    raise UserError(f"{path}: no such file, nor a config that comes with refbn_d2{_hint(path)}")


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, config_names(), n=1)
    return f"; did you mean {close[0]}?" if close else ""
