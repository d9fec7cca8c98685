"""Mistakes of a user: reported on one line, never with a traceback."""

import functools
import logging
import re
import sys
from typing import Callable

__all__ = ["UserError", "one_line_errors", "quiet_user_errors"]


class UserError(Exception):
    """A mistake that the user can mend; the message names the thing, the value and the remedy."""


class _NoTraceback(logging.Filter):
    """Takes the traceback off log records of user errors (TrainerBase logs every exception)."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and _user_message(record.exc_info[1]) is not None:
            record.exc_info = None
            record.exc_text = None
        return True


def _user_message(error: BaseException):
    """The line to show if ``error`` is a user's mistake, also one of a worker process; or None."""
    # Worker processes (data loader, launch) put the remote traceback into the message.
    remote = re.findall(r"^(?:refbn_d2[\w.]*)?\bU\w+Error: (.*)$", str(error), flags=re.MULTILINE)
    if remote:
        return _shortened(remote[-1])
    return _shortened(" ".join(str(error).split())) if isinstance(error, UserError) else None


def _shortened(line: str) -> str:
    """Without its middle, if a value in it is very long; the remedy is at the end."""
    return line if len(line) <= 800 else f"{line[:500]} [...] {line[-250:]}"


def quiet_user_errors() -> None:
    """Keeps detectron2's training loop from logging the traceback of a user's mistake."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_NoTraceback())


def one_line_errors(main: Callable) -> Callable:
    """Makes the command ``main`` end a user's mistake with one line and exit status 1."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        quiet_user_errors()
        try:
            return main(*args, **kwargs)
        except Exception as e:
            message = _user_message(e)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            sys.exit(130)

    return wrapped
