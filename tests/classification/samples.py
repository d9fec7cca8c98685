"""A few images in the files of MNIST and in the layout of ImageNet."""

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_mnist(root: Path, num_train: int = 256, num_test: int = 40) -> Path:
    """Squares of which the place tells the class; returns ``root``/mnist."""
    folder = root / "mnist"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", num_train), ("t10k", num_test)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = rng.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels):
            row, column = divmod(int(label), 4)
            image[9 * row : 9 * row + 8, 7 * column : 7 * column + 6] += 150
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


def write_image_folders(root: Path, classes=("ant", "bee"), per_class: int = 3) -> Path:
    """Images of one colour per class, in a shape that every crop changes."""
    for split in ("train", "val"):
        for k, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(per_class):
                color = (40 * k + 10, 200, 90 - 20 * k)
                Image.new("RGB", (300 + n, 260), color).save(folder / f"{n}.jpg", quality=95)
    return root
