"""The cache of compiled libraries: it is repaired after any damage."""

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refbn_d2.norms.kernels.library import LibraryError, load_library

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }')
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "refbn_d2"


def _answer(source, cache, compiler="c++"):
    return load_library(source, compiler, ["-fPIC"], cache, lambda library: library.answer)()


def _library(cache):
    (path,) = cache.glob("*.so")
    return path


def test_compiled_once_for_this_user_alone(source, cache):
    assert _answer(source, cache) == 42
    before = _library(cache).stat()
    assert _answer(source, cache) == 42
    assert _library(cache).stat() == before
    assert stat.S_IMODE(cache.stat().st_mode) & 0o077 == 0
    names = {path.name for path in cache.iterdir()}
    assert names == {_library(cache).name, f"{_library(cache).name}.sha256", ".lock"}
    # The checksum is one that others can check, too.
    subprocess.run(["sha256sum", "-c", f"{_library(cache).name}.sha256"], cwd=cache, check=True)


def _fresh(path):
    """Puts a copy in the place of the file, which this process has loaded; returns its content."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return content


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path):
    os.truncate(path, path.stat().st_size // 3)


def _zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def _empty(path):
    path.write_bytes(b"")


def _replace_by_text(path):
    path.write_bytes(b"not a library \xff")


def _replace_by_a_folder(path):
    path.unlink()
    (path / "inner").mkdir(parents=True)


DAMAGE = [
    _truncate,
    _zero,
    _empty,
    _flip_a_bit,
    _replace_by_text,
    _replace_by_a_folder,
    Path.unlink,
]


@pytest.mark.parametrize("which", ["*.so", "*.sha256"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__.strip("_"))
def test_damage_is_mended(source, cache, damage, which):
    assert _answer(source, cache) == 42
    (path,) = cache.glob(which)
    whole = _fresh(path)
    damage(path)
    assert _answer(source, cache) == 42
    assert path.read_bytes() == whole


def test_a_library_of_another_machine_is_compiled_anew(source, cache):
    assert _answer(source, cache) == 42
    path, checksum = _library(cache), cache / f"{_library(cache).name}.sha256"
    path.unlink()
    path.write_bytes(b"\x7fELF of another processor")
    line = subprocess.run(["sha256sum", path.name], cwd=cache, capture_output=True, text=True)
    checksum.write_text(line.stdout)
    assert _answer(source, cache) == 42


def test_another_library_with_its_checksum_is_compiled_anew(source, cache):
    assert _answer(source, cache) == 42
    path, checksum = _library(cache), cache / f"{_library(cache).name}.sha256"
    other = source.with_name("other.cpp")
    other.write_text('extern "C" int question() { return 0; }')
    path.unlink()
    command = ["c++", "-shared", "-fPIC", str(other), "-o", str(path)]
    subprocess.run(command, check=True)
    line = subprocess.run(["sha256sum", path.name], cwd=cache, capture_output=True, text=True)
    checksum.write_text(line.stdout)
    assert _answer(source, cache) == 42


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_not_loaded(source, cache, monkeypatch):
    assert _answer(source, cache) == 42
    os.chown(_library(cache), 12345, -1)
    assert _answer(source, cache) == 42
    assert _library(cache).stat().st_uid == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_folder_of_another_user_is_refused(source, cache):
    cache.mkdir(parents=True)
    os.chown(cache, 12345, -1)
    with pytest.raises(LibraryError, match="other users can write to .*refbn_d2.*chown"):
        _answer(source, cache)


def test_a_folder_that_everybody_can_write_to_is_refused(source, cache):
    assert _answer(source, cache) == 42
    cache.chmod(0o777)
    with pytest.raises(LibraryError, match="other users can write to .*chmod 700"):
        _answer(source, cache)


def test_a_folder_that_is_read_only_is_read(source, cache, monkeypatch):
    assert _answer(source, cache) == 42
    (cache / ".lock").unlink()
    opened = open

    def read_only(path, mode="r", *args, **kwargs):
        if "w" in mode:
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", read_only)
    assert _answer(source, cache) == 42


KILLED = """
import sys
from pathlib import Path
from refbn_d2.norms.kernels.library import load_library
load_library(Path(sys.argv[1]), sys.argv[2], [], Path(sys.argv[3]), lambda library: library)
"""


def test_what_a_killed_compilation_left_is_removed(source, cache, tmp_path):
    compiler = tmp_path / "slow-compiler"
    compiler.write_text("#!/bin/sh\nexec sleep 60\n")
    compiler.chmod(0o755)
    arguments = [str(source), str(compiler), str(cache)]
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", KILLED, *arguments]) as process:
        while not list(cache.glob("tmp*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    (cache / "answer.so.partial").write_text("half a library")
    assert list(cache.glob("tmp*"))
    assert _answer(source, cache) == 42
    assert not list(cache.glob("tmp*")) and not list(cache.glob("*.partial"))


def test_a_broken_source_names_the_error(source, cache):
    source.write_text("int answer( {")
    with pytest.raises(LibraryError, match=r"'c\+\+' failed: .*error"):
        _answer(source, cache)
