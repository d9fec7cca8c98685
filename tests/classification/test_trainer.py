"""tools/train_classifier.py on a few images: what it learns, logs and refuses."""

import json

import pytest
import tiny
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from refbn_d2 import get_config_file
from refbn_d2.classification import ClassificationTrainer
from refbn_d2.config import load_config
from refbn_d2.data.image_folder import register_image_folders
from refbn_d2.errors import UserError
from tests.classification.samples import write_image_folders, write_mnist

LENET = tiny.ROOT / "configs/MNIST/lenet5_refbn.yaml"


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return write_mnist(tmp_path)


def _opts(output, **changes):
    options = {
        "MODEL.DEVICE": "cpu",
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.MAX_ITER": 40,
        "SOLVER.CHECKPOINT_PERIOD": 15,
        "SOLVER.BASE_LR": 0.05,
        "TEST.EVAL_PERIOD": 20,
        "SEED": 1,
        "OUTPUT_DIR": output,
        **{k.replace("__", "."): v for k, v in changes.items()},
    }
    return [str(x) for pair in options.items() for x in pair]


def _metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {
        key: [(e["iteration"], e[key]) for e in lines if key in e]
        for key in ("train/top1_error", "classification/top1_error", "images_per_second")
    }


def test_lenet_learns_and_logs_errors_and_throughput(mnist, train_classifier, tmp_path):
    result = train_classifier("--config-file", LENET, *_opts(tmp_path / "run"))
    assert result.status == 0, result.err
    metrics = _metrics(tmp_path / "run")
    assert [i for i, _ in metrics["train/top1_error"]] == [19, 39]
    # 20 steps of 16 images: their mean, not the last batch's nor a median.
    assert all(
        (e * 320 / 100) % 1 == pytest.approx(0, abs=1e-6) for _, e in metrics["train/top1_error"]
    )
    assert metrics["train/top1_error"][0][1] > metrics["train/top1_error"][1][1]
    assert [i for i, _ in metrics["classification/top1_error"]] == [19, 40]
    assert (
        metrics["classification/top1_error"][-1][1] < 30 and metrics["images_per_second"][0][1] > 0
    )
    assert "iter: 40  training error: " in result.out and " images/s, " in result.out
    weights = torch.load(tmp_path / "run/model_final.pth", weights_only=True)["model"]
    assert weights["network.features.1.ref_mean"].any()
    assert {k.split(".")[0] for k in weights} == {"network"}
    # The same from the checkpoint alone.
    options = _opts(tmp_path / "eval", MODEL__WEIGHTS=tmp_path / "run/model_final.pth")
    result = train_classifier("--config-file", LENET, "--eval-only", *options)
    error = metrics["classification/top1_error"][-1][1]
    assert result.status == 0 and f"copypaste: {error:.4f}," in result.out

    # Other norms' weights.
    def status(norm):
        changed = [*options, "MODEL.CLASSIFIER.NORM", norm]
        return train_classifier("--config-file", LENET, "--eval-only", *changed)

    assert f"copypaste: {error:.4f}," in status("BN").out  # in evaluation the same network
    refused = status("GN1")
    assert refused.status == 1
    assert "another network or norm: network.features.1.running_mean does not fit" in refused.err
    assert refused.err.strip().count("\n") == 0


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(mnist, train_classifier, tmp_path):
    """With workers or without, which stack the images and may skip putting states back."""
    # The schedule must not depend on where a run ends.
    changes = {"SOLVER__LR_SCHEDULER_NAME": "WarmupMultiStepLR", "DATASETS__TEST": "()"}
    config = ("--config-file", LENET)
    whole = {"DATALOADER__NUM_WORKERS": 1, "SOLVER__MAX_ITER": 10, **changes}
    assert train_classifier(*config, *_opts(tmp_path / "a", **whole)).status == 0
    for n in (5, 10):
        options = _opts(tmp_path / "b", SOLVER__MAX_ITER=n, SOLVER__CHECKPOINT_PERIOD=5, **changes)
        assert train_classifier(*config, "--resume", *options).status == 0
    a, b = (torch.load(tmp_path / n / "model_final.pth", weights_only=True)["model"] for n in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_corrupt_image_is_named_while_training(train_classifier, tmp_path):
    root = write_image_folders(tmp_path / "set")
    register_image_folders("broken", str(root))
    for file in (root / "train" / "bee").iterdir():
        file.write_bytes(file.read_bytes()[:900])
    options = _opts(
        tmp_path / "run",
        DATASETS__TRAIN="('broken_train',)",
        DATASETS__TEST="('broken_val',)",
        DATALOADER__NUM_WORKERS=1,
        MODEL__CLASSIFIER__NORM="BN",
        MODEL__CLASSIFIER__NUM_CLASSES=2,
        MODEL__CLASSIFIER__NETWORK="resnet18",
        MODEL__PIXEL_MEAN="[0.0, 0.0, 0.0]",
        MODEL__PIXEL_STD="[1.0, 1.0, 1.0]",
        SOLVER__IMS_PER_BATCH=2,
    )
    try:
        result = train_classifier("--config-file", LENET, *options)
    finally:
        for split in ("train", "val"):
            DatasetCatalog.remove(f"broken_{split}")
            MetadataCatalog.remove(f"broken_{split}")
    assert result.status == 1 and "Traceback" not in result.out + result.err
    assert "/train/bee/" in result.err and "cannot be read: image file is truncated" in result.err


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"MODEL__CLASSIFIER__NUM_CLASSES": 12}, "mnist_train has 10 classes.*NUM_CLASSES is 12"),
        ({"DATASETS__TRAIN": "('tiny_train',)"}, "tiny_train has no labels"),
    ],
)
def test_data_that_does_not_fit(mnist, tiny_data, tmp_path, changes, expected):
    cfg = load_config(str(LENET), _opts(tmp_path, **changes))
    with pytest.raises(UserError, match=expected):
        ClassificationTrainer.build_train_loader(cfg)


def test_images_need_no_size_for_detectron2s_default_of_grouping(mnist, tmp_path):
    cfg = load_config(str(LENET), _opts(tmp_path, DATALOADER__ASPECT_RATIO_GROUPING=True))
    assert len(next(iter(ClassificationTrainer.build_train_loader(cfg)))["label"]) == 16
    assert len(ClassificationTrainer.load_reference_batch(cfg)) == 16


def test_evaluation_sees_every_image_once(mnist, tmp_path):
    cfg = load_config(str(LENET), _opts(tmp_path))
    batches = list(ClassificationTrainer.build_test_loader(cfg, "mnist_test"))
    assert [len(b["label"]) for b in batches] == [16, 16, 8]
    assert torch.cat([b["image_id"] for b in batches]).tolist() == list(range(40))
    assert batches[0]["image"].shape == (16, 1, 32, 32)


def test_leaves_are_the_recipe_with_another_norm():
    """Anything else that differed would void a comparison."""
    for base, leaf in (
        ("ImageNet/Base-90epochs.yaml", "ImageNet/resnet50_90epochs_refbn.yaml"),
        ("MNIST/Base-lenet5.yaml", "MNIST/lenet5_refbn.yaml"),
    ):
        of_base, of_leaf = (load_config(get_config_file(name)) for name in (base, leaf))
        assert of_base.MODEL.CLASSIFIER.NORM == "BN" and of_leaf.MODEL.CLASSIFIER.NORM == "RefBN"
        of_base.MODEL.CLASSIFIER.NORM = "RefBN"
        assert of_base == of_leaf
