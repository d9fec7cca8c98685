"""detectron2's own tools work with our norms without changes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor, SimpleTrainer
from torch import nn

import refbn_d2
from refbn_d2.config import load_config
from refbn_d2.config_files import config_names
from refbn_d2.engine import Trainer
from refbn_d2.engine.predictor import Predictor
from refbn_d2.hooks import ReferenceHook, global_batch
from refbn_d2.statistics.reference import reference_layers


@pytest.fixture
def cfg(tiny_data, tmp_path):
    opts = tiny.opts(OUTPUT_DIR=tmp_path, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.001)
    return load_config(tiny.CONFIG, opts)


def test_every_tool_knows_the_norms_by_an_environment_variable():
    code = "from detectron2.layers import get_norm; print(type(get_norm('RefBN', 4)).__name__)"
    env = tiny.environment(DETECTRON2_ENV_MODULE="refbn_d2")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True
    )
    assert run.stdout.strip() == "RefBatchNorm2d", run.stderr


def test_default_predictor_finds_what_ours_finds(cfg, tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, path)
    cfg.MODEL.WEIGHTS = path
    image = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    theirs = DefaultPredictor(cfg)(image)["instances"].to("cpu")
    ours = Predictor(cfg, path)(image)["instances"]
    assert len(theirs) > 0
    assert torch.equal(theirs.pred_boxes.tensor, ours.pred_boxes.tensor)
    assert torch.equal(theirs.pred_masks, ours.pred_masks)


def test_test_time_augmentation(cfg, tmp_path, train_net):
    path = tmp_path / "weights.pth"
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, path)
    opts = tiny.opts(
        OUTPUT_DIR=tmp_path,
        MODEL__WEIGHTS=path,
        TEST__AUG__ENABLED=True,
        TEST__AUG__MIN_SIZES=(64,),
    )
    run = train_net("--eval-only", "--config-file", tiny.CONFIG, *opts)
    assert run.status == 0, run.err
    assert (tmp_path / "inference_TTA/coco_instances_results.json").exists()


def test_flops_and_parameters_are_batch_norms(cfg):
    """As tools/analyze_model.py counts them: a model in evaluation."""
    try:
        from detectron2.utils.analysis import FlopCountAnalysis, parameter_count
    except ModuleNotFoundError as e:  # release 0.6 wants caffe2 for it
        pytest.skip(f"this detectron2's analysis needs {e.name}, which torch no longer has")
    data = DatasetCatalog.get("tiny_val")[:1]
    image = torch.zeros(3, data[0]["height"], data[0]["width"])
    counts = []
    for norm in ("BN", "RefBN"):
        cfg.MODEL.RESNETS.NORM = norm
        torch.manual_seed(0)
        model = Trainer.build_model(cfg).eval()
        flops = FlopCountAnalysis(model, [{"image": image}])
        by_operator = flops.unsupported_ops_warnings(False).by_operator()
        counts.append((by_operator["batch_norm"], by_operator["conv"], parameter_count(model)[""]))
    assert counts[0] == counts[1] and counts[0][0] > 0


def test_a_hook_for_any_trainer_captures_the_reference():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), refbn_d2.RefBatchNorm2d(4))

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, batch):
            return {"loss": self.net(torch.stack([d["image"] for d in batch])).square().mean()}

    images = [{"image": torch.randn(3, 8, 8)} for _ in range(6)]
    loader = [images[:2], images[2:4], images[4:]]
    expected = nn.Conv2d(3, 4, 3)
    expected.load_state_dict(model[0].state_dict())
    trainer = SimpleTrainer(Wrapped(), loader, torch.optim.SGD(model.parameters(), 0.1))
    trainer.register_hooks([ReferenceHook(lambda: global_batch(loader))])
    trainer.train(0, 3)
    # By definition: statistics of the convolution's output for the first batch, untrained.
    out = expected(torch.stack([d["image"] for d in images[:2]]))
    (layer,) = reference_layers(trainer.model).values()
    torch.testing.assert_close(layer.ref_mean, out.mean((0, 2, 3)))
    torch.testing.assert_close(layer.ref_var, out.var((0, 2, 3), correction=0))


ZOO = os.path.join(os.path.dirname(model_zoo.__file__), "configs")


@pytest.mark.skipif(
    not os.path.isdir(ZOO), reason="this detectron2 was installed without its model zoo's configs"
)
def test_a_lazy_config_has_refbn_in_each_place():
    name = "LazyConfig/mask_rcnn_R_50_FPN_1x_refbn.py"
    assert name in config_names()
    model = instantiate(LazyConfig.load(refbn_d2.get_config_file(name)).model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 69  # 53 of the backbone, 8 of the FPN, 4 of each head
    assert {type(m) for m in norms} == {refbn_d2.RefBatchNorm2d}
