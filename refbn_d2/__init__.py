"""RefBN for detectron2. Importing this package is the plugin: it registers the norm names and the
quick data sets. Without detectron2 only these parts work: ``refbn_d2.norms`` (PyTorch alone) and
``refbn_d2.evaluation`` (neither PyTorch nor detectron2)."""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names that __getattr__ below finds when they are used
    from .config import add_refbn_config, apply_norm_config
    from .config_files import get_config_file
    from .norms import (
        RefBatchNorm2d,
        convert_norm,
        fold_norms,
        register_norm,
        unregister_norm,
    )
    from .statistics.reference import capture_reference

__version__ = "0.1.0"

__all__ = [
    "RefBatchNorm2d",
    "add_refbn_config",
    "apply_norm_config",
    "capture_reference",
    "convert_norm",
    "fold_norms",
    "get_config_file",
    "register_norm",
    "setup_environment",
    "unregister_norm",
]

# Public name -> the module that has it, imported when the name is first used.
_HOME = {
    "RefBatchNorm2d": "norms",
    "add_refbn_config": "config",
    "apply_norm_config": "config",
    "capture_reference": "statistics.reference",
    "convert_norm": "norms",
    "fold_norms": "norms",
    "get_config_file": "config_files",
    "register_norm": "norms",
    "unregister_norm": "norms",
}
# Modules of version 0.1 by the names they had.
_MOVED = {"reference": "statistics.reference"}


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        return importlib.import_module(f"{__name__}.{_MOVED[name]}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] not in ("norms", "config_files"):
        importlib.import_module(f"{__name__}.upstream")  # says so if detectron2 is missing
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def setup_environment() -> None:
    """What detectron2 calls where ``DETECTRON2_ENV_MODULE`` is "refbn_d2": importing is enough.

    With that environment variable every tool that imports detectron2 knows the norms, unedited.
    """


try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as e:
    if e.name != "detectron2":
        raise
else:
    with warnings.catch_warnings():
        # detectron2 and fvcore meet it when they are imported; no user of theirs can act on it.
        warnings.filterwarnings("ignore", ".*torch.jit.script. is deprecated", FutureWarning)
        # data registers its data sets, modeling its backbones.
        from . import data, modeling, registry  # noqa: F401
        from .weights import pypi

    registry.register()
    pypi.register()
