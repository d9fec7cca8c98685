"""Passes a bad file to the functions that the tools call for it."""

import collections
import contextlib
import io
import re
import resource
import signal
from pathlib import Path
from typing import Callable, Optional

from hypothesis import given, settings
from hypothesis import strategies as st

from refbn_d2.errors import one_line_errors

SECONDS = 60  # a guard against hanging, far above what anything takes
MEMORY = 2 << 30  # bytes beyond what the process has; real files need a hundredth of it

# How many files of each kind were fed.
COUNT: collections.Counter = collections.Counter()


def feed(kind: str, name: str, command: Callable[[], object]) -> Optional[str]:
    """Runs ``command`` as the tools run it, on a file called ``name``.

    Returns:
        The line that it ended with, or None if it succeeded. Anything else (a traceback, more
        memory or time than any file should take) raises.
    """
    COUNT[kind] += 1
    errors = io.StringIO()
    with _limits(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
        try:
            one_line_errors(command)()
            return None
        except SystemExit as e:
            assert e.code == 1
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in errors.getvalue(), errors.getvalue()
    assert name in lines[0] and len(lines[0]) < 1000, lines[0]
    assert not re.search("memory|alloc", lines[0], re.IGNORECASE), lines[0]
    return lines[0]


def feed_damaged(data: bytes, feed_one: Callable[[bytes], object]) -> None:
    """Calls ``feed_one`` with copies of ``data`` in which some bytes are others."""
    places, others = st.integers(0, len(data) - 1), st.binary(max_size=4)

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(places, others), min_size=1))
    def damaged(changes):
        changed = bytearray(data)
        for place, value in changes:
            changed[place : place + len(value)] = value
        feed_one(bytes(changed))

    damaged()


@contextlib.contextmanager
def _limits():
    def hangs(*_):
        raise AssertionError(f"not finished after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, hangs)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
