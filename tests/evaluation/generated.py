"""Small COCO data sets and detections with crowds, empty images and objects of all sizes."""

import copy

import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SIDE = 320


def rle(box, ellipse, height=SIDE, width=SIDE):
    """A box or the ellipse within it as compressed RLE with text counts."""
    x, y, w, h = box
    rows, cols = np.mgrid[:height, :width] + 0.5
    mask = (cols >= x) & (cols < x + w) & (rows >= y) & (rows < y + h)
    if ellipse:
        mask &= ((cols - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1
    encoded = mask_util.encode(np.asfortranarray(mask.astype("uint8")))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def random_box(rng):
    w, h = np.exp(rng.uniform(np.log(6), np.log(200), 2))
    return [float(v) for v in (rng.uniform(0, SIDE - w), rng.uniform(0, SIDE - h), w, h)]


def ground_truth(images=25, categories=4, seed=0, crowds=True):
    """Every fifth image has no annotation, about one annotation in eight is a crowd."""
    rng = np.random.default_rng(seed)
    entries, annotations = [], []
    for key in range(1, images + 1):
        entries.append({"id": key, "file_name": f"{key}.png", "height": SIDE, "width": SIDE})
        for _ in range(0 if key % 5 == 0 else rng.integers(1, 7)):
            box = random_box(rng)
            mask = rle(box, ellipse=True)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": key,
                    "category_id": int(rng.integers(1, categories + 1)),
                    "bbox": box,
                    "area": float(mask_util.area(mask)),
                    "iscrowd": int(crowds and rng.random() < 0.12),
                    "segmentation": mask,
                }
            )
    names = [{"id": k, "name": f"kind {k}"} for k in range(1, categories + 1)]
    return {"images": entries, "annotations": annotations, "categories": names}


def detections(gt, found=0.7, noise=0.08, false=0.5, seed=1):
    """Finds a share of the objects, imprecisely, and others that are not there."""
    rng = np.random.default_rng(seed)
    results = []

    def add(image, category, box, low, high):
        results.append(
            {
                "image_id": image,
                "category_id": category,
                "bbox": [float(v) for v in box],
                # Rounded, so that some scores tie.
                "score": round(float(rng.uniform(low, high)), 2),
                "segmentation": rle(box, ellipse=rng.random() < 0.8),
            }
        )

    for a in gt["annotations"]:
        x, y, w, h = a["bbox"]
        if rng.random() < found:
            shift = rng.normal(0, noise, 4) * [w, h, w, h]
            box = np.array([x, y, w, h]) + shift
            box[2:] = np.maximum(box[2:], 2)
            add(a["image_id"], a["category_id"], box, 0.2, 1)
    for image in gt["images"]:
        for _ in range(rng.poisson(2 * false)):
            category = int(rng.integers(1, len(gt["categories"]) + 1))
            add(image["id"], category, random_box(rng), 0, 0.8)
    return results


def reference(gt, results, iou_type, image_ids=None):
    """pycocotools' COCOeval after summarize, as detectron2 calls it."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(gt)
        truth.createIndex()
        results = copy.deepcopy(results)
        if iou_type == "segm":
            for r in results:
                r.pop("bbox", None)
        scorer = COCOeval(truth, truth.loadRes(results), iou_type)
        if image_ids is not None:
            scorer.params.imgIds = image_ids
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer
