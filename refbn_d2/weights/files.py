"""Reading files of weights as data, finding the state dict in them, and writing them."""

from typing import Any, Dict, List, NamedTuple

import torch

from ..errors import UserError
from ..io.atomic import atomic_write
from . import safe_pickle

__all__ = ["StateDict", "atomic_save", "find_state_dict", "first_sentence", "read_weights"]

# Where programs keep the weights in a checkpoint, the likeliest first: detectron2, torchvision and
# this package; timm, MoCo and SwAV; DINO; pycls; Detectron. Then weights averaged over training,
# and a network that learns from another.
_KEYS = ("model", "state_dict", "teacher", "model_state", "blobs")
_OTHER_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "student")


class StateDict(NamedTuple):
    """Weights in the content of a file.

    Attributes:
        weights: what the file holds by name.
        key: where they are in the file ("model", "state_dict"); '' if they are all of it.
        others: keys that also hold weights and were not taken.
    """

    weights: Dict[str, Any]
    key: str
    others: List[str]

    def __str__(self) -> str:
        """Which were taken, and which not, in words."""
        others = f", not {' or '.join(map(repr, self.others))}" if self.others else ""
        return f"weights are its {self.key!r}{others}" if self.key else "weights by name"


def find_state_dict(content: Any, key: str = "") -> StateDict:
    """The state dict in a checkpoint.

    Args:
        content: what the file holds.
        key: which to take; '' takes the likeliest.

    Raises:
        UserError: there is none, or none at ``key``.
    """
    if not isinstance(content, dict):
        raise UserError(f"holds a {type(content).__name__}, not weights by name")
    found = [k for k in (*_KEYS, *_OTHER_KEYS) if isinstance(content.get(k), dict)]
    if key and key not in found:
        known = f"it has {', '.join(found)}" if found else "its weights are at its top"
        raise UserError(f"has no weights at {key!r}: {known}")
    if not found:
        return StateDict(content, "", [])
    key = key or found[0]
    return StateDict(content[key], key, [k for k in found if k != key])


def _load_safetensors(path: str) -> Dict[str, torch.Tensor]:
    """The tensors in a .safetensors file, a format without code and without checksums.

    Raises:
        UserError: its package is not installed.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: needs the package safetensors: pip install safetensors") from None
    return load_file(path)


def read_weights(path: str) -> Any:
    """What a local file of weights holds: .safetensors, .pkl of arrays, or one of torch.save.

    Raises:
        UserError: see :func:`_load_safetensors`.
        Exception: whatever reading a damaged file may raise.
    """
    if path.endswith(".safetensors"):
        return _load_safetensors(path)
    if path.endswith(".pkl"):
        with open(path, "rb") as f:
            return safe_pickle.load(f, encoding="latin1")
    return safe_pickle.load_torch(path)


def first_sentence(error: Exception) -> str:
    """What an error says, without what torch adds about ways around it."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]


def atomic_save(content: Any, path: str) -> None:
    """``torch.save`` by :func:`atomic_write`.

    Raises:
        OSError: the disk's, also where torch raises an error of its own after it.
    """
    try:
        with atomic_write(path, "wb") as f:
            torch.save(content, f)
    except RuntimeError as e:
        if isinstance(e.__context__, OSError):
            raise e.__context__ from e
        raise
