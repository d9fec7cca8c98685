"""RefBN for detectron2. Importing this package registers the norm names, the quick data sets, the
timm backbones and pypi:// paths with detectron2. Without detectron2 only these parts work:
``refbn_d2.norms`` (needs only PyTorch) and ``refbn_d2.evaluation`` (needs neither)."""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time __getattr__ below imports these names when they are first used
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

# Public name -> the module that defines it, imported when the name is first used.
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
# Name of a module in version 0.1 -> its present name.
_MOVED = {"reference": "statistics.reference"}


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        return importlib.import_module(f"{__name__}.{_MOVED[name]}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] not in ("norms", "config_files"):
        importlib.import_module(f"{__name__}.upstream")  # a clear error if detectron2 is missing
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def setup_environment() -> None:
    """Does nothing; detectron2 calls it if ``DETECTRON2_ENV_MODULE`` is "refbn_d2".

    With this environment variable detectron2 imports this package, so that the norms are available
    in every program that imports detectron2.
    """


try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as e:
    if e.name != "detectron2":
        raise
else:
    with warnings.catch_warnings():
        # The import of detectron2 and fvcore causes this warning, on which users cannot act.
        warnings.filterwarnings("ignore", ".*torch.jit.script. is deprecated", FutureWarning)
        # data registers its data sets, modeling its backbones.
        from . import data, modeling, registry  # noqa: F401
        from .weights import pypi

    registry.register()
    pypi.register()
