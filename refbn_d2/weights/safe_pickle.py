"""Reading files of weights without running what else may be in them: .pkl and .pth."""

import collections
import io
import pickle
import pickletools
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


# What array pickles name as the first argument of _reconstruct; as a function it would allocate.
_NDARRAY = object()


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> np.ndarray:
    if kind is not _NDARRAY or shape != (0,):
        raise pickle.UnpicklingError("it has an array that NumPy does not write so")
    return multiarray._reconstruct(np.ndarray, (0,), b"b")


# All that a pickled dict of NumPy arrays names: how arrays, their types and numbers are rebuilt.
_ALLOWED: Dict[Tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _latin1,  # how old protocols write bytes
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
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
        pickle.UnpicklingError: the file asks for anything else, or claims more than it has.
    """
    data = file.read()
    _check_claims(io.BytesIO(data), len(data))
    return _ArrayUnpickler(io.BytesIO(data), encoding=encoding).load()


def _check_claims(file: IO[bytes], size: int) -> None:
    """Raises an error if a length in a pickle, for which memory would be taken, is not true."""
    try:
        for opcode, value, _ in pickletools.genops(file):
            if opcode.name in ("FRAME", "PUT", "BINPUT", "LONG_BINPUT") and value > size:
                raise ValueError(f"its {opcode.name} of {value} is larger than the file")
    except ValueError as e:
        raise pickle.UnpicklingError(f"no pickle, or a damaged one: {e}") from None


_torch_load = torch.load


def load_torch(file: Union[str, IO[bytes]], map_location: Any = "cpu", **_: Any) -> Any:
    """``torch.load`` for tensors, numbers, text and containers of them, whatever its version does.

    Raises:
        pickle.UnpicklingError: the file asks for anything else, claims more than it has, or is
            compressed: torch.save never does that, and a small file could fill the memory.
    """
    if isinstance(file, str):
        with open(file, "rb") as f:
            _check_torch(f)
    else:
        _check_torch(file)
        file.seek(0)
    return _torch_load(file, map_location=map_location, weights_only=True)


def _check_torch(file: IO[bytes]) -> None:
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return _check_storages(file)
    with zipfile.ZipFile(file) as f:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in f.infolist()):
            raise pickle.UnpicklingError("it is compressed, and torch.save does not compress")


class _Ignored:
    """In place of whatever a pickle names: takes what is done to it and does nothing."""

    def __init__(self, *_: Any):
        pass

    __setstate__ = __setitem__ = append = extend = __init__


class _Claims(pickle.Unpickler):
    """Reads a pickle for the number of values that each storage in it is said to have."""

    def __init__(self, file: IO[bytes], values: Dict[Any, int]):
        super().__init__(file)
        self._values = values

    def find_class(self, module: str, name: str) -> Any:
        return _Ignored

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) > 4 and pid[0] == "storage":
            if not isinstance(pid[4], int) or pid[4] < 0:
                raise pickle.UnpicklingError(f"it has a tensor of {pid[4]!r} values")
            self._values[str(pid[2])] = pid[4]
        return None


def _check_storages(file: IO[bytes]) -> None:
    """Raises an error if a file of PyTorch before 1.6 claims more tensors than it has.

    torch.load takes memory for them before it looks for their values. The fourth pickle of such a
    file, behind three numbers and descriptions, has the tensors.
    """
    data = file.read()  # a file on disk would be asked for, and make room for, what it claims
    stream = io.BytesIO(data)
    values: Dict[Any, int] = {}
    start = 0
    for _ in range(4):
        stream.seek(start)
        _check_claims(stream, len(data))
        stream.seek(start)
        _Claims(stream, values).load()
        start = stream.tell()
    if sum(values.values()) > len(data):
        raise pickle.UnpicklingError("it claims more values than the file has")
