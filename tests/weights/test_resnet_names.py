"""Names of weights, compared with the state dicts of the networks."""

import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone

from refbn_d2.config import load_config
from refbn_d2.errors import UserError
from refbn_d2.weights.resnet_names import detectron2_names, torchvision_names


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_name_of_torchvisions_is_one_of_detectron2s(depth):
    opts = ["MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.OUT_FEATURES", "['res5']"]
    opts += ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"]
    opts += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64" if depth < 50 else "256"]
    with torch.device("meta"):
        theirs = torchvision.models.get_model(f"resnet{depth}").state_dict()
        ours = build_resnet_backbone(load_config("", opts), ShapeSpec(channels=3)).state_dict()
    names = detectron2_names(theirs)
    assert set(names.values()) - {"linear.weight", "linear.bias"} == set(ours)
    assert all(ours[new].shape == theirs[old].shape for old, new in names.items() if new in ours)
    assert torchvision_names(names.values()) == {new: old for old, new in names.items()}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("module.backbone.res5.0.conv1.weight", "res5.0.conv1.weight"),
        ("roi_heads.res5.0.conv1.norm.ref_mean", "res5.0.conv1.norm.ref_mean"),
        ("backbone.bottom_up.stem.conv1.weight", "stem.conv1.weight"),
        ("linear.bias", "linear.bias"),
        ("stem.fc.bias", "linear.bias"),
        ("backbone.fpn_lateral2.weight", None),
        ("roi_heads.box_predictor.cls_score.weight", None),
        ("pixel_mean", None),
    ],
)
def test_what_of_a_detector_is_the_resnet(name, expected):
    names = detectron2_names(["backbone.res2.0.conv1.weight", name])
    assert names.get(name) == expected


def test_a_classifier_around_the_network_is_left_out():
    names = detectron2_names(["network.layer1.0.conv1.weight", "network.bn1.bias", "pixel_mean"])
    assert names == {
        "network.layer1.0.conv1.weight": "res2.0.conv1.weight",
        "network.bn1.bias": "stem.conv1.norm.bias",
    }


@pytest.mark.parametrize(
    "extra", ["layer1.0.se.fc1.weight", "conv1.0.weight", "layer1.0.bn1.x.y", "bn2.weight"]
)
def test_a_layer_that_torchvisions_resnet_has_not_is_named(extra):
    with pytest.raises(UserError, match=f"no place for {extra}"):
        detectron2_names(["layer1.0.conv1.weight", extra])


@pytest.mark.parametrize("head", ["fc.0.weight", "projection_head.1.bias", "bn.weight", "queue"])
def test_a_head_beside_the_network_is_left_out(head):
    names = ["module.layer1.0.conv1.weight", f"module.{head}"]
    assert detectron2_names(names) == {names[0]: "res2.0.conv1.weight"}


@pytest.mark.parametrize("names", [[], ["features.0.weight"], ["layer1.weight"]])
def test_another_network_is_refused(names):
    with pytest.raises(UserError, match="no ResNet in it"):
        detectron2_names(names)
