"""Valid boxes and masks; bad data sets are in tests/corpus."""

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from refbn_d2.data.annotations import check_dicts
from refbn_d2.errors import UserError
from refbn_d2.io.coco import box_problem, is_int, is_number, masks_problem

SIZE = (40, 50)
MASK = np.zeros(SIZE, dtype="uint8", order="F")
MASK[5:20, 7:30] = 1
RLE = mask_util.encode(MASK)
TEXT = {**RLE, "counts": RLE["counts"].decode()}
RUNS = {"size": list(SIZE), "counts": [7 * 40, 40, 48 * 40 - 40 * 6]}
POLYGON = [[5, 5, 20, 5, 20.5, 20]]


@pytest.mark.parametrize("value", [True, None, "1", [1], float("nan"), float("inf"), 10**400])
def test_no_number(value):
    assert not is_number(value) and (not is_int(value) or value == 10**400)


def test_good_boxes_and_masks():
    for box in ([0, 0, 1, 1], [-3.5, 1e4, 0, 0]):
        assert box_problem(box) == ""
    masks = [RLE, TEXT, {**RUNS, "counts": [7 * 40, 43 * 40]}, POLYGON, [[1, 2, 3, 4]]]
    assert masks_problem(masks, [SIZE] * len(masks)) is None


@pytest.mark.parametrize("bad", [{**TEXT, "size": [50, 40]}, {**RUNS, "counts": [1]}, [[1, 2]], 3])
def test_the_bad_mask_among_good_ones_is_named(bad):
    index, sentence = masks_problem([TEXT, POLYGON, bad, RLE], [SIZE] * 4)
    assert index == 2 and sentence


def test_an_outline_is_as_long_as_its_strokes():
    """Many points close together are fine, as many far apart are not."""
    short, long = [1.0, 1.0, 3.0, 3.0] * 10_000, [0.0, 0.0, 2000.0, 2000.0] * 10_000
    far = short[:-2] + [2000.0, 2000.0]
    assert masks_problem([[short], [far]], [SIZE] * 2) is None
    assert masks_problem([[long]], [SIZE])[1].endswith("has an outline longer than 10000000 pixels")


def test_dicts():
    good = {"file_name": "a.jpg", "height": 40, "width": 50}
    box = {"bbox": [1, 1, 5, 5], "bbox_mode": BoxMode.XYWH_ABS}
    corners = {"bbox": [9, 9, 5, 5], "bbox_mode": BoxMode.XYXY_ABS}
    check_dicts([good, {**good, "annotations": [box, corners]}], "x.json")
    bad = {**good, "annotations": [box, {**box, "bbox": [1, 1, -5, 5]}]}
    with pytest.raises(UserError, match="x.json: image a.jpg, annotation 1: bbox .* negative"):
        check_dicts([good, bad], "x.json")
    with pytest.raises(UserError, match="a.jpg: height and width"):
        check_dicts([{**good, "height": 0}], "x.json")


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_annotations_pass(real_data, split):
    file = str(real_data / f"coco/annotations/instances_{split}2017.json")
    dicts = load_coco_json(file, "", None)
    assert len(dicts) > 200
    check_dicts(dicts, file)
