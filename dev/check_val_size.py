#!/usr/bin/env python3
"""Tests a report with generated data of the size of COCO val2017 (5,000 images, 80 categories).

Compares AP of boxes and masks with that of pycocotools, and measures the time and memory of a
report of two norms with 1,000 resamples. With --images 300 --runs 50 it measures a report of a
hundred runs.
"""

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

HEIGHT, WIDTH, CATEGORIES, OBJECTS_PER_IMAGE = 480, 640, 80, 7.2
FALSE_PER_IMAGE = 12
FOUND = {"BN": 0.70, "RefBN": 0.72}  # fraction of the objects that are found


def rle(box, wobble) -> dict:
    """An octagon within the box as RLE, with its corners moved by ``wobble`` (8,)."""
    x, y, w, h = box
    angle = np.arange(8) * np.pi / 4
    radius = 0.5 * np.clip(1 + wobble, 0.3, 1)
    outline = np.stack(
        [x + w * (0.5 + radius * np.cos(angle)), y + h * (0.5 + radius * np.sin(angle))]
    )
    mask = mask_util.frPyObjects([outline.T.ravel().tolist()], HEIGHT, WIDTH)[0]
    return {"size": mask["size"], "counts": mask["counts"].decode()}


def boxes(rng, count) -> np.ndarray:
    size = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - size)
    return np.hstack([corner, size]).round(2)


def ground_truth(rng, images: int) -> dict:
    annotations = []
    for n, box in enumerate(boxes(rng, round(OBJECTS_PER_IMAGE * images))):
        mask = rle(box, rng.normal(0, 0.15, 8))
        annotations.append(
            {
                "id": n + 1,
                "image_id": int(rng.integers(1, images + 1)),
                "category_id": int(rng.integers(1, CATEGORIES + 1)),
                "bbox": box.tolist(),
                "area": float(mask_util.area(mask)),
                "iscrowd": int(rng.random() < 0.01),
                "segmentation": mask,
            }
        )
    return {
        "images": [{"id": n + 1, "height": HEIGHT, "width": WIDTH} for n in range(images)],
        "annotations": annotations,
        "categories": [{"id": n + 1, "name": f"kind {n + 1}"} for n in range(CATEGORIES)],
    }


def detections(rng, truth, found) -> list:
    results = []

    def add(image, category, box, score):
        entry = {"image_id": image, "category_id": category, "bbox": box.round(2).tolist()}
        mask = rle(box, rng.normal(0, 0.15, 8))
        results.append({**entry, "score": round(float(score), 4), "segmentation": mask})

    for a in truth["annotations"]:
        if rng.random() < found:
            box = np.array(a["bbox"])
            box += rng.normal(0, 0.07, 4) * np.tile(box[2:], 2)
            box[2:] = np.maximum(box[2:], 2)
            add(a["image_id"], a["category_id"], box, rng.beta(4, 2))
    images = len(truth["images"])
    for box in boxes(rng, FALSE_PER_IMAGE * images):
        image, category = rng.integers(1, images + 1), rng.integers(1, CATEGORIES + 1)
        add(int(image), int(category), box, rng.beta(2, 4))
    return results


def pycocotools_ap(truth_file: Path, results: list, iou_type: str) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_file))
        if iou_type == "segm":
            results = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
        scorer = COCOeval(truth, truth.loadRes(results), iou_type)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return 100 * scorer.stats[:6]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/val_size"))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=1, help="runs per norm (default: %(default)s)")
    args = parser.parse_args()
    folder = args.output
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    truth = ground_truth(rng, args.images)
    (folder / "gt.json").write_text(json.dumps(truth))
    files = {name: [folder / f"{name}{n}.json" for n in range(args.runs)] for name in FOUND}
    for name, found in FOUND.items():
        for file in files[name]:
            file.write_text(json.dumps(detections(rng, truth, found)))

    command = [sys.executable, str(Path(__file__).parents[1] / "tools/compare.py"), "report"]
    command += ["--gt", str(folder / "gt.json"), "--results"]
    command += [f"{name}={','.join(map(str, runs))}" for name, runs in files.items()]
    command += ["--iou-type", "bbox", "segm", "--baseline", "BN", "--resamples", "1000"]
    command += ["--seed", "0", "--output", str(folder)]
    begin = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.time() - begin
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"{args.images} images, {len(truth['annotations'])} objects, {args.runs} runs per norm, "
        f"1,000 resamples: {seconds:.0f} s, peak memory {peak:.2f} GB"
    )
    if args.runs > 1:
        return

    report = json.loads((folder / "report.json").read_text())
    results = json.loads(files["BN"][0].read_text())
    for iou_type in ("bbox", "segm"):
        begin = time.time()
        expected = pycocotools_ap(folder / "gt.json", results, iou_type)
        ours = np.array(list(report["runs"]["BN"][iou_type].values()))
        print(
            f"{iou_type}: AP {ours[0]:.4f}, largest difference from pycocotools "
            f"{np.abs(ours - expected).max():.1e} of six numbers; "
            f"pycocotools took {time.time() - begin:.0f} s"
        )


if __name__ == "__main__":
    main()
