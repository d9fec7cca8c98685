"""Reading files of weights without running what else may be in them: .pkl and .pth."""

import collections
import pickle
import zipfile
from typing import IO, Any, Dict, Tuple, Union

import numpy as np
import torch

try:
    from numpy._core import multiarray, numeric
except ImportError:  # NumPy 1
    from numpy.core import multiarray, numeric

__all__ = ["load", "load_torch"]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}")
    return text.encode(encoding)


def _dtype(*args: Any) -> np.dtype:
    dtype = np.dtype(*args)
    if dtype.kind not in "biufcSU":  # others have parts, which a pickle could set as it likes
        raise pickle.UnpicklingError(f"it has an array of type {dtype}, not of numbers or text")
    return dtype


# All that a pickled dict of NumPy arrays names: how arrays, their types and numbers are rebuilt.
_ALLOWED: Dict[Tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
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


_torch_load = torch.load


def load_torch(file: Union[str, IO[bytes]], map_location: Any = "cpu", **_: Any) -> Any:
    """``torch.load`` for tensors, numbers, text and containers of them, whatever its version does.

    Raises:
        pickle.UnpicklingError: the file asks for anything else, or is compressed: torch.save never
            does that, and a small file could fill the memory.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as f:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in f.infolist()):
                raise pickle.UnpicklingError("it is compressed, and torch.save does not compress")
    if not isinstance(file, str):
        file.seek(0)
    return _torch_load(file, map_location=map_location, weights_only=True)
