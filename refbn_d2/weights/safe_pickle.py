"""Reading files of weights without running what else may be in them: .pkl and .pth.

A pickle names functions and classes, and calls them. Here each name stands for something that
rebuilds an array, a number or a text after a look at what it is given; a name that no file of
weights needs is refused.
"""

import collections
import contextlib
import io
import os
import pickle
import pickletools
import zipfile
from typing import IO, Any, ContextManager, Dict, Tuple, Union

import numpy as np
import torch

try:
    from numpy._core import multiarray, numeric
except ImportError:  # NumPy 1
    from numpy.core import multiarray, numeric

__all__ = ["load", "load_torch"]

_UnpicklingError = pickle.UnpicklingError


class _Ignored:
    """In place of what is no weight: takes what is done to it and does nothing."""

    def __new__(cls, *_: Any) -> "_Ignored":
        return object.__new__(cls)

    def __init__(self, *_: Any):
        pass

    __setstate__ = __setitem__ = append = extend = __init__


class _DType:
    """numpy.dtype, of numbers or text; others have parts, which a pickle could set as it likes."""

    def __init__(self, name: Any, *_: Any):
        self.numpy = np.dtype(name) if isinstance(name, (str, bytes)) else np.dtype("V")
        if self.numpy.kind not in "biufcSU" or not self.numpy.itemsize:
            raise _UnpicklingError(f"it has an array of type {name!r}, not of numbers or text")

    def __setstate__(self, state: Any) -> None:
        # What NumPy writes for that type in either byte order; it would take any sizes and flags.
        for dtype in (self.numpy, self.numpy.newbyteorder()):
            if state == dtype.__reduce__()[2]:
                self.numpy = dtype
                return
        raise _UnpicklingError(f"it gives the type {self.numpy} a state that NumPy never writes")


def _checked(dtype: Any) -> np.dtype:
    if type(dtype) is not _DType:
        raise _UnpicklingError("it has an array without a type")
    return dtype.numpy


class _Array(np.ndarray):
    """numpy.ndarray, made empty and filled by its state; as a class it would allocate at will."""

    def __new__(cls, *args: Any) -> "_Array":
        if args:
            raise _UnpicklingError("it has an array that NumPy does not write so")
        return np.ndarray.__new__(cls, 0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, _checked(dtype), is_fortran, data))

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)  # to others it is an array like any


def _reconstruct(kind: Any, shape: Any, _: Any) -> np.ndarray:
    if kind is not _Array or shape != (0,):
        raise _UnpicklingError("it has an array that NumPy does not write so")
    return _Array()


def _from_buffer(data: Any, dtype: Any, *layout: Any) -> np.ndarray:
    return numeric._frombuffer(data, _checked(dtype), *layout)


def _scalar(dtype: Any, data: Any) -> Any:
    return multiarray.scalar(_checked(dtype), data)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _UnpicklingError(f"it asks for the codec {encoding}")
    return text.encode(encoding)


def _no_bytes(*args: Any) -> bytes:
    """How protocol 2 writes b"", as the content of an empty array; ``bytes`` would allocate."""
    if args:
        raise _UnpicklingError("it asks for bytes by their number")
    return b""


# How arrays, their types and numbers are rebuilt.
_NUMPY: Dict[Tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("builtins", "bytes"): _no_bytes,
    ("__builtin__", "bytes"): _no_bytes,
}
for _core in ("numpy.core", "numpy._core"):
    _NUMPY[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _NUMPY[f"{_core}.multiarray", "scalar"] = _scalar
    _NUMPY[f"{_core}.numeric", "_frombuffer"] = _from_buffer

# What training scripts keep beside the weights: their arguments.
_ARGUMENTS: Dict[Tuple[str, str], Any] = dict.fromkeys(
    [
        ("argparse", "Namespace"),
        ("types", "SimpleNamespace"),
        *(("pathlib", f"{kind}Path") for kind in ("", "Posix", "Windows", "PurePosix")),
        *(("pathlib._local", f"{kind}Path") for kind in ("", "Posix", "Windows", "PurePosix")),
    ],
    _Ignored,
)

_ALLOWED: Dict[Tuple[str, str], Any] = {
    **_NUMPY,
    **_ARGUMENTS,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _latin1,  # how old protocols write bytes
    # Of proposals. An enum of whole numbers, which is as good as its number.
    ("detectron2.structures.boxes", "BoxMode"): int,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _UnpicklingError(
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
        raise _UnpicklingError(f"no pickle, or a damaged one: {e}") from None


_torch_load = torch.load
_MARK = b"PK\x03\x04"  # the first bytes of a zip file, by which torch.load tells the two formats


def load_torch(file: Union[str, IO[bytes]], map_location: Any = "cpu", **_: Any) -> Any:
    """``torch.load`` for tensors, arrays, numbers, text and containers of them.

    The arguments of a training script (``argparse.Namespace``, paths) are read over. What is
    loaded is what was checked: a copy in memory, of which each record has its checksum.

    Raises:
        pickle.UnpicklingError: the file asks for anything else, claims more than it has, or is
            compressed: torch.save never does that, and a small file could fill the memory.
        zipfile.BadZipFile: it is damaged.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as f:
            return load_torch(f, map_location)
    is_zip = file.read(len(_MARK)) == _MARK
    file.seek(0)
    content = _checked_archive(file) if is_zip else _checked_storages(file)
    with _stand_ins():
        return _torch_load(content, map_location=map_location, weights_only=True)


def _stand_ins() -> ContextManager[Any]:
    """Lets torch.load take what stands for NumPy's names and for arguments, in place of them."""
    safe_globals = getattr(torch.serialization, "safe_globals", None)
    if safe_globals is None:  # before PyTorch 2.5, which refuses them
        return contextlib.nullcontext()
    return safe_globals([(v, ".".join(k)) for k, v in {**_NUMPY, **_ARGUMENTS}.items()])


def _checked_archive(file: IO[bytes]) -> IO[bytes]:
    """A copy of an archive of torch.save, written anew from its records after a look at each.

    torch.load reads no checksum and follows fields of the archive that zipfile ignores, so that a
    damaged file may be fine for the one and something else for the other.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(copy, "w") as target:
        entries = source.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _UnpicklingError("it is compressed, and torch.save does not compress")
        if len(set(source.namelist())) < len(entries):
            raise _UnpicklingError("it has two records of one name")
        if sum(entry.file_size for entry in entries) > file.seek(0, io.SEEK_END):
            raise _UnpicklingError("its records claim to be larger than the file")
        for entry in entries:
            target.writestr(entry.filename, source.read(entry))  # read checks the CRC-32
    copy.seek(0)
    return copy


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
                raise _UnpicklingError(f"it has a tensor of {pid[4]!r} values")
            self._values[str(pid[2])] = pid[4]
        return None


def _checked_storages(file: IO[bytes]) -> IO[bytes]:
    """A copy of a file of PyTorch before 1.6; an error if it claims more tensors than it has.

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
        raise _UnpicklingError("it claims more values than the file has")
    return io.BytesIO(data)
