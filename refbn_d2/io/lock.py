"""Locks that allow one process at a time to write to a folder."""

import errno
import fcntl
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Optional

from ..errors import UserError
from .atomic import write_errors

__all__ = ["folder_lock", "holder"]

FILE = ".lock"
# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def folder_lock(folder: Path, name: str = FILE, wait: bool = False) -> Iterator[None]:
    """Context manager that locks a folder against other processes that call it.

    The operating system releases the lock when this process ends, also when it is killed. The lock
    file stays and has no meaning by itself: were it deleted, a process that has just opened it
    would lock a file that others no longer find. Child processes do not inherit the lock.

    Args:
        folder: Folder to lock; created if it does not exist. If its file system has no locks, the
            block runs without one.
        name: Name of the lock file in the folder. Another name locks a part of the folder.
        wait: Whether to wait while another process has the lock.

    Raises:
        UserError: If another process has the lock and ``wait`` is False, or if the folder cannot be
            written.
    """
    with write_errors(folder, "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        # Do not truncate the file yet: it names the process that has the lock.
        file = open(os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    # lockf and not flock: forked workers would inherit a lock by flock, and they may outlive a
    # killed parent. A lock by lockf ends as soon as this process closes any file object of this
    # path, so `holder` must not be called for a folder that this process has locked.
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise UserError(
                    f"{folder} is in use by {_name(file.read())}: wait until it ends, stop it, or "
                    "choose another folder"
                ) from None
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def holder(folder: Path, name: str = FILE) -> Optional[str]:
    """Returns a description of the process that has locked a folder, or None.

    Args:
        folder: Folder that may be locked.
        name: Name of the lock file in it.

    Do not call this for a folder that this process has locked: it would release the lock.
    """
    try:
        with open(folder / name, "r+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                return None if e.errno in _NO_LOCKS else _name(file.read())
    except OSError:  # no lock file, or the folder is read-only
        pass
    return None


def _name(content: str) -> str:
    return f"process {content}" if content else "another process"
