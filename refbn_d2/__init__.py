"""RefBN for detectron2. Importing this package is the plugin: it registers the norm names and the
quick data sets. ``refbn_d2.norms`` is pure PyTorch and can be imported without detectron2."""

import sys
import warnings

__version__ = "0.1.0"

_INSTALL = (
    "refbn_d2 needs detectron2, which is not installed. Install it with: pip install "
    "--no-build-isolation git+https://github.com/facebookresearch/detectron2.git"
    "@02b5c4e295e990042a714712c21dc79b731e8833 (or run `make setup`, which also works with PyPI "
    "alone). Only refbn_d2.norms works without it."
)


def _importing_norms() -> bool:
    """Whether this import is Python's way to ``refbn_d2.norms``.

    Python runs a parent package first and does not tell it why; only the import machinery's own
    frames know which module was asked for.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load_unlocked":
            if str(frame.f_locals.get("name", "")).startswith(__name__ + ".norms"):
                return True
        frame = frame.f_back
    return False


try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as e:
    if e.name != "detectron2":
        raise
    if not _importing_norms():
        raise ModuleNotFoundError(_INSTALL, name="detectron2") from None

    def __getattr__(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModuleNotFoundError(_INSTALL, name="detectron2")

else:
    # detectron2 and fvcore meet it wherever they are imported; no user of theirs can act on it.
    warnings.filterwarnings("ignore", ".*torch.jit.script. is deprecated", FutureWarning)

    from . import data, registry  # noqa: F401
    from .config import add_refbn_config, apply_norm_config
    from .norms import RefBatchNorm2d, convert_norm, fold_norms
    from .reference import capture_reference

    registry.register()
    __all__ = [
        "RefBatchNorm2d",
        "add_refbn_config",
        "apply_norm_config",
        "capture_reference",
        "convert_norm",
        "fold_norms",
    ]
