"""Reads weights files (.pkl and .pth) without executing code that they may contain.

A pickle contains names of functions and classes, which the unpickler calls. Here each of these
names is replaced by a function or class that checks its arguments before it rebuilds an array, a
number or a string. Names that weights files do not need are refused.
"""

import collections
import contextlib
import io
import os
import pickle
import pickletools
import zipfile
from typing import IO, Any, ContextManager, Dict, SupportsIndex, Tuple, Union

import numpy as np
import torch

try:
    from numpy._core import multiarray, numeric
except ImportError:  # NumPy 1
    from numpy.core import multiarray, numeric  # type: ignore[no-redef]  # the older path

__all__ = ["load", "load_torch"]

_UnpicklingError = pickle.UnpicklingError


class _Ignored:
    """Placeholder for objects that are not weights: accepts all operations and does nothing."""

    def __new__(cls, *_: Any) -> "_Ignored":
        return object.__new__(cls)

    def __init__(self, *_: Any):
        pass

    __setstate__ = __setitem__ = append = extend = __init__


class _DType:
    """numpy.dtype of numbers or text. Other types have fields, which a pickle could set freely."""

    def __init__(self, name: Any, *_: Any):
        # Any, because NumPy's annotations do not have bytes.
        text: Any = name if isinstance(name, (str, bytes)) else "V"
        self.numpy = np.dtype(text)
        if self.numpy.kind not in "biufcSU" or not self.numpy.itemsize:
            raise _UnpicklingError(f"it has an array of type {name!r}, not of numbers or text")

    def __setstate__(self, state: Any) -> None:
        # Accept only the states that NumPy writes for this type, in either byte order. NumPy's own
        # __setstate__ would accept any sizes and flags.
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
    """numpy.ndarray that is created empty and filled by __setstate__.

    ndarray's own constructor would allocate any size that a pickle asks for.
    """

    def __new__(cls, *args: Any) -> "_Array":
        if args:
            raise _UnpicklingError("it has an array in a form that NumPy does not write")
        return np.ndarray.__new__(cls, 0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, _checked(dtype), is_fortran, data))

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)  # pickled as a plain array


def _reconstruct(kind: Any, shape: Any, _: Any) -> np.ndarray:
    if kind is not _Array or shape != (0,):
        raise _UnpicklingError("it has an array in a form that NumPy does not write")
    return _Array()


def _from_buffer(data: Any, dtype: Any, *layout: Any) -> np.ndarray:
    frombuffer = numeric._frombuffer  # type: ignore[attr-defined]  # private, but in pickles
    return frombuffer(data, _checked(dtype), *layout)


def _scalar(dtype: Any, data: Any) -> Any:
    return multiarray.scalar(_checked(dtype), data)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _UnpicklingError(f"it asks for the codec {encoding}")
    return text.encode(encoding)


def _no_bytes(*args: Any) -> bytes:
    """Rebuilds b"", which protocol 2 writes as a call of ``bytes`` without arguments.

    With a number as argument, ``bytes`` would allocate memory.
    """
    if args:
        raise _UnpicklingError("it calls bytes with arguments")
    return b""


# Replacements for the names in pickled arrays, types and numbers of NumPy.
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

# Classes of arguments that training scripts save beside the weights; their content is ignored.
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
    # In proposal files. It is an IntEnum, so its value is sufficient.
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
        pickle.UnpicklingError: if the file contains anything else, or declares sizes that exceed
            the file.
    """
    data = file.read()
    _check_claims(io.BytesIO(data), len(data))
    return _ArrayUnpickler(io.BytesIO(data), encoding=encoding).load()


def _check_claims(file: IO[bytes], size: int) -> None:
    """Raises an error if a length for which the unpickler would allocate memory is too large."""
    try:
        for opcode, value, _ in pickletools.genops(file):
            if opcode.name in ("FRAME", "PUT", "BINPUT", "LONG_BINPUT"):
                assert value is not None  # each of these has an argument
                if value > size:
                    raise ValueError(f"its {opcode.name} of {value} is larger than the file")
    except ValueError as e:
        raise _UnpicklingError(f"no pickle, or a damaged one: {e}") from None


_torch_load = torch.load
_MARK = b"PK\x03\x04"  # the first bytes of a zip file, by which torch.load tells the two formats


def load_torch(file: Union[str, IO[bytes]], map_location: Any = "cpu", **_: Any) -> Any:
    """``torch.load`` for tensors, arrays, numbers, text and containers of them.

    The arguments of a training script (``argparse.Namespace``, paths) are ignored. The content is
    loaded from a copy in memory that was checked, including the checksums of a zip file's records.

    Raises:
        pickle.UnpicklingError: if the file contains anything else, declares sizes that exceed the
            file, or is compressed: torch.save does not compress, and a small compressed file could
            fill the memory.
        zipfile.BadZipFile: if the file is damaged.
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
    """Makes torch.load use the replacements for NumPy's names and for classes of arguments."""
    safe_globals = getattr(torch.serialization, "safe_globals", None)
    if safe_globals is None:  # before PyTorch 2.5, which refuses them
        return contextlib.nullcontext()
    return safe_globals([(v, ".".join(k)) for k, v in {**_NUMPY, **_ARGUMENTS}.items()])


def _checked_archive(file: IO[bytes]) -> IO[bytes]:
    """Copies an archive of torch.save record by record, and checks each record.

    torch.load does not verify checksums and uses fields of the archive that zipfile ignores. A
    damaged file could therefore pass zipfile's checks and be read differently by torch.load.
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
    """Unpickler that only collects the declared number of values of each storage."""

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
    """Copies a file of PyTorch before 1.6; raises an error if it declares more values than it has.

    torch.load allocates memory for the tensors before it reads their values. The tensors are in the
    fourth pickle of such a file. The first three are a magic number, the protocol version and a
    description of the system.
    """
    # In memory: when reading a file on disk, the unpickler would allocate any declared length.
    data = file.read()
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
