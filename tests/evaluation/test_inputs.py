"""Every kind of bad file gives one line that names the file and the error."""

import copy

import pytest

from refbn_d2.errors import UserError
from refbn_d2.evaluation.ap import evaluate
from refbn_d2.evaluation.inputs import coverage_warnings, load_ground_truth, load_results
from tests.evaluation import generated

IOU_TYPES = ("bbox", "segm")
NAN, INF = float("nan"), float("inf")


def entry(**changes):
    good = {
        "image_id": 1,
        "category_id": 1,
        "bbox": [5.0, 5.0, 20.0, 20.0],
        "score": 0.5,
        "segmentation": generated.rle([5, 5, 20, 20], ellipse=False),
    }
    return {k: v for k, v in {**good, **changes}.items() if v is not ...}


SMALL = generated.rle([5, 5, 20, 20], ellipse=False, height=100, width=100)

BAD_RESULTS = {
    "an object": ({"annotations": []}, "must be a list, this is a dict"),
    "a number": (3, "must be a list"),
    "not an entry": ([7], "entry 0: is a int"),
    "unknown image": ([entry(), entry(image_id=999)], "entry 1: unknown image_id 999"),
    "image as text": ([entry(image_id="1")], "unknown image_id 1, a str"),
    "image as float": ([entry(image_id=1.0)], "unknown image_id 1.0, a float"),
    "category as text": ([entry(category_id="1")], "unknown category_id 1, a str"),
    "no image": ([entry(image_id=...)], "entry 0: has no image_id"),
    "unknown category": ([entry(category_id=99)], "unknown category_id 99"),
    "NaN score": ([entry(score=NAN)], "score nan"),
    "infinite score": ([entry(score=INF)], "score inf"),
    "negative score": ([entry(score=-0.1)], "score -0.1"),
    "score that is a logit": ([entry(score=6.3)], "score 6.3 is not a number from 0 to 1"),
    "no score": ([entry(score=...)], "has no score"),
    "NaN box": ([entry(bbox=[NAN, 1, 2, 3])], "bbox"),
    "short box": ([entry(bbox=[1, 2, 3])], "bbox"),
    "negative width": ([entry(bbox=[1, 2, -3, 4])], "negative width or height"),
    "negative height": ([entry(bbox=[1, 2, 3, -4])], "negative width or height"),
    "no box, no mask": ([entry(bbox=..., segmentation=...)], "neither bbox nor segmentation"),
    "no mask": ([entry(segmentation=...)], "leave segm out"),
    "polygon": ([entry(segmentation=[[1, 1, 5, 1, 5, 5]])], "not a compressed RLE"),
    "RLE of another size": ([entry(segmentation=SMALL)], "RLE of size [100, 100]"),
    "RLE with another size's runs": (
        [entry(), entry(segmentation={**SMALL, "size": [320, 320]})],
        "entry 1: RLE covers 10000 pixels",
    ),
    "empty file": ("", "is empty"),
    "cut off": ('[{"image_id": 1, "categ', "cut off"),
    "not JSON": ("AP = 37", "not JSON"),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_bad_results(case, gt, write):
    content, words = BAD_RESULTS[case]
    file = write(content)
    with pytest.raises(UserError) as error:
        load_results(file, gt, IOU_TYPES)
    assert str(file) in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value)


def test_good_results_pass(gt, write):
    found = [entry(), entry(bbox=[-3.5, 0, 4, 0]), entry(score=0)]
    assert load_results(write(found), gt, IOU_TYPES) == found
    assert load_results(write([]), gt, IOU_TYPES) == []
    only_boxes = [entry(segmentation=...)]
    assert load_results(write(only_boxes), gt, ["bbox"]) == only_boxes
    only_masks = [entry(bbox=...)]
    assert load_results(write(only_masks), gt, IOU_TYPES) == only_masks


def test_boxes_of_some_detections_only_are_refused(gt, write):
    """pycocotools, too, decides by one of them whether to take boxes or the masks' boxes."""
    mixed = [entry(), entry(bbox=...)]
    with pytest.raises(UserError, match="entry 1: has no bbox, but others have"):
        load_results(write(mixed), gt, IOU_TYPES)
    assert load_results(write(mixed), gt, ["segm"]) == mixed


def test_missing_files_and_folders(gt, tmp_path):
    for path, words in ((tmp_path / "none.json", "no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=words):
            load_results(path, gt, IOU_TYPES)
        with pytest.raises(UserError, match=words):
            load_ground_truth(path, IOU_TYPES)


def change(path, value):
    """A ground truth with one value replaced, or dropped where the value is '...'."""

    def function(content):
        *where, last = path
        for key in where:
            content = content[key]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return function


BAD_TRUTH = {
    "no images": (change(["images"], []), "has no images"),
    "without images": (change(["images"], ...), "no list of images"),
    "without annotations": (change(["annotations"], ...), "no list of annotations"),
    "without categories": (change(["categories"], ...), "no list of categories"),
    "image twice": (change(["images", 1, "id"], 1), "id 1 occurs twice in images"),
    "annotation twice": (change(["annotations", 1, "id"], 1), "occurs twice in annotations"),
    "image id as text": (change(["images", 0, "id"], "1"), "images[0] has no integer id, but '1'"),
    "negative image id": (change(["images", 0, "id"], -1), "images[0] has id -1"),
    "image of another type": (change(["annotations", 0, "image_id"], 1.0), "1.0, a float"),
    "size as float": (
        change(["annotations", 0, "segmentation", "size"], [320.0, 320]),
        "RLE of size [320.0, 320]",
    ),
    "no size": (change(["images", 0, "height"], ...), "image 1 has no height"),
    "unknown image": (change(["annotations", 0, "image_id"], 99), "unknown image 99"),
    "unknown category": (change(["annotations", 0, "category_id"], 99), "unknown category 99"),
    "NaN box": (change(["annotations", 0, "bbox"], [NAN, 1, 1, 1]), "annotation 1: bbox"),
    "no area": (change(["annotations", 0, "area"], ...), "area None"),
    "no mask": (change(["annotations", 0, "segmentation"], ...), "has no segmentation"),
}


@pytest.mark.parametrize("case", BAD_TRUTH)
def test_bad_ground_truth(case, content, write):
    modify, words = BAD_TRUTH[case]
    changed = copy.deepcopy(content)
    modify(changed)
    file = write(changed)
    with pytest.raises(UserError) as error:
        load_ground_truth(file, IOU_TYPES)
    assert str(file) in str(error.value) and words in str(error.value)


def test_fields_that_do_not_matter_may_be_anything(content, write):
    """Also ids of annotations: nothing refers to them."""
    changed = copy.deepcopy(content)
    for n, annotation in enumerate(changed["annotations"]):
        annotation.update(id=-n, extra=object.__name__, keypoints=3)
    changed["images"][0].update(license=[1], file_name="\ud800.png")
    changed["categories"][0].update(name="\ud800", supercategory=[1])
    gt = load_ground_truth(write(changed), IOU_TYPES)
    assert gt.categories[1] == "\ud800"
    found = load_results(write([entry(id="x", area="large")]), gt, IOU_TYPES)
    score = evaluate(gt, generated.detections(content) + found, "segm").table["AP"]
    same = reference_ap(content, generated.detections(content) + [entry()])
    assert score == pytest.approx(same, abs=1e-9)


def test_results_that_leave_out_images_are_counted(gt):
    every = set(gt.sizes)
    assert coverage_warnings({"A": every, "B": every - {1}}, gt) == []
    (half,) = coverage_warnings({"A": every, "B": set(range(1, 16))}, gt)
    assert half.startswith("B: detections on 15 of 25 images")
    (apart,) = coverage_warnings({"A": set(range(1, 24)), "B": {24, 25}}, gt)
    assert "B and A have detections on different images, 0 in common of 25" in apart
    assert coverage_warnings({"A": every, "B": set()}, gt) == ["B: no detections at all."]


def reference_ap(content, found):
    return 100 * generated.reference(content, found, "segm").stats[0]


def test_categories_of_one_name_are_told_apart(content, write):
    changed = copy.deepcopy(content)
    changed["categories"][1]["name"] = changed["categories"][0]["name"]
    names = load_ground_truth(write(changed), IOU_TYPES).categories
    assert names == {1: "kind 1 (id 1)", 2: "kind 1 (id 2)", 3: "kind 3", 4: "kind 4"}


def test_ground_truth_that_is_results(write):
    with pytest.raises(UserError, match="is no COCO ground truth, but a list"):
        load_ground_truth(write([entry()]), IOU_TYPES)
