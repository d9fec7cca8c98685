"""A written file is the old one or the new one, and never incomplete."""

import os
from unittest import mock

import pytest

from refbn_d2.io.atomic import PARTIAL, atomic_write


def test_takes_the_place_of_the_old_file_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(str(path)) as f:
        f.write("new")
        f.flush()
        assert path.read_text() == "old"
        assert (tmp_path / f"file{PARTIAL}").read_text() == "new"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_write(str(path), "wb") as f:
        f.write(b"new")
        raise KeyError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_it_has_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    order = mock.Mock()
    with mock.patch.object(os, "fsync", lambda n: order(os.readlink(f"/proc/self/fd/{n}"))):
        with mock.patch.object(os, "replace", lambda a, b: order("replace")):
            with atomic_write("file") as f:
                f.write("new")
    steps = [call.args[0] for call in order.call_args_list]
    assert steps == [str(tmp_path / f"file{PARTIAL}"), "replace", str(tmp_path)]
