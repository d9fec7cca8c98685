"""One writer per folder: a second one is refused, and a killed one leaves no lock."""

import os
import socket
import subprocess
import sys

import pytest
import tiny

from refbn_d2.errors import UserError
from refbn_d2.io.lock import folder_lock, holder

_HOLD = """
import os, sys, time
from pathlib import Path
from refbn_d2.io.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker that loads images, which outlives its parent
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)],
        env=tiny.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    os.killpg(process.pid, 9)
    process.communicate()


def test_the_refusal_names_the_process_and_ends_with_it(tmp_path, other):
    name = f"process {other.pid} on {socket.gethostname()}"
    with pytest.raises(UserError, match=f"{tmp_path} is in use by {name}"):
        with folder_lock(tmp_path):
            raise AssertionError("two processes have the folder")
    assert holder(tmp_path) == name
    other.kill()
    other.wait()
    # Although a process that it started lives on, and the file still names it.
    assert holder(tmp_path) is None
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_one_after_the_other_and_in_a_new_folder(tmp_path):
    for _ in range(2):
        with folder_lock(tmp_path / "a/b"):
            assert (tmp_path / "a/b").is_dir()
    assert holder(tmp_path / "a/b") is None and holder(tmp_path / "none") is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/out cannot be written: Not a directory"):
        with folder_lock(tmp_path / "file/out"):
            pass
