"""AP against the published numbers and against pycocotools."""

import json
import re

import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from refbn_d2.evaluation.ap import ERRORS, METRICS, evaluate, evaluate_all
from refbn_d2.evaluation.coco_evaluator import _HotCOCOeval
from refbn_d2.evaluation.inputs import load_ground_truth, load_results
from refbn_d2.evaluation.interval import half_samples
from tests.evaluation import generated

IOU_TYPES = ("bbox", "segm")


def published(folder, iou_type):
    text = (folder / "results" / "val2014_fake_eval_res.txt").read_text()
    section = text[text.index(f"type={iou_type}") :].split("------")[0]
    return [float(v) for v in re.findall(r"= (\d\.\d{3})$", section, flags=re.MULTILINE)]


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_published_numbers(real_data, iou_type):
    folder = real_data / "cocoeval"
    expected = published(folder, iou_type)
    assert len(expected) == 12
    gt = load_ground_truth(folder / "instances_val2014_100.json", [iou_type])
    file = folder / "results" / f"instances_val2014_fake{iou_type}100_results.json"
    table = evaluate(gt, load_results(file, gt, [iou_type]), iou_type).table
    assert [round(table[m] / 100, 3) for m in METRICS] == expected[:6]

    truth = COCO(str(gt.path))
    scorer = _HotCOCOeval(truth, truth.loadRes(str(file)), iou_type)
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert scorer.stats.round(3).tolist() == expected


def assert_equal(ours, theirs):
    expected = {m: 100 * v if v > -1 else np.nan for m, v in zip(METRICS, theirs.stats)}
    for metric in METRICS:
        assert ours.table[metric] == pytest.approx(expected[metric], abs=1e-9, nan_ok=True), metric
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    for n, ap in enumerate(ours.categories.values()):
        kept = precision[:, :, n][precision[:, :, n] > -1]
        expected = 100 * kept.mean() if kept.size else np.nan
        assert ap == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("iou_type", IOU_TYPES)
@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools_on_generated_data(write, iou_type, seed):
    content = generated.ground_truth(images=50, seed=seed)
    assert any(a["iscrowd"] for a in content["annotations"])
    results = generated.detections(content, seed=seed + 50)
    gt = load_ground_truth(write(content), IOU_TYPES)
    ours = evaluate(gt, load_results(write(results), gt, IOU_TYPES), iou_type)
    assert all(ours.table[m] > 0 for m in METRICS)  # every area range has something in it
    assert_equal(ours, generated.reference(content, results, iou_type))


def test_more_than_100_detections_an_image_are_cut_off_as_in_coco(write):
    content = generated.ground_truth(images=2, categories=1)
    rng = np.random.default_rng(0)
    results = [
        {"image_id": 1, "category_id": 1, "bbox": generated.random_box(rng), "score": 0.9}
        for _ in range(120)
    ] + [{k: v for k, v in d.items() if k != "segmentation"} for d in generated.detections(content)]
    gt = load_ground_truth(write(content), ["bbox"])
    ours = evaluate(gt, load_results(write(results), gt, ["bbox"]), "bbox")
    assert_equal(ours, generated.reference(content, results, "bbox"))


def perturbed(content, rng):
    """The annotations of real images as detections, moved a little, some with a wrong category."""
    sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
    categories = [c["id"] for c in content["categories"]]
    results = []
    for a in content["annotations"]:
        if rng.random() < 0.2:
            continue
        box = np.array(a["bbox"]) * rng.normal(1, 0.06, 4)
        x, y, w, h = np.maximum(box, 1)
        polygons = mask_util.frPyObjects(a["segmentation"], *sizes[a["image_id"]])
        pixels = mask_util.decode(
            mask_util.merge(polygons) if isinstance(polygons, list) else polygons
        )
        moved = np.roll(pixels, tuple(rng.integers(-3, 4, 2)), (0, 1))
        mask = mask_util.encode(np.asfortranarray(moved))
        wrong = rng.random() < 0.1
        results.append(
            {
                "image_id": a["image_id"],
                "category_id": int(rng.choice(categories)) if wrong else a["category_id"],
                "bbox": [float(v) for v in (x, y, w, h)],
                "score": float(rng.random()),
                "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
            }
        )
    return results


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_equals_pycocotools_on_real_annotations(real_data, write, iou_type):
    file = real_data / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    results = perturbed(content, np.random.default_rng(3))
    gt = load_ground_truth(file, IOU_TYPES)
    ours = evaluate(gt, load_results(write(results), gt, IOU_TYPES), iou_type)
    assert 10 < ours.table["AP"] < 90
    assert_equal(ours, generated.reference(content, results, iou_type))


def test_nothing_detected_is_ap_zero(gt):
    score = evaluate(gt, [], "bbox", [[1, 2, 3], [5]])
    assert score.table == dict.fromkeys(METRICS, 0.0)
    assert score.replicates[0, 0] == 0 and np.isnan(score.replicates[1]).all()  # 5 has no object


def test_no_object_of_a_size_is_nan(write):
    content = generated.ground_truth()
    content["annotations"] = [a for a in content["annotations"] if a["area"] >= 32**2]
    gt = load_ground_truth(write(content), ["bbox"])
    table = evaluate(gt, generated.detections(content), "bbox").table
    assert np.isnan(table["APs"]) and table["APl"] > 0


def test_detections_in_images_without_objects_count_against(gt, content):
    results = generated.detections(content, false=0)
    empty = {i["id"] for i in content["images"]} - {a["image_id"] for a in content["annotations"]}
    stray = [
        {"image_id": i, "category_id": c, "bbox": [10, 10, 50, 50], "score": 1.0}
        for i in empty
        for c in gt.categories
    ]
    before, after = (evaluate(gt, r, "bbox").table["AP"] for r in (results, results + stray))
    assert after < before - 5


def test_replicates_equal_pycocotools_on_the_same_images(gt, content, capsys):
    """Both iou types are scored at the same time."""
    results = generated.detections(content)
    subsets = [[1, 2, 3, 4, 6, 9], [7, 8, 11, 12, 13, 20, 21]]
    scores = evaluate_all(gt, results, IOU_TYPES, subsets)
    assert capsys.readouterr().out == ""  # hotcoco prints COCO's summary
    for iou_type in IOU_TYPES:
        for row, subset in zip(scores[iou_type].replicates, subsets):
            stats = generated.reference(content, results, iou_type, subset).stats[:6]
            np.testing.assert_allclose(row, np.where(stats > -1, 100 * stats, np.nan), atol=1e-9)


def test_categories_on_subsets_average_to_ap_on_subsets(gt, content):
    """COCO's AP is the mean over the categories that have objects in the subset."""
    halves = half_samples(list(gt.sizes), 5, 0)
    for iou_type in ("bbox", "segm"):
        score = evaluate(gt, generated.detections(content), iou_type, halves, per_category=True)
        assert set(score.category_replicates) == set(gt.categories)
        mean = np.nanmean(list(score.category_replicates.values()), axis=0)
        np.testing.assert_allclose(mean, score.replicates[:, 0], atol=1e-9)


def test_types_of_errors(gt, content):
    """Detections with exactly one kind of mistake have exactly that type of error."""
    right = [
        {"score": 0.9, **{k: a[k] for k in ("image_id", "category_id", "bbox")}}
        for a in content["annotations"]
        if not a["iscrowd"]
    ]

    def errors(found):
        return evaluate(gt, found, "bbox").errors

    assert errors(right) == dict.fromkeys(ERRORS, 0.0)
    half = right[::2]
    assert max(errors(half), key=errors(half).get) == "Miss"
    # Each second box comes before the next object's first, so that it costs precision.
    twice = [{**d, "score": 1 - n / len(right) / 2} for n, d in enumerate(right) for _ in range(2)]
    assert {k for k, v in errors(twice).items() if v > 0} == {"Dupe"}
    assert evaluate(gt, right, "bbox").calibration == pytest.approx(10)  # score 0.9, all right
