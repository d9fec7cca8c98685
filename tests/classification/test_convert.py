"""Converted weights give in detectron2 what they gave where they come from."""

import os
import pickle
import resource
import signal

import numpy as np
import oracle
import pytest
import tiny
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from refbn_d2.classification.convert import convert, norm_of
from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.errors import UserError
from refbn_d2.norms import RefBatchNorm2d, capture, convert_norm

COCO = tiny.ROOT / "configs/COCO-InstanceSegmentation"
CLASSIFIER = str(tiny.ROOT / "configs/Quick/classifier_refbn.yaml")


@pytest.fixture(scope="module")
def networks():
    """torchvision's ResNet-50 with statistics of its own, with BN and with RefBN's reference."""
    torch.manual_seed(0)
    networks = {}
    for norm in ("BN", "RefBN"):
        network = convert_norm(torchvision.models.resnet50(num_classes=7), norm)
        for m in network.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.1)
                m.running_mean.normal_(std=0.1)
                m.running_var.uniform_(0.5, 2.0)
        with torch.no_grad(), capture(network):
            network.train()(torch.randn(4, 3, 64, 64))
        networks[norm] = network.eval()
    return networks


def _detector(options, base="mask_rcnn_R_50_C4_1x_bn.yaml"):
    opts = [str(x) for pair in options.items() for x in pair]
    cfg = load_config(str(COCO / base), [*opts, "MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    Trainer.build_checkpointer(cfg, model).load(cfg.MODEL.WEIGHTS)
    return model


def _save(weights, path):
    torch.save(weights, path)
    return str(path)


@torch.no_grad()
def _check_features(model, network, tolerance=1e-6):
    """res2 to res4 of the backbone and res5 in the RoI head against layer1 to layer4."""
    x = torch.randn(2, 3, 96, 64)
    expected = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    actual = model.backbone.stem(x)
    stages = [*(getattr(model.backbone, f"res{n}") for n in (2, 3, 4)), model.roi_heads.res5]
    for n, stage in enumerate(stages, 1):
        expected, actual = getattr(network, f"layer{n}")(expected), stage(actual)
        print(n, oracle.relative_error(actual, expected)); assert oracle.relative_error(actual, expected) < tolerance, f"layer{n}"


@pytest.mark.parametrize("source", ["BN", "RefBN"])
@pytest.mark.parametrize("norm", [None, "FrozenBN"], ids=["live", "frozen"])
def test_a_c4_detector_gives_the_features_of_torchvisions_network(tmp_path, networks, source, norm):
    path = _save(networks[source].state_dict(), tmp_path / "resnet50.pth")
    conversion = convert(path, str(tmp_path / "backbone.pth"), norm)
    # The configuration that the tool prints is all that a detector needs.
    model = _detector(conversion.config)
    _check_features(model, networks[source])
    kind = {"BN": nn.BatchNorm2d, "RefBN": RefBatchNorm2d}[source] if norm is None else None
    layer, own = model.roi_heads.res5[2].conv3.norm, networks[source].layer4[2].bn3
    assert type(layer) is (kind or FrozenBatchNorm2d)
    if kind is RefBatchNorm2d:
        assert layer.has_reference and torch.equal(layer.ref_var, own.ref_var)


@pytest.mark.parametrize("source", ["BN", "RefBN"])
def test_there_and_back_changes_nothing(tmp_path, networks, source):
    state = networks[source].state_dict()
    files = [str(tmp_path / f"{n}.pth") for n in range(3)]
    _save(state, files[0])
    convert(files[0], files[1])
    convert(files[1], files[2], to="torchvision")
    back = torch.load(files[2], weights_only=True)
    assert set(back) == set(state) and all(torch.equal(back[k], state[k]) for k in state)


def test_a_frozen_file_comes_back_as_batchnorm_that_does_the_same(tmp_path, networks):
    files = [str(tmp_path / f"{n}.pth") for n in range(3)]
    _save(networks["RefBN"].state_dict(), files[0])
    convert(files[0], files[1], "FrozenBN")
    convert(files[1], files[2], to="torchvision")
    network = torchvision.models.resnet50(num_classes=7).eval()
    network.load_state_dict(torch.load(files[2], weights_only=True))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert oracle.relative_error(network(x), networks["RefBN"](x)) < 1e-6
