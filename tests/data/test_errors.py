"""Errors about data name the data set or the file."""

import pickle

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image

from refbn_d2.data.errors import dataset_errors, naming_the_file
from refbn_d2.errors import UserError


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


def _fail(d):
    raise d["error"]


@pytest.mark.parametrize(
    "error, expected",
    [
        (FileNotFoundError(), "a.jpg does not exist"),
        (SizeMismatchError("other size"), "a.jpg: other size"),
        (OSError("truncated"), "a.jpg cannot be read: truncated"),
        (SyntaxError("broken PNG"), "a.jpg cannot be read: broken PNG"),
    ],
)
def test_image_errors_name_the_file(error, expected, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.jpg")
    mapper = pickle.loads(pickle.dumps(naming_the_file(_fail)))  # as workers get it
    with pytest.raises(UserError, match=expected):
        mapper({"file_name": str(tmp_path / "a.jpg"), "error": error})


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError):
        naming_the_file(_fail)({"error": ZeroDivisionError()})
