"""Errors about data name the data set or the file."""

import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError, read_image
from detectron2.utils.file_io import PathManager
from PIL import Image

from refbn_d2.data.errors import dataset_errors, image_errors, naming_the_file
from refbn_d2.engine.evaluators import build_evaluator
from refbn_d2.errors import UserError
from refbn_d2.io.images import read_rgb


@pytest.fixture
def name():
    DatasetCatalog.register("some_set", lambda: [])
    MetadataCatalog.get("some_set").json_file = "there/some.json"
    yield "some_set"
    DatasetCatalog.remove("some_set")
    MetadataCatalog.remove("some_set")


@pytest.mark.parametrize(
    "error, expected",
    [
        (
            FileNotFoundError(2, "no", "a/b.json"),
            "some_set: a/b.json does not exist; set DETECTRON",
        ),
    ],
)
def test_loading_errors(name, error, expected):
    with pytest.raises(UserError, match=expected), dataset_errors([name]):
        raise error


def test_an_unknown_data_set():
    with pytest.raises(UserError, match="unknown data set 'nowhere'"), dataset_errors(["nowhere"]):
        pass


def test_a_user_error_and_a_bug_pass(name):
    """What a programmer did wrong in code that runs meanwhile keeps its type and traceback."""
    bugs = [t("bug") for t in (RuntimeError, KeyError, AttributeError, TypeError, AssertionError)]
    for error in (UserError("mine"), *bugs):
        with pytest.raises(type(error)) as e, dataset_errors([name]):
            raise error
        assert e.value is error


@pytest.fixture
def mapper():
    """detectron2's mapper, as workers get it."""
    return pickle.loads(pickle.dumps(naming_the_file(DatasetMapper(get_cfg(), True))))


@pytest.fixture
def scene(tmp_path):
    """An image of 40 x 30 pixels with a semantic segmentation."""
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "a.jpg")
    Image.new("L", (40, 30)).save(tmp_path / "labels.png")
    return {
        "file_name": str(tmp_path / "a.jpg"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "width": 40,
        "height": 30,
    }


def test_a_file_is_opened_once(scene, mapper, monkeypatch):
    opened = []
    upstream = PathManager.open
    monkeypatch.setattr(
        PathManager, "open", lambda path, mode: opened.append(path) or upstream(path, mode)
    )
    pillows = Image.open
    assert mapper(scene)["image"].shape[0] == 3
    assert opened == [scene["file_name"], scene["sem_seg_file_name"]]
    assert Image.open is pillows


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"


def _png(size, mode="L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("key", ["file_name", "sem_seg_file_name"])
@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "{} does not exist"),
        (EPS, "{} cannot be read: it is no JPEG, PNG, .*PPM file"),
        (_png((40, 30))[:-20], "{} cannot be read: "),
        (_png((40, 31)), "{} has 40 x 31 pixels, not the 40 x 30 of its annotations"),
        (_png((40, 30), "I;16"), "{} has more than 8 bits a pixel"),
    ],
    ids=["missing", "foreign", "cut off", "another size", "16 bit"],
)
def test_the_image_that_cannot_be_used_is_named(scene, mapper, key, content, expected):
    """The image or its segmentation, whichever it is."""
    path = Path(scene[key])
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^image {expected.format(re.escape(str(path)))}"):
        mapper(scene)


def test_a_folder_in_the_place_of_an_image(scene, mapper, tmp_path):
    with pytest.raises(UserError, match="^image .* cannot be read: Is a directory"):
        mapper({**scene, "file_name": str(tmp_path)})


def test_a_size_that_is_found_later(scene):
    def fail(d):
        raise SizeMismatchError("other size")

    with pytest.raises(UserError, match="a.jpg: other size"):
        naming_the_file(fail)(scene)


@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError, OSError, SyntaxError])
def test_a_bug_in_a_mapper_is_not_the_images_fault(error, scene):
    def fail(d):
        Image.open(d["file_name"])
        raise error("bug")

    with pytest.raises(error, match="^bug$"):
        naming_the_file(fail)(scene)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_is_turned_as_its_exif_data_say(compression, tmp_path):
    """Recent versions of Pillow turn a TIFF when they decode it; detectron2 would turn it again."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path = tmp_path / "a.tif"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(path, exif=exif, compression=compression)
    with image_errors():
        read = read_image(str(path), format="RGB")
    assert np.array_equal(read_rgb(path, (40, 30)), read)
    assert np.array_equal(read, np.rot90(pixels, -1))


def test_a_segmentation_that_cannot_be_evaluated_is_named(scene):
    """It is not the mapper that reads it."""
    DatasetCatalog.register("scenes", lambda: [scene])
    MetadataCatalog.get("scenes").set(
        evaluator_type="sem_seg", stuff_classes=["sky"], ignore_label=255
    )
    try:
        evaluator = build_evaluator(get_cfg(), "scenes", "")
        evaluator.reset()
        found = [{"sem_seg": torch.zeros(1, 30, 40)}]
        evaluator.process([scene], found)
        Path(scene["sem_seg_file_name"]).write_bytes(EPS)
        with pytest.raises(UserError, match="labels.png cannot be read: it is no JPEG"):
            evaluator.process([scene], found)
    finally:
        DatasetCatalog.remove("scenes")
        MetadataCatalog.remove("scenes")
