"""Runs every step of the reproduction, with the miniature's matrix and even smaller networks."""

import json
import subprocess
import sys

import tiny
import yaml

MINIATURE = tiny.ROOT / "configs/Matrix/table3_miniature.yaml"
TOOL = str(tiny.ROOT / "tools/reproduce_table3.py")

SMALLER = {
    "SOLVER.MAX_ITER": 2,
    "SOLVER.IMS_PER_BATCH": 2,
    "INPUT.MIN_SIZE_TRAIN": "(48,)",
    "INPUT.MIN_SIZE_TEST": 48,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 8,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 2,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 4,
    "TEST.DETECTIONS_PER_IMAGE": 1,
}


def _run(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=tiny.environment(**environment),
    )


def _smaller_matrix(path):
    """The miniature with one seed, hardly any training, and detectors on COCO alone."""
    parts = yaml.safe_load(MINIATURE.read_text())
    kept = [part for part in parts if part["PROTOCOL"].endswith("COCO")]
    for part in kept:
        part["SEEDS"] = [1]
        part["OPTS"] += [x for pair in SMALLER.items() for x in pair]
        part["CLASSIFIER_OPTS"] = ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 4]
        part["CLASSIFIER_OPTS"] += ["DATASETS.TEST", "()"]
        for key in ("CLASSIFIER", "DETECTOR"):
            part[key] = str(tiny.ROOT / "configs/Matrix" / part[key])
    path.write_text(yaml.safe_dump(kept))
    return path


IMAGES = 20


def test_both_protocols_from_pretraining_to_report_and_again(tmp_path, real_data):
    tiny.cut_coco(real_data / "coco", tmp_path / "datasets/coco", train=IMAGES, val=IMAGES)
    matrix = _smaller_matrix(tmp_path / "matrix.yaml")
    arguments = ["--matrix", matrix, "--num-gpus", 0, "--jobs", 2, "--output", "out"]
    done = _run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out/report/instances_val2017/report.json").read_text())
    protocols = {"A, frozen, COCO": {"BN", "RefBN"}, "B, live, COCO": {"BN", "RefBN"}}
    found = {}
    for entry in report["runs"].values():
        (seed,) = entry["seeds"]
        found.setdefault(seed["protocol"], set()).add(seed["name"])
        # RefBN is compared with BN of its own protocol, not of the other one.
        if seed["name"] == "RefBN":
            assert entry["compared_with"].startswith(f"BN ({seed['protocol']}")
    assert found == protocols and report["meta"]["images"] == IMAGES

    # Live norms both start from the backbone of BN, frozen ones each from their own.
    weights = {
        folder.name: yaml.safe_load(next(folder.rglob("RefBN/*/seed1/config.yaml")).read_text())
        for folder in (tmp_path / "out/A_frozen_COCO", tmp_path / "out/B_live_COCO")
    }
    a, b = weights["A_frozen_COCO"]["MODEL"], weights["B_live_COCO"]["MODEL"]
    assert a["WEIGHTS"] == "out/pretraining/RefBN/seed1/backbone.pth"
    assert a["RESNETS"]["NORM"] == "FrozenBN"
    assert b["WEIGHTS"] == "out/pretraining/BN/seed1/backbone.pth"
    assert b["RESNETS"]["NORM"] == "RefBN"

    results = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("coco_instances_results.json")}
    plan = _run(*arguments, "--dry-run", cwd=tmp_path)
    assert plan.stdout.count("finished") == 2 + 4
    again = _run(*arguments, cwd=tmp_path)
    assert again.returncode == 0 and len(results) == 4
    assert all(p.stat().st_mtime_ns == before for p, before in results.items())


def test_missing_data_is_one_line_before_anything_starts(tmp_path):
    done = _run("--miniature", cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: data set coco_2017_train: datasets/coco/annotations/inst")
    assert not (tmp_path / "output").exists()
