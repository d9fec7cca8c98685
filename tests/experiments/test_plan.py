"""The estimated cost of a matrix, compared with a count by hand, and missing files."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny

import refbn_d2.classification  # noqa: F401  (registers its data sets)
from refbn_d2.config import load_config
from refbn_d2.errors import UserError
from refbn_d2.experiments.matrix import RunSpec
from refbn_d2.experiments.plan import check_data, measured_rates, planned_trainings

COCO = tiny.ROOT / "configs/COCO-InstanceSegmentation"
QUICK = tiny.ROOT / "configs/Quick"


def _spec(config, classifier=None, opts=(), pretraining_opts=()):
    return RunSpec("BN", "BN", "BN", 1, str(config), classifier, 16, 0.0, opts, pretraining_opts)


def test_hours_follow_from_published_throughputs(tmp_path):
    classifier = str(QUICK / "Base-classifier.yaml")
    epochs = ("SOLVER.MAX_ITER", "112590", "SOLVER.IMS_PER_BATCH", "1024")  # 90 of ImageNet
    spec = _spec(COCO / "mask_rcnn_R_50_C4_1x_bn.yaml", classifier, pretraining_opts=epochs)
    pretrain, detect = planned_trainings([spec], tmp_path)
    # detectron2 publishes 14.6 hours on 8 GPUs, NVIDIA "~12 hours" for 90 epochs in float32, which
    # 115 million images at 2,855 a second are.
    assert detect.gpu_hours / 8 == pytest.approx(90000 * 0.584 / 3600)
    assert pretrain.gpu_hours / 8 == pytest.approx(11.2, abs=0.1)
    assert detect.images == 16 * 90000 and pretrain.images == 112590 * 1024
    assert not pretrain.finished and not detect.finished


def test_hours_follow_from_what_was_measured(tmp_path):
    """BN 2 images in 0.1 s, RefBN in 0.2 s: 90,000 x 16 images take 20 and 40 GPU hours."""
    rows = [
        {"detector": "R50-C4", "norm": n, "step (s)": s} for n, s in (("BN", 0.1), ("RefBN", 0.2))
    ]
    file = tmp_path / "gpu_check.json"
    file.write_text(json.dumps({"quick": False, "parts": {"detectors": {"rows": rows}}}))
    spec = _spec(COCO / "mask_rcnn_R_50_C4_1x_bn.yaml", str(QUICK / "Base-classifier.yaml"))
    specs = [spec, dataclasses.replace(spec, name="RefBN", norm="RefBN", protocol="B")]
    rates = measured_rates(file)
    pretrain, *detectors = planned_trainings(specs, tmp_path, rates)
    assert [x.gpu_hours for x in detectors] == pytest.approx([20, 40])
    by_v100 = planned_trainings(specs, tmp_path)
    assert pretrain.gpu_hours / by_v100[0].gpu_hours == pytest.approx(20 / by_v100[1].gpu_hours)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"quick": True, "parts": {}}, "a rehearsal"),
        ({"quick": False, "parts": {"detectors": {"rows": []}}}, "no times of R50-C4"),
        ([], "no times of R50-C4"),
    ],
)
def test_a_file_that_measured_nothing(tmp_path, content, message):
    (tmp_path / "gpu_check.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        measured_rates(tmp_path / "gpu_check.json")


def test_one_pretraining_serves_two_protocols(tmp_path):
    spec = _spec(QUICK / "mask_rcnn_R_50_C4_quick_bn.yaml", str(QUICK / "Base-classifier.yaml"))
    plan = planned_trainings([spec, dataclasses.replace(spec, protocol="B")], tmp_path)
    assert len(plan) == 3
    (tmp_path / spec.classifier_folder).mkdir(parents=True)
    (tmp_path / spec.classifier_folder / "backbone.pth").touch()
    assert [s.finished for s in planned_trainings([spec], tmp_path)] == [True, False]


def _tiny_spec(*opts, **changes):
    return _spec(tiny.CONFIG, opts=tuple(tiny.opts(**changes)) + opts)


def test_data_and_weights_that_are_there_are_enough(tmp_path, tiny_data):
    (tmp_path / "weights.pth").touch()
    check_data([_tiny_spec(MODEL__WEIGHTS=tmp_path / "weights.pth")])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"MODEL__WEIGHTS": "no/such.pth"}, "weights no/such.pth: no such file"),
        ({"DATASETS__TRAIN": "('no_such_set',)"}, "unknown data set 'no_such_set'"),
    ],
)
def test_what_is_missing_is_named(tiny_data, changes, message):
    with pytest.raises(UserError, match=message):
        check_data([_tiny_spec(**changes)])


def test_a_missing_folder_of_images_is_named(tmp_path):
    tiny.register(tiny.write(tmp_path), "incomplete")
    shutil.rmtree(tmp_path / "coco/train2017")
    spec = _tiny_spec(DATASETS__TRAIN="('incomplete_train',)", DATASETS__TEST="()")
    with pytest.raises(UserError, match="incomplete_train: .*train2017 does not exist"):
        check_data([spec])


def test_weights_of_a_pretraining_to_come_are_not_missing(tiny_data):
    spec = _tiny_spec(MODEL__WEIGHTS="made/later.pth")
    check_data([dataclasses.replace(spec, classifier=str(QUICK / "Base-classifier.yaml"))])


def test_protocol_a_starts_from_what_the_matrix_makes():
    """The weights in the configs of protocol A are where the reproduction puts its first seed's."""
    for length in ("1x", "3x"):
        cfg = load_config(str(COCO / f"mask_rcnn_R_50_C4_{length}_from_refbn_frozen.yaml"))
        spec = dataclasses.replace(_spec(""), pretrained="RefBN")
        backbone = Path("output/table3") / spec.classifier_folder / "backbone.pth"
        assert cfg.MODEL.WEIGHTS == str(backbone)
