"""Errors that the user can correct: they are reported in one line, without a traceback.

With REFBN_DEBUG=1 in the environment every error has its traceback.
"""

import errno
import functools
import logging
import os
import re
import sys
from typing import Callable, Optional

__all__ = ["UserError", "one_line_errors", "quiet_user_errors", "user_message"]


class UserError(Exception):
    """Error that the user can correct; the message names the item, its value and the remedy."""


class _NoTraceback(logging.Filter):
    """Logging filter that replaces the traceback of a user's error by its one-line message.

    It is needed because detectron2's TrainerBase logs every exception.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        message = None
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            message = user_message(error)
        if message is not None:
            record.msg, record.args = f"{record.getMessage().strip()} {message}", ()
            record.exc_info = record.exc_text = None
        return True


def _debugging() -> bool:
    return os.getenv("REFBN_DEBUG", "0") not in ("", "0")


def user_message(error: BaseException) -> Optional[str]:
    """Returns the line to show for an error that the user can correct, or None for other errors.

    Errors of worker processes, a full disk, a path that is too long, and a lost connection to
    another process also have a line. With REFBN_DEBUG=1 in the environment no error has one.
    """
    if _debugging():
        return None
    # Worker processes (data loader, launch) put the remote traceback into the message.
    remote = re.findall(r"^(?:refbn_d2[\w.]*)?\bU\w+Error: (.*)$", str(error), flags=re.MULTILINE)
    if remote:
        return _shortened(remote[-1])
    # FloatingPointError: the loss is not finite. It is logged before Trainer raises a UserError.
    if isinstance(error, (UserError, FloatingPointError)):
        return _shortened(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "a file of the run"
        return f"{where} cannot be written: {error.strerror}; make room, start again with --resume"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{error.filename}: {error.strerror}; choose a shorter one"
    if type(error).__name__ == "DistBackendError" or "gloo/transport" in str(error):
        return (
            "the connection to another process of the run is lost, because that process has ended; "
            "look for its own error message, and start again with --resume"
        )
    return None


def _shortened(line: str) -> str:
    """Removes the middle of a very long line; the end is kept, because the remedy is there."""
    return line if len(line) <= 800 else f"{line[:500]} [...] {line[-250:]}"


def quiet_user_errors() -> None:
    """Prevents detectron2's training loop from logging the traceback of a user's error."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_NoTraceback())


def one_line_errors(main: Callable) -> Callable:
    """Makes the command ``main`` report a user's error in one line and exit with status 1.

    With REFBN_DEBUG=1 in the environment the error is raised as it is.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        quiet_user_errors()
        try:
            return main(*args, **kwargs)
        except Exception as e:
            message = user_message(e)
            if message is None:
                raise
            print(f"error: {_shortened(message)}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            sys.exit(130)

    return wrapped
