"""A folder has one writer at a time."""

import errno
import fcntl
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Optional

from ..errors import UserError

__all__ = ["folder_lock", "holder"]

FILE = ".lock"
# Of file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def folder_lock(folder: Path, name: str = FILE, wait: bool = False) -> Iterator[None]:
    """Keeps other processes from writing to a folder while the block runs.

    The kernel holds the lock for this process, so it ends with the process, however that ends; the
    file that is left behind means nothing. Processes that this one starts do not hold it.

    Args:
        folder: made if needed. A file system without locks is used without one.
        name: of the file that is locked in it, for a lock on a part of the folder.
        wait: whether to wait for another process that has it.

    Raises:
        UserError: another process has the folder and is not waited for, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not truncated: the file names the process that has the lock, until this one has it.
        file = open(os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e.strerror}; choose another folder") from e
    # lockf and not flock: a lock by flock would pass to forked workers, which may live on after a
    # kill. Closing any other file object of this path would end it, hence `holder` is for others'.
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise UserError(
                    f"{folder} is in use by {_name(file.read())}: wait for its end, end it, or "
                    "choose another folder"
                ) from None
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def holder(folder: Path) -> Optional[str]:
    """The process that has a folder, in words, or None.

    Not for a folder that this process has itself: looking would end its lock.
    """
    try:
        with open(folder / FILE, "r+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                return None if e.errno in _NO_LOCKS else _name(file.read())
    except OSError:  # nobody has been there, or nobody may write
        pass
    return None


def _name(content: str) -> str:
    return f"process {content}" if content else "another process"
