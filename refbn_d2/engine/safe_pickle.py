"""Reading a pickle of arrays without running what else may be in it."""

import collections
import pickle
from typing import IO, Any, Dict, Tuple

import numpy as np

try:
    from numpy._core import multiarray, numeric
except ImportError:  # NumPy 1
    from numpy.core import multiarray, numeric

__all__ = ["load"]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}")
    return text.encode(encoding)


# All that a pickled dict of NumPy arrays names: how arrays, their types and numbers are rebuilt.
_ALLOWED: Dict[Tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _latin1,  # how old protocols write bytes
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = multiarray._reconstruct
    _ALLOWED[f"{_core}.multiarray", "scalar"] = multiarray.scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = numeric._frombuffer


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is not part of an array"
            ) from None


def load(file: IO[bytes], encoding: str = "ASCII") -> Any:
    """``pickle.load`` for dicts of arrays, numbers and text.

    Raises:
        pickle.UnpicklingError: the file asks for anything else.
    """
    return _ArrayUnpickler(file, encoding=encoding).load()
