"""Mistakes of a user: reported on one line, without a traceback.

With REFBN_DEBUG=1 in the environment every error keeps its traceback.
"""

import errno
import functools
import logging
import os
import re
import sys
from typing import Callable, Optional

__all__ = ["UserError", "one_line_errors", "quiet_user_errors"]


class UserError(Exception):
    """A mistake that the user can mend; the message names the thing, the value and the remedy."""


class _NoTraceback(logging.Filter):
    """Puts the line for the user in place of the traceback (TrainerBase logs every exception)."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = None
        if record.exc_info and not _debugging():
            message = _user_message(record.exc_info[1])
        if message is not None:
            record.msg, record.args = f"{record.getMessage().strip()} {message}", ()
            record.exc_info = record.exc_text = None
        return True


def _debugging() -> bool:
    return os.getenv("REFBN_DEBUG", "0") not in ("", "0")


def _user_message(error: BaseException) -> Optional[str]:
    """The line to show if ``error`` is a user's mistake, also one of a worker process; or None.

    So are a full disk, and the end of another process, which the survivors only hear of.
    """
    # Worker processes (data loader, launch) put the remote traceback into the message.
    remote = re.findall(r"^(?:refbn_d2[\w.]*)?\bU\w+Error: (.*)$", str(error), flags=re.MULTILINE)
    if remote:
        return _shortened(remote[-1])
    # A loss that is not finite: logged before it becomes a UserError.
    if isinstance(error, (UserError, FloatingPointError)):
        return _shortened(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "a file of the run"
        return f"{where} cannot be written: {error.strerror}; make room, start again with --resume"
    if type(error).__name__ == "DistBackendError" or "gloo/transport" in str(error):
        return (
            "the connection to another process of the run is lost: it has ended, and says why if "
            "it could; start again with --resume"
        )
    return None


def _shortened(line: str) -> str:
    """Without its middle, if a value in it is very long; the remedy is at the end."""
    return line if len(line) <= 800 else f"{line[:500]} [...] {line[-250:]}"


def quiet_user_errors() -> None:
    """Keeps detectron2's training loop from logging the traceback of a user's mistake."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_NoTraceback())


def one_line_errors(main: Callable) -> Callable:
    """Makes the command ``main`` end a user's mistake with one line and exit status 1.

    With REFBN_DEBUG=1 in the environment the error is raised as it is.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        quiet_user_errors()
        try:
            return main(*args, **kwargs)
        except Exception as e:
            message = _user_message(e)
            if message is None or _debugging():
                raise
            print(f"error: {_shortened(message)}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            sys.exit(130)

    return wrapped
