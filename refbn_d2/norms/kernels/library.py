"""Compiles C++ at the first use, and caches the library for other processes.

The library is in a folder that belongs to the user, together with a file that contains its SHA-256
checksum in the format of ``sha256sum``. If the checksum does not match, the library is not loaded
but compiled again, because loading a truncated library would crash the process.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Callable, Iterator, Sequence, TypeVar

from ...io.atomic import PARTIAL, atomic_write

__all__ = ["LibraryError", "load_library"]

T = TypeVar("T")

_BUILD = "tmp"  # prefix of the names of the temporary build folders
_TIMEOUT = 120.0  # seconds that one compiler command may take


class LibraryError(Exception):
    """The library cannot be compiled or loaded; the message names the reason and a remedy."""


def load_library(
    source: Path, compiler: str, flags: Sequence[str], cache: Path, wrap: Callable[[ctypes.CDLL], T]
) -> T:
    """Loads the library compiled from ``source``; compiles it first if it is not in ``cache``.

    Args:
        source: Path of the C++ file.
        compiler: Compiler command, which may include arguments, in shell syntax.
        flags: Compiler flags.
        cache: Folder of the compiled libraries; created if it does not exist.
        wrap: Function that makes the result from the library. It raises an AttributeError if the
            library lacks a function.

    Returns:
        The result of ``wrap``.

    Raises:
        LibraryError: If the library cannot be compiled or loaded, or if other users could modify
            it.
    """
    try:
        command = shlex.split(compiler)
    except ValueError as e:
        raise LibraryError(f"CXX={compiler} is not a command: {e}") from None
    what = [platform.machine(), *command, *flags]
    key = hashlib.sha256(" ".join(what).encode() + source.read_bytes()).hexdigest()
    path = cache / f"{source.stem}-{key[:16]}.so"
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_folder(cache)
        with _lock(cache):
            _remove_leftovers(cache)
            if _fits(path):
                with contextlib.suppress(OSError, AttributeError):  # compiled on another machine
                    return wrap(ctypes.CDLL(str(path)))
            _compile(source, command, flags, path)
            return wrap(ctypes.CDLL(str(path)))
    except OSError as e:
        raise LibraryError(f"{e.filename or cache}: {e.strerror or e}") from e


def _mine(status: os.stat_result) -> bool:
    return status.st_uid in (os.getuid(), 0)  # files of root are trusted


def _check_folder(folder: Path) -> None:
    status = folder.stat()
    if not _mine(status) or status.st_mode & stat.S_IWOTH:
        raise LibraryError(
            f"other users can write to {folder}, from which code is loaded: restrict it to your "
            "account (chown, chmod 700), or set XDG_CACHE_HOME to another folder"
        )


@contextlib.contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """Lets one process compile at a time; the others wait and then load its library."""
    with contextlib.ExitStack() as stack:
        # Continue without a lock if the file system has none or the folder is read-only.
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(cache / ".lock", "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(cache: Path) -> None:
    """Removes files of killed compilations. Requires the lock, so that none is in progress."""
    for folder in cache.glob(f"{_BUILD}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in cache.glob(f"*{PARTIAL}"):
        with contextlib.suppress(OSError):
            file.unlink()


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _checksum_line(content: bytes, path: Path) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"


def _fits(path: Path) -> bool:
    """Whether the library matches its checksum and belongs to this user."""
    try:
        with open(path, "rb") as f:
            own, content = _mine(os.fstat(f.fileno())), f.read()
        return own and _checksum_file(path).read_text() == _checksum_line(content, path)
    except (OSError, UnicodeDecodeError):
        return False


def _compile(source: Path, command: Sequence[str], flags: Sequence[str], path: Path) -> None:
    # In the cache folder, so that _remove_leftovers finds the build folder of a killed process.
    with tempfile.TemporaryDirectory(prefix=_BUILD, dir=path.parent) as folder:
        compiled, linked = os.path.join(folder, "kernels.o"), os.path.join(folder, "kernels.so")
        _run([*command, *flags, "-c", str(source), "-o", compiled])
        # Linked without -fopenmp, so that the library uses torch's OpenMP runtime and its threads.
        # The threads of a second runtime would compete with them for the cores.
        _run([*command, "-shared", compiled, "-o", linked])
        content = Path(linked).read_bytes()
    for file in (path, _checksum_file(path)):
        _remove_what_is_no_file(file)
    with atomic_write(str(path), "wb") as f:
        f.write(content)
    with atomic_write(str(_checksum_file(path))) as f:
        f.write(_checksum_line(content, path))


def _remove_what_is_no_file(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT)
    except FileNotFoundError:
        raise LibraryError(
            f"there is no C++ compiler {command[0]!r}: install one, or set CXX to its path"
        ) from None
    except PermissionError:
        raise LibraryError(
            f"the C++ compiler {command[0]!r} is not executable: set CXX to another one"
        ) from None
    except subprocess.TimeoutExpired:
        raise LibraryError(f"the C++ compiler {command[0]!r} took over {_TIMEOUT:g} s") from None
    except subprocess.CalledProcessError as e:
        lines = e.stderr.decode(errors="replace").strip().splitlines()
        reason = next((line for line in lines if "error" in line), f"exit status {e.returncode}")
        raise LibraryError(f"the C++ compiler {command[0]!r} failed: {reason}") from None
