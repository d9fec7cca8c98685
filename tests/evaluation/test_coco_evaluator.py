"""detectron2's evaluator gives the same result dict with hotcoco as with pycocotools."""

import copy
import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util

from refbn_d2.errors import UserError
from refbn_d2.evaluation.coco_evaluator import FastCOCOEvaluator
from refbn_d2.io.atomic import PARTIAL
from tests.evaluation import generated


@pytest.fixture(scope="module")
def data_set(gt_file, gt):
    name = "generated_for_evaluator"
    MetadataCatalog.get(name).set(
        json_file=str(gt_file),
        thing_classes=list(gt.categories.values()),
        thing_dataset_id_to_contiguous_id={k: n for n, k in enumerate(gt.categories)},
    )
    yield name
    MetadataCatalog.remove(name)


def predictions(content, results):
    """(inputs, outputs) as a detectron2 model would give them."""
    for image in content["images"]:
        found = [r for r in results if r["image_id"] == image["id"]]
        instances = Instances((generated.SIDE, generated.SIDE))
        boxes = np.array([r["bbox"] for r in found], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(torch.tensor(boxes))
        instances.scores = torch.tensor([r["score"] for r in found])
        instances.pred_classes = torch.tensor(
            [r["category_id"] - 1 for r in found], dtype=torch.int64
        )
        masks = [mask_util.decode(r["segmentation"]) for r in found]
        shape = (0, generated.SIDE, generated.SIDE)
        instances.pred_masks = torch.tensor(np.array(masks).reshape((-1, *shape[1:])) > 0)
        yield [{"image_id": image["id"]}], [{"instances": instances}]


def results_of(evaluator, content, results, **kwargs):
    evaluator.reset()
    for inputs, outputs in predictions(content, results):
        evaluator.process(inputs, outputs)
    return evaluator.evaluate(**kwargs)


@pytest.mark.parametrize("image_ids", [None, [3, 1, 9, 12, 14]])
def test_the_same_dict_as_detectron2_with_pycocotools(data_set, content, image_ids):
    found = generated.detections(content)
    options = {"distributed": False}
    theirs = COCOEvaluator(data_set, **options, use_fast_impl=False)
    expected = results_of(theirs, content, found, img_ids=image_ids)
    assert set(expected) == {"bbox", "segm"} and "AP-kind 2" in expected["segm"]
    for backend in ("hotcoco", "pycocotools"):
        ours = FastCOCOEvaluator(data_set, **options, backend=backend)
        np.testing.assert_equal(results_of(ours, content, found, img_ids=image_ids), expected)


def test_hotcoco_is_really_used(data_set, content, monkeypatch):
    from pycocotools.cocoeval import COCOeval

    def refuse(self, *args):
        raise AssertionError("pycocotools matched the detections")

    monkeypatch.setattr(COCOeval, "evaluateImg", refuse)
    found = generated.detections(content)
    fast = FastCOCOEvaluator(data_set, distributed=False)
    assert results_of(fast, content, found)["bbox"]["AP"] > 0
    slow = FastCOCOEvaluator(data_set, distributed=False, backend="pycocotools")
    with pytest.raises(AssertionError, match="pycocotools matched"):
        results_of(slow, content, found)


def test_an_interrupted_results_file_is_not_there(data_set, content, monkeypatch, tmp_path):
    """Upstream writes it in place; a run that was killed must not leave half a file."""
    name = "coco_instances_results.json"
    found = generated.detections(content)
    evaluator = FastCOCOEvaluator(data_set, distributed=False, output_dir=str(tmp_path))
    results_of(evaluator, content, found)
    whole = (tmp_path / name).read_bytes()
    assert len(json.loads(whole)) == len(found)

    def interrupted(content):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)  # upstream has opened the file by then
    with pytest.raises(KeyboardInterrupt):
        results_of(evaluator, content, found[:1])
    assert (tmp_path / name).read_bytes() == whole
    assert not list(tmp_path.glob("*" + PARTIAL))


def test_nothing_detected_and_another_limit(data_set, content):
    fast = FastCOCOEvaluator(data_set, distributed=False)
    empty = results_of(fast, content, [])
    assert np.isnan(empty["bbox"]["AP"])  # detectron2's own answer

    found = generated.detections(content, false=5)
    options = {"distributed": False, "max_dets_per_image": 3}
    theirs = COCOEvaluator(data_set, **options, use_fast_impl=False)
    ours = FastCOCOEvaluator(data_set, **options)
    expected = results_of(theirs, content, found)
    np.testing.assert_equal(results_of(ours, content, found), expected)


@pytest.mark.parametrize("first", [0, -5])
def test_ids_of_annotations_do_not_matter(first, content, write, data_set):
    """pycocotools alone calls an object with id 0 missed, and hotcoco refuses negative ids."""
    changed = copy.deepcopy(content)
    for n, annotation in enumerate(changed["annotations"]):
        annotation["id"] = first + n
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    name = f"generated_from_{first}"
    MetadataCatalog.get(name).set(
        **{
            **MetadataCatalog.get(data_set).as_dict(),
            "name": name,
            "json_file": str(write(changed)),
        }
    )
    found = generated.detections(content)
    expected = results_of(COCOEvaluator(data_set, distributed=False), content, found)
    for backend in ("hotcoco", "pycocotools"):
        ours = FastCOCOEvaluator(name, distributed=False, backend=backend)
        np.testing.assert_equal(results_of(ours, content, found), expected)
    MetadataCatalog.remove(name)


def test_unknown_backend(data_set):
    with pytest.raises(UserError, match="TEST.COCO_BACKEND 'fast'"):
        FastCOCOEvaluator(data_set, backend="fast")
