"""Image folders: labels of images, crops, and errors for invalid folders."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from refbn_d2.data.image_folder import ImageFolderMapper, register_image_folders
from refbn_d2.errors import UserError
from tests.classification.samples import write_image_folders


@pytest.fixture
def folders(tmp_path):
    root = write_image_folders(tmp_path / "set")
    register_image_folders("insects", str(root))
    yield root
    for split in ("train", "val"):
        DatasetCatalog.remove(f"insects_{split}")
        MetadataCatalog.remove(f"insects_{split}")


def test_labels_are_the_sorted_folders(folders):
    (folders / "train" / "ant" / "notes.txt").write_text("not an image")
    dicts = DatasetCatalog.get("insects_train")
    assert [d["label"] for d in dicts] == [0] * 3 + [1] * 3
    assert all(d["file_name"].split("/")[-2] == ["ant", "bee"][d["label"]] for d in dicts)
    assert [d["image_id"] for d in dicts] == list(range(6))


@pytest.mark.parametrize("is_train", [True, False])
def test_crops(folders, is_train):
    d = DatasetCatalog.get("insects_train")[4]
    out = ImageFolderMapper(is_train)(d)
    assert out["image"].shape == (3, 224, 224) and out["image"].dtype == torch.uint8
    # Channels are in RGB: the classes' colours differ in red and blue.
    assert np.allclose(out["image"].float().mean(dim=(1, 2)), [50, 200, 70], atol=2)


def test_evaluation_takes_the_middle(tmp_path):
    """A frame around the picture is cut off; Pillow's resizing is the measure."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(pixels).resize((64, 48)).resize((400, 300), Image.BICUBIC))
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    out = ImageFolderMapper(False)({"file_name": str(path), "label": 0, "image_id": 0})["image"]
    small = np.asarray(Image.fromarray(pixels).resize((341, 256), Image.BILINEAR), int)
    expected = small[16 : 16 + 224, 58 : 58 + 224].transpose(2, 0, 1)
    assert np.abs(out.numpy().astype(int) - expected).mean() < 1


def test_grey_and_cmyk_files_become_rgb(tmp_path):
    for mode, color in (("L", 90), ("CMYK", (10, 60, 90, 30)), ("RGBA", (9, 99, 199, 255))):
        path = tmp_path / ("x.png" if mode == "RGBA" else f"{mode}.jpg")
        Image.new(mode, (256, 256), color).save(path)
        out = ImageFolderMapper(False)({"file_name": str(path), "label": 0, "image_id": 0})["image"]
        expected = np.asarray(Image.open(path).convert("RGB"), int)[128, 128]
        assert out.shape[0] == 3 and np.allclose(out[:, 100, 100], expected, atol=3), mode


def test_a_corrupt_image_is_an_os_error(folders):
    d = DatasetCatalog.get("insects_val")[0]
    with open(d["file_name"], "rb+") as f:
        f.truncate(900)
    with pytest.raises(OSError, match="truncated"):
        ImageFolderMapper(True)(d)
    with open(d["file_name"], "w") as f:
        f.write("<html>")
    with pytest.raises(OSError):
        ImageFolderMapper(True)(d)
    with pytest.raises(FileNotFoundError):
        ImageFolderMapper(True)({**d, "file_name": "nowhere.jpg"})


def test_what_is_wrong_with_the_folders(folders):
    for file in (folders / "val" / "bee").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="set/val: .*no valid file for the classes bee"):
        DatasetCatalog.get("insects_val")
    (folders / "val" / "bee").rmdir()
    with pytest.raises(UserError, match="set/train and .*set/val differ in 1 classes, e.g. 'bee'"):
        DatasetCatalog.get("insects_train")
    for file in (folders / "val" / "ant").iterdir():
        file.unlink()
    (folders / "val" / "ant").rmdir()
    with pytest.raises(UserError, match="set/val: has no folders; "):
        DatasetCatalog.get("insects_val")
    (folders / "val").rmdir()
    with pytest.raises(FileNotFoundError) as e:
        DatasetCatalog.get("insects_val")
    assert e.value.filename.endswith("set/val")
    assert len(DatasetCatalog.get("insects_train")) == 6  # training alone needs no val
