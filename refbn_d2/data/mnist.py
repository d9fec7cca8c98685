"""MNIST, read from its four published files in $DETECTRON2_DATASETS/mnist."""

import functools
import gzip
import os
import struct
import zlib
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import torch
import torchvision
from detectron2.utils import comm

from ..errors import UserError
from .catalog import register_once

__all__ = ["MnistMapper", "read_idx", "register"]

_PARTS = {"train": "train", "test": "t10k"}
_PADDING = ((0, 0), (2, 2), (2, 2))  # LeNet-5 and VGG-16 take 32 x 32


class MnistMapper:
    """Dataset mapper that converts the image to a tensor, uint8 (1, 32, 32)."""

    def __init__(self, is_train: bool):
        pass

    def __call__(self, d: Dict[str, Any]) -> Dict[str, Any]:
        return {**d, "image": torch.from_numpy(d["image"])[None]}


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped idx file of bytes.

    Args:
        path: Path of the .gz file.

    Returns:
        uint8 array with the shape in the file's header.

    Raises:
        UserError: If the file is damaged or is not an idx file of bytes.
        FileNotFoundError: If the file does not exist.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: damaged, download it again: {e}") from None
    # Header: two zeros, the type (8: bytes), the number of dimensions, each dimension in 4 bytes.
    num_dims = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    header = 4 + 4 * num_dims
    if num_dims == 0 or len(content) < header:
        raise UserError(f"{path}: not an idx file of bytes, as MNIST's are; download it again")
    shape = struct.unpack(f">{num_dims}I", content[4:header])
    if len(content) - header != int(np.prod(shape)):
        raise UserError(
            f"{path}: has {len(content) - header} bytes of data, not {int(np.prod(shape))} as its "
            "header says; download it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _folder() -> Path:
    """Returns the folder with the files; downloads them if there is none."""
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets"))
    downloaded = root / "MNIST" / "raw"  # torchvision's choice
    for folder in (root / "mnist", downloaded):
        if folder.is_dir():
            return folder
    if comm.is_main_process():
        try:
            torchvision.datasets.MNIST(root, download=True)
        except (OSError, RuntimeError) as e:
            raise UserError(
                f"MNIST: {root / 'mnist'} does not exist and the download failed ({e}); put the "
                "four .gz files there, or set DETECTRON2_DATASETS to the folder above"
            ) from None
    comm.synchronize()
    return downloaded


def _load(split: str) -> List[Dict[str, Any]]:
    folder = _folder()
    files = [
        folder / f"{_PARTS[split]}-{content}-ubyte.gz" for content in ("images-idx3", "labels-idx1")
    ]
    images, labels = map(read_idx, files)
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max() > 9:
        raise UserError(
            f"{files[0]} and {files[1]} do not belong together: images {images.shape}, labels "
            f"{labels.shape} up to {labels.max()}; download them again"
        )
    samples = zip(np.pad(images, _PADDING), labels)
    return [{"image_id": k, "label": int(y), "image": x} for k, (x, y) in enumerate(samples)]


def register() -> None:
    """Registers mnist_train and mnist_test. Their files are read when they are first used."""
    for split in _PARTS:
        name = f"mnist_{split}"
        load = functools.partial(_load, split)
        register_once(name, load, evaluator_type="classification", mapper=MnistMapper)
