"""A report needs neither detectron2 nor PyTorch, so it works with other trainers' results."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

from tests.evaluation import generated

ROOT = Path(__file__).parents[2]

PROGRAM = """
import importlib, pkgutil, sys

class Absent:
    names = "torch", "torchvision", "detectron2", "fvcore", "iopath", "yacs", "cv2"

    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import refbn_d2.evaluation
for module in pkgutil.iter_modules(refbn_d2.evaluation.__path__, "refbn_d2.evaluation."):
    if module.name != "refbn_d2.evaluation.coco_evaluator":  # detectron2's own
        importlib.import_module(module.name)
from refbn_d2.commands.compare import main
sys.argv[0] = "compare.py"
main()
"""


def test_a_whole_report_without_torch_and_detectron2(tmp_path, write, content, gt_file):
    files = [write(generated.detections(content, found, seed=1)) for found in (0.5, 0.8)]
    for image in content["images"]:
        pixels = np.full((image["height"], image["width"], 3), 127, np.uint8)
        cv2.imwrite(str(tmp_path / image["file_name"]), pixels)
    output = tmp_path / "report"
    arguments = [
        "report", "--gt", gt_file, "--results", f"BN={files[0]}", f"RefBN={files[1]}",
        "--resamples", 5, "--images", tmp_path, "--output", output,
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    written = sorted(p.name for p in output.glob("report.*"))
    assert written == ["report.html", "report.json", "report.md"]
    assert "data:image/jpeg;base64," in (output / "report.html").read_text()
