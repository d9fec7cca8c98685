"""Reading files of weights as data, finding the state dict in them, and writing them."""

from typing import Any, Dict, List, NamedTuple

import torch

from ..errors import UserError
from ..io.atomic import atomic_write
from . import safe_pickle

__all__ = ["StateDict", "atomic_save", "find_state_dict", "first_sentence", "read_weights"]

# Keys of the weights in checkpoints of several programs, the most likely first: detectron2,
# torchvision and this package; timm, MoCo and SwAV; DINO; pycls; Detectron. The other keys are
# those of weights that were averaged over training, and of a student network.
_KEYS = ("model", "state_dict", "teacher", "model_state", "blobs")
_OTHER_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "student")


class StateDict(NamedTuple):
    """State dict in the content of a file.

    Attributes:
        weights: content of the state dict, by name.
        key: its key in the file ("model", "state_dict"); '' if it is the whole content.
        others: keys of further state dicts in the file, which were not taken.
    """

    weights: Dict[str, Any]
    key: str
    others: List[str]

    def __str__(self) -> str:
        """Describes which state dict was taken, and which were not."""
        others = f", not {' or '.join(map(repr, self.others))}" if self.others else ""
        return f"weights are its {self.key!r}{others}" if self.key else "weights by name"


def find_state_dict(content: Any, key: str = "") -> StateDict:
    """Finds the state dict in a checkpoint.

    Args:
        content: content of the file.
        key: key of the state dict to take; '' for the most likely one.

    Raises:
        UserError: if there is no state dict, none at ``key``, or one with names that are not text.
    """
    if not isinstance(content, dict):
        raise UserError(f"holds a {type(content).__name__}, not weights by name")
    found = [k for k in (*_KEYS, *_OTHER_KEYS) if isinstance(content.get(k), dict)]
    if key and key not in found:
        known = f"it has {', '.join(found)}" if found else "its weights are not below any key"
        raise UserError(f"has no weights at {key!r}: {known}")
    key = key or (found[0] if found else "")
    weights = content[key] if key else content
    for name in weights:
        if not isinstance(name, str):
            raise UserError(f"has the name {name!r:.40} among its weights, which is not text")
    return StateDict(weights, key, [k for k in found if k != key])


def _load_safetensors(path: str) -> Dict[str, torch.Tensor]:
    """Reads the tensors in a .safetensors file, a format without code and without checksums.

    Raises:
        UserError: if the package safetensors is not installed.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: needs the package safetensors: pip install safetensors") from None
    return load_file(path)


def read_weights(path: str) -> Any:
    """Reads a local weights file: .safetensors, a .pkl of arrays, or a file of torch.save.

    Raises:
        UserError: see :func:`_load_safetensors`.
        Exception: any exception if the file is damaged.
    """
    if path.endswith(".safetensors"):
        return _load_safetensors(path)
    if path.endswith(".pkl"):
        with open(path, "rb") as f:
            return safe_pickle.load(f, encoding="latin1")
    return safe_pickle.load_torch(path)


def first_sentence(error: Exception) -> str:
    """Returns the first sentence of an error, without the workarounds that torch suggests."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]


def atomic_save(content: Any, path: str) -> None:
    """Saves ``content`` with ``torch.save`` and :func:`atomic_write`.

    Raises:
        OSError: if the file cannot be written, even if torch raises a RuntimeError after it.
    """
    try:
        with atomic_write(path, "wb") as f:
            torch.save(content, f)
    except RuntimeError as e:
        if isinstance(e.__context__, OSError):
            raise e.__context__ from e
        raise
