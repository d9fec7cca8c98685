"""COCO annotations: what training and evaluation do with a bad file, before the first step."""

import copy
import itertools
import json
import math

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from tests.corpus.harness import feed

NAN, INF = math.nan, math.inf
DROP = object()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("annotations"))


@pytest.fixture(scope="module")
def content(folder):
    return json.loads((folder / "coco/annotations/instances_val2017.json").read_text())


@pytest.fixture(scope="module")
def cfg(folder, tmp_path_factory):
    sets = {"DATASETS__TRAIN": "('bad_val',)", "DATASETS__TEST": "('bad_val',)"}
    output = tmp_path_factory.mktemp("output")
    return load_config(tiny.CONFIG, tiny.opts(OUTPUT_DIR=output, SOLVER__IMS_PER_BATCH=1, **sets))


def use(cfg) -> None:
    """Does what training and evaluation do with a data set, without the model."""
    tiny_trainer = Trainer.__new__(Trainer)
    tiny_trainer._check_evaluation(cfg)
    list(itertools.islice(Trainer.build_train_loader(cfg), 4))
    list(Trainer.build_test_loader(cfg, "bad_val"))


def feed_text(folder, cfg, text, image=None):
    path = folder / "coco/annotations/instances_val2017.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    tiny.register(folder, "bad")
    kind, name = ("images", image) if image else ("annotations", path.name)
    return feed(kind, name, lambda: use(cfg))


def changed(content, path, value):
    content = copy.deepcopy(content)
    where = content
    for key in path[:-1]:
        where = where[key]
    if value is DROP:
        del where[path[-1]]
    else:
        where[path[-1]] = value
    return content


A, B, C, P, S = "annotations", "bbox", "categories", "images", "segmentation"

# Name -> (place, value, a word of the error; None: works as documented).
CHANGES = {
    "no images": ((P,), DROP, "no list of images"),
    "images are nothing": ((P,), None, "no list of images"),
    "images are empty": ((P,), [], "has no images"),
    "images are a dict": ((P,), {"id": 1}, "no list of images"),
    "images are numbers": ((P,), [1, 2], "is 1, no object"),
    "images are text": ((P,), "images", "no list of images"),
    "no annotations": ((A,), DROP, "none of the 3 images has an object"),
    "annotations are nothing": ((A,), None, "no list of annotations"),
    "annotations are a number": ((A,), 7, "no list of annotations"),
    "annotations are numbers": ((A,), [7], "annotations[0] is 7, no object"),
    "annotation is nothing": ((A, 0), None, "annotations[0] is None, no object"),
    "annotation is a list": ((A, 0), [1], "annotations[0] is [1], no object"),
    "no categories": ((C,), DROP, "no list of categories"),
    "categories are empty": ((C,), [], "categor"),
    "categories are names": ((C,), ["person"], "categories[0] is 'person', no object"),
    "category without an id": ((C, 0, "id"), DROP, "categories[0] has no integer id"),
    "category without a name": ((C, 0, "name"), DROP, "has no name"),
    "category ids of two types": ((C, 0, "id"), "1", "categories[0] has no integer id"),
    "category id of another": ((C, 0, "id"), 2, "id 2 occurs twice in categories"),
    "image without an id": ((P, 0, "id"), DROP, "images[0] has no integer id"),
    "image id is text": ((P, 0, "id"), "one", "integer id"),
    "image id is a list": ((P, 0, "id"), [1], "images[0] has no integer id"),
    "image id of another": ((P, 0, "id"), 2, "id 2 occurs twice in images"),
    "image without a name": ((P, 0, "file_name"), DROP, "has no file_name"),
    "image name is a number": ((P, 0, "file_name"), 5, "file_name"),
    "image name with a zero byte": ((P, 0, "file_name"), "a\0.jpg", "a\\x00.jpg"),
    "image name with half a pair": ((P, 0, "file_name"), "a\ud800.jpg", "a\\ud800.jpg"),
    "image name is nothing": ((P, 0, "file_name"), None, "file_name"),
    "image without a height": ((P, 0, "height"), DROP, "image 1 has no height"),
    "height is nothing": ((P, 0, "height"), None, "image 1 has no height"),
    "height is 0": ((P, 0, "height"), 0, "height 0 is not a whole number"),
    "height is negative": ((P, 0, "height"), -64, "height -64 is not a whole number"),
    "height is text": ((P, 0, "height"), "64", "height '64' is not a whole number"),
    "height is NaN": ((P, 0, "height"), NAN, "height nan is not a whole number"),
    "height is a fraction": ((P, 0, "height"), 64.5, "height 64.5 is not a whole number"),
    "width is true": ((P, 0, "width"), True, "width True is not a whole number"),
    "width is a list": ((P, 0, "width"), [80], "width [80] is not a whole number"),
    "annotation without an id": ((A, 0, "id"), DROP, "annotations[0] has no integer id"),
    "annotation id of another": ((A, 0, "id"), 2, "occurs twice"),
    "annotation id is a list": ((A, 0, "id"), [1], "annotations[0] has no integer id"),
    "annotation id is its image's and back": (
        (A, 0, "id"),
        {"image_id": 1},
        "annotations[0] has no integer id",
    ),
    "annotation of no image": ((A, 0, "image_id"), DROP, "has no image_id"),
    "annotation of an unknown image": ((A, 0, "image_id"), 999, "unknown image 999"),
    "annotation of itself": ((A, 0, "image_id"), [[1]], "unknown image [[1]]"),
    "annotation without a category": ((A, 0, "category_id"), DROP, "has no category_id"),
    "unknown category": ((A, 0, "category_id"), 999, "unknown category 999"),
    "negative category": ((A, 0, "category_id"), -1, "unknown category -1"),
    "category is text": ((A, 0, "category_id"), "person", "unknown category person"),
    "category is a list": ((A, 0, "category_id"), [1], "unknown category [1]"),
    "ignore": ((A, 0, "ignore"), 1, "ignore"),
    "no box": ((A, 0, B), DROP, "bbox"),
    "box is nothing": ((A, 0, B), None, "bbox None"),
    "box is empty": ((A, 0, B), [], "bbox"),
    "box of three": ((A, 0, B), [1, 2, 3], "bbox"),
    "box of five": ((A, 0, B), [1, 2, 3, 4, 5], "bbox"),
    "box is a number": ((A, 0, B), 3, "bbox 3"),
    "box is text": ((A, 0, B), "1 2 3 4", "bbox"),
    "box of texts": ((A, 0, B), ["1", "2", "3", "4"], "bbox"),
    "box of lists": ((A, 0, B), [[1], [2], [3], [4]], "bbox"),
    "box is a dict": ((A, 0, B), {"x": 1}, "bbox"),
    "box with NaN": ((A, 0, B), [1, NAN, 3, 4], "bbox"),
    "box with infinity": ((A, 0, B), [1, 2, INF, 4], "bbox"),
    "box with nothing": ((A, 0, B), [1, 2, None, 4], "bbox"),
    "box of negative width": ((A, 0, B), [10, 10, -5, 5], "negative width"),
    "box of negative height": ((A, 0, B), [10, 10, 5, -5], "negative width"),
    "box of no size": ((A, 0, B), [10, 10, 0, 0], None),
    "box beyond the image": ((A, 0, B), [-10, -10, 500, 500], None),
    "box far beyond": ((A, 0, B), [1e30, 1e30, 1, 1], None),
    "box of huge size": ((A, 0, B), [0, 0, 1e300, 1e300], None),
    "no area": ((A, 0, "area"), DROP, "area"),
    "negative area": ((A, 0, "area"), -3, "area"),
    "area is NaN": ((A, 0, "area"), NAN, "area"),
    "area is text": ((A, 0, "area"), "big", "area"),
    "crowd is text": ((A, 0, "iscrowd"), "yes", "iscrowd yes"),
    "crowd is nothing": ((A, 0, "iscrowd"), None, "iscrowd None"),
    "crowd is 7": ((A, 0, "iscrowd"), 7, "iscrowd"),
    "crowd is a list": ((A, 0, "iscrowd"), [0], "iscrowd [0]"),
    "mask is empty": ((A, 0, S), [], "without a mask"),
    "mask is text": ((A, 0, S), "polygon", "segmentation 'polygon'"),
    "mask is a number": ((A, 0, S), 4, "segmentation 4"),
    "mask of numbers": ((A, 0, S), [1, 2, 3, 4, 5, 6], "list of polygons"),
    "mask of texts": ((A, 0, S), ["1, 2, 3, 4, 5, 6"], "list of polygons"),
    "mask of dicts": ((A, 0, S), [{"x": 1}], "list of polygons"),
    "empty polygon": ((A, 0, S), [[]], "polygon"),
    "polygon of a point": ((A, 0, S), [[1, 2]], "polygon"),
    "polygon of odd length": ((A, 0, S), [[1, 2, 3, 4, 5, 6, 7]], "polygon"),
    "polygon of points": ((A, 0, S), [[[1, 2], [3, 4], [5, 6], [7, 8], [9, 9], [1, 1]]], "finite"),
    "polygon of texts": ((A, 0, S), [["1", "2", "3", "4", "5", "6"]], "finite"),
    "polygon with NaN": ((A, 0, S), [[1, 2, NAN, 4, 5, 6]], "finite"),
    "polygon with infinity": ((A, 0, S), [[1, 2, INF, 4, 5, 6]], "finite"),
    "polygon with infinities": ((A, 0, S), [[1, INF, -INF, 4, 5, 6]], "finite"),
    "polygon with nothing": ((A, 0, S), [[1, 2, None, 4, 5, 6]], "finite"),
    "polygon beyond the image": ((A, 0, S), [[-50, -50, 500, -50, 500, 500]], None),
    "polygon of a gigapixel": ((A, 0, S), [[0, 0, 1e9, 0, 1e9, 1e9]], "outline"),
    "polygon beyond all numbers": ((A, 0, S), [[0, 0, 1e308, 0, 1e308, 1e308]], "finite"),
    "polygon of 100,000 points": ((A, 0, S), [[1.5, 2.5, 60, 70] * 25_000], None),
    "polygon of 100,000 long strokes": ((A, 0, S), [[0, 0, 9000, 9000] * 25_000], "outline"),
    "10,000 polygons": ((A, 0, S), [[1, 1, 9, 1, 9, 9]] * 10_000, None),
    "digits without end": ((A, 0, S), [[1, 2, 10**400, 4, 5, 6]], "finite"),
    "RLE without counts": ((A, 0, S), {"size": [64, 80]}, "neither a list of polygons nor"),
    "RLE without a size": ((A, 0, S), {"counts": [5120]}, "RLE of size None"),
    "RLE of another size": ((A, 0, S), {"size": [10, 10], "counts": [100]}, "RLE of size"),
    "RLE of a gigapixel": ((A, 0, S), {"size": [10**5, 10**5], "counts": [10**10]}, "RLE of size"),
    "RLE of negative size": ((A, 0, S), {"size": [-64, -80], "counts": [5120]}, "RLE of size"),
    "RLE whose size is text": ((A, 0, S), {"size": "ab", "counts": [5120]}, "RLE of size"),
    "RLE that is short": ((A, 0, S), {"size": [64, 80], "counts": [10, 20]}, "do not add up"),
    "RLE that is long": ((A, 0, S), {"size": [64, 80], "counts": [10, 10**6]}, "do not add up"),
    "RLE of negative runs": ((A, 0, S), {"size": [64, 80], "counts": [-10, 5130]}, "do not add up"),
    "RLE of fractions": ((A, 0, S), {"size": [64, 80], "counts": [0.5, 5119.5]}, "do not add up"),
    "RLE of texts": ((A, 0, S), {"size": [64, 80], "counts": ["5120"]}, "do not add up"),
    "RLE whose counts are a number": (
        (A, 0, S),
        {"size": [64, 80], "counts": 5120},
        "neither a list",
    ),
    "RLE whose counts are nothing": (
        (A, 0, S),
        {"size": [64, 80], "counts": None},
        "neither a list",
    ),
    "RLE whose counts are empty": ((A, 0, S), {"size": [64, 80], "counts": ""}, "RLE"),
    "RLE with odd characters": ((A, 0, S), {"size": [64, 80], "counts": "~~~~"}, "RLE"),
    "RLE cut off": ((A, 0, S), {"size": [64, 80], "counts": "oo"}, "RLE"),
    "RLE not of ASCII": ((A, 0, S), {"size": [64, 80], "counts": "é日"}, "RLE"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed(case, folder, cfg, content):
    path, value, word = CHANGES[case]
    line = feed_text(folder, cfg, json.dumps(changed(content, path, value)))
    assert line is None if word is None else word in line


def test_the_unchanged_file_works(folder, cfg, content):
    assert feed_text(folder, cfg, json.dumps(content)) is None


TEXTS = {
    "empty": "",
    "blank": " \n\n",
    "number": "3",
    "text": '"images"',
    "list": "[]",
    "nothing": "null",
    "not JSON": "images: []",
    "YAML tag": "!!python/object/apply:os.mkdir ['ran']",
    "deep": "[" * 100_000,
    "deep and closed": '{"images":' + "[" * 50_000 + "]" * 50_000 + "}",
    "endless number": '{"images": [{"id": ' + "9" * 5000 + "}]}",
    "binary": bytes(range(256)),
    "zeros": bytes(500),
    "UTF-16": '{"images": []}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "two documents": "{}{}",
    "comment": '{} // "images"',
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(case, folder, cfg):
    assert feed_text(folder, cfg, TEXTS[case]) is not None


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
def test_truncated(share, folder, cfg, content):
    text = json.dumps(content)
    assert feed_text(folder, cfg, text[: int(len(text) * share)]) is not None


def test_missing(folder, cfg):
    feed_text(folder, cfg, "{}")
    (folder / "coco/annotations/instances_val2017.json").unlink()
    assert "does not exist" in feed("annotations", "instances_val2017.json", lambda: use(cfg))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([1, 2, 64, 80]),
    lambda inner: (
        st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=9,
)
FIELDS = [
    *((P, 0, k) for k in ("id", "file_name", "height", "width")),
    *((A, 0, k) for k in ("id", "image_id", "category_id", B, "area", "iscrowd", S)),
    *((A, 0, B, n) for n in range(4)),
    *((A, 0, S, 0), (A, 0, S, 0, 3), (C, 0, "id"), (C, 0, "name"), (P, 0), (A, 0), (C, 0)),
]


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(place=st.sampled_from(FIELDS), value=anything)
def test_random_values(folder, cfg, content, place, value):
    # Only the image shows that a size is wrong; then the error names the image.
    shared = "val2017" if place[-1] in ("height", "width") else None
    feed_text(folder, cfg, json.dumps(changed(content, place, value)), shared)
