"""The configs of the detection experiment, and the models that they build."""

from pathlib import Path

import pytest
import tiny
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from refbn_d2 import RefBatchNorm2d
from refbn_d2.config import load_config
from refbn_d2.engine import Trainer

FOLDER = tiny.ROOT / "configs/COCO-InstanceSegmentation"
QUICK = tiny.ROOT / "configs/Quick"


def _flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _differences(a: Path, b: Path):
    a, b = (dict(_flat(load_config(str(p)))) for p in (a, b))
    return {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}


def _norms(model):
    """All normalization layers, found by what PyTorch and detectron2 call so."""
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, FrozenBatchNorm2d)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


def _leaf(schedule: str, norm: str) -> Path:
    return FOLDER / f"mask_rcnn_R_50_C4_{schedule}_{norm.lower()}.yaml"


def _build(norm="refbn", *options):
    config = str(_leaf("1x", norm))
    return Trainer.build_model(load_config(config, ["MODEL.DEVICE", "cpu", *options]))


@pytest.fixture(scope="module")
def refbn_model():
    return _build()


def test_53_refbn_layers_and_no_other_norm(refbn_model):
    norms = _norms(refbn_model)
    assert len(norms) == 53
    assert {type(m) for m in norms.values()} == {RefBatchNorm2d}
    # Three blocks of three, and a shortcut.
    assert sum(n.startswith("roi_heads.res5.") for n in norms) == 10
    assert {m.pseudo_count for m in norms.values()} == {1.0}


@pytest.mark.parametrize("norm, kind", [("bn", nn.BatchNorm2d), ("frozenbn", FrozenBatchNorm2d)])
def test_baselines_have_their_norm_in_the_same_places(refbn_model, norm, kind):
    norms = _norms(_build(norm))
    assert norms.keys() == _norms(refbn_model).keys()
    assert all(isinstance(m, kind) and not isinstance(m, RefBatchNorm2d) for m in norms.values())


@pytest.mark.parametrize("schedule", ["1x", "3x"])
@pytest.mark.parametrize("norm", ["BN", "RefBN", "SyncBN", "FrozenBN"])
def test_leaves_are_the_base_with_another_norm(schedule, norm):
    base, leaf = FOLDER / f"Base-live-{schedule}.yaml", _leaf(schedule, norm)
    assert _differences(base, leaf) <= {"MODEL.RESNETS.NORM"}
    assert load_config(str(leaf)).MODEL.RESNETS.NORM == norm


@pytest.mark.parametrize("schedule", ["1x", "3x"])
def test_gn_differs_in_what_its_own_weights_need(schedule):
    weights = {"MODEL.WEIGHTS", "MODEL.RESNETS.STRIDE_IN_1X1"}
    difference = _differences(_leaf(schedule, "BN"), _leaf(schedule, "GN"))
    assert difference == {"MODEL.RESNETS.NORM"} | weights


@pytest.mark.parametrize("norm", ["bn", "refbn", "syncbn", "frozenbn", "gn", "from_refbn_frozen"])
def test_schedules_differ_in_their_length_only(norm):
    difference = _differences(_leaf("1x", norm), _leaf("3x", norm))
    assert difference == {"SOLVER.STEPS", "SOLVER.MAX_ITER"}


def test_quick_leaves_are_the_base_with_another_norm():
    base = QUICK / "Base-mask_rcnn_R_50_C4_quick.yaml"
    for norm in ("BN", "RefBN"):
        leaf = QUICK / f"mask_rcnn_R_50_C4_quick_{norm.lower()}.yaml"
        assert _differences(base, leaf) <= {"MODEL.RESNETS.NORM"}
        assert load_config(str(leaf)).MODEL.RESNETS.NORM == norm


def test_weights_of_the_bn_model_load(refbn_model, caplog):
    """Names, shapes and statistics fit; only the reference is not there yet."""
    bn = _build("bn")
    with torch.no_grad():
        for m in _norms(bn).values():
            m.running_mean.normal_()
    keys = refbn_model.load_state_dict(bn.state_dict())
    assert not keys.missing_keys and not keys.unexpected_keys
    for name, m in _norms(refbn_model).items():
        assert torch.equal(m.running_mean, bn.get_submodule(name).running_mean)
        assert not m.has_reference


def test_freeze_at_turns_the_first_stages_into_frozen_bn():
    """The price of being a BatchNorm2d, and why the base config says FREEZE_AT: 0."""
    norms = _norms(_build("refbn", "MODEL.BACKBONE.FREEZE_AT", "2"))
    frozen = {n for n, m in norms.items() if isinstance(m, FrozenBatchNorm2d)}
    assert frozen == {n for n in norms if ".stem." in n or ".res2." in n} and len(frozen) == 11
    assert all(type(norms[n]) is RefBatchNorm2d for n in norms.keys() - frozen)


def test_weight_decay_of_norms_finds_them():
    """detectron2 tells norms by their class; WEIGHT_DECAY_NORM must reach all 53 pairs."""
    config = str(FOLDER / "mask_rcnn_R_50_C4_1x_refbn.yaml")
    cfg = load_config(config, ["MODEL.DEVICE", "cpu", "SOLVER.WEIGHT_DECAY_NORM", "0.5"])
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    decayed = [p for g in optimizer.param_groups if g["weight_decay"] == 0.5 for p in g["params"]]
    expected = {id(p) for m in _norms(model).values() for p in (m.weight, m.bias)}
    assert {id(p) for p in decayed} == expected and len(expected) == 106
