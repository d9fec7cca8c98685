"""MNIST's files: they are read correctly, and errors name damaged ones."""

import gzip

import numpy as np
import pytest
import torch
import torchvision
from detectron2.data import DatasetCatalog

from refbn_d2.data import mnist
from refbn_d2.data.mnist import MnistMapper, read_idx
from refbn_d2.errors import UserError
from tests.classification.samples import write_idx, write_mnist

mnist.register()


def test_the_real_files(real_data, monkeypatch):
    """Images a class and the mean pixel, as published; the padding is all around."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(real_data))
    dicts = DatasetCatalog.get("mnist_train")
    counts = np.bincount([d["label"] for d in dicts])
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    total = sum(int(d["image"].sum()) for d in dicts)
    assert total / (60000 * 784 * 255) == pytest.approx(0.1306604762738429, rel=1e-12)
    assert len(DatasetCatalog.get("mnist_test")) == 10000
    sample = MnistMapper(True)(dicts[7])
    assert sample["image"].shape == (1, 32, 32) and sample["image"].dtype == torch.uint8
    border = sample["image"].clone()
    border[:, 2:-2, 2:-2] = 0
    assert border.sum() == 0 and sample["label"] == dicts[7]["label"] == 3


def test_torchvision_reads_the_same(tmp_path, monkeypatch):
    """Its own download, in its own folder."""
    folder = write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    raw.parent.mkdir()
    folder.rename(raw)
    for file in list(raw.iterdir()):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    theirs, ours = (
        torchvision.datasets.MNIST(tmp_path, train=False),
        DatasetCatalog.get("mnist_test"),
    )
    assert [d["label"] for d in ours] == theirs.targets.tolist()
    images = np.stack([d["image"] for d in ours])
    assert np.array_equal(images[:, 2:-2, 2:-2], theirs.data.numpy())


def test_without_files_torchvision_downloads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    asked = []

    def fail(root, download):
        asked.append((root, download))
        raise RuntimeError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    with pytest.raises(UserError, match="mnist does not exist and the download failed .no route"):
        DatasetCatalog.get("mnist_train")
    assert asked == [(tmp_path, True)]


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda b: b[: len(b) // 2], "damaged"),
        (lambda b: b[:200] + b"\0" * 40 + b[240:], "damaged"),
        (lambda b: b"<html>not here</html>", "damaged.*Not a gzipped file"),
        (lambda b: gzip.compress(b"\0\0"), "not an idx file"),
        (lambda b: gzip.compress(b"\0\0\x0d\1\0\0\0\1" + b"\0" * 4), "not an idx file"),
        (lambda b: gzip.compress(gzip.decompress(b)[:-7]), "has 1009 bytes of data, not 1016"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, expected):
    path = tmp_path / "some-idx3-ubyte.gz"
    write_idx(path, np.random.default_rng(0).integers(0, 256, 1016, dtype=np.uint8))
    assert read_idx(path).shape == (1016,)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"some-idx3-ubyte.gz: .*{expected}"):
        read_idx(path)


def test_files_that_do_not_belong_together(tmp_path, monkeypatch):
    folder = write_mnist(tmp_path)
    (folder / "t10k-labels-idx1-ubyte.gz").rename(folder / "train-labels-idx1-ubyte.gz")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(UserError, match="do not belong together.*256.*40"):
        DatasetCatalog.get("mnist_train")
