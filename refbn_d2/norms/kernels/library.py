"""Compiling C++ when it is first needed, and keeping the result for the next processes.

The library lies in a folder of the user's own, beside a file with its SHA-256 checksum in the
format of ``sha256sum``. A library that its checksum does not fit is compiled again and never
loaded: the dynamic linker ends a process that meets a truncated one.
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

_BUILD = "tmp"  # prefix of the folders to compile in
_TIMEOUT = 120.0  # seconds for a command of the compiler


class LibraryError(Exception):
    """The library cannot be had; the message says why, and what to do about it."""


def load_library(
    source: Path, compiler: str, flags: Sequence[str], cache: Path, wrap: Callable[[ctypes.CDLL], T]
) -> T:
    """The library that ``source`` compiles to, from ``cache`` if it is there.

    Args:
        source: C++ file.
        compiler: command with its own arguments, as in a shell.
        flags: to compile with.
        cache: folder for compiled libraries, made if it does not exist.
        wrap: what to make of the library; an AttributeError says that it is another one.

    Raises:
        LibraryError: it cannot be compiled or loaded, or somebody else could change it.
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
                with contextlib.suppress(OSError, AttributeError):  # made on another machine
                    return wrap(ctypes.CDLL(str(path)))
            _compile(source, command, flags, path)
            return wrap(ctypes.CDLL(str(path)))
    except OSError as e:
        raise LibraryError(f"{e.filename or cache}: {e.strerror or e}") from e


def _mine(status: os.stat_result) -> bool:
    return status.st_uid in (os.getuid(), 0)  # who is not safe from root is not safe at all


def _check_folder(folder: Path) -> None:
    status = folder.stat()
    if not _mine(status) or status.st_mode & stat.S_IWOTH:
        raise LibraryError(
            f"other users can write to {folder}, and what lies there is run: make it yours alone "
            "(chown, chmod 700), or set XDG_CACHE_HOME"
        )


@contextlib.contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """Held by one process at a time: the others then find what it has compiled."""
    with contextlib.ExitStack() as stack:
        # Not every file system has locks, and a folder that is read only is still read.
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(cache / ".lock", "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(cache: Path) -> None:
    """Of compilations that were killed; nobody else compiles while this process has the lock."""
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
    """Whether the library is whole, and this user's own."""
    try:
        with open(path, "rb") as f:
            own, content = _mine(os.fstat(f.fileno())), f.read()
        return own and _checksum_file(path).read_text() == _checksum_line(content, path)
    except (OSError, UnicodeDecodeError):
        return False


def _compile(source: Path, command: Sequence[str], flags: Sequence[str], path: Path) -> None:
    # Not in the system's folder for temporary files, where a killed process would leave it.
    with tempfile.TemporaryDirectory(prefix=_BUILD, dir=path.parent) as folder:
        compiled, linked = os.path.join(folder, "kernels.o"), os.path.join(folder, "kernels.so")
        _run([*command, *flags, "-c", str(source), "-o", compiled])
        # Linked without -fopenmp, it takes torch's own OpenMP, whose threads are there already:
        # those of a second one would fight with them.
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
            f"there is no C++ compiler {command[0]!r}: install one, or set CXX"
        ) from None
    except PermissionError:
        raise LibraryError(f"the C++ compiler {command[0]!r} (CXX) cannot be run") from None
    except subprocess.TimeoutExpired:
        raise LibraryError(f"the C++ compiler {command[0]!r} took over {_TIMEOUT:g} s") from None
    except subprocess.CalledProcessError as e:
        lines = e.stderr.decode(errors="replace").strip().splitlines()
        reason = next((line for line in lines if "error" in line), f"exit status {e.returncode}")
        raise LibraryError(f"the C++ compiler {command[0]!r} failed: {reason}") from None
