"""Weights that do not fit are refused, those that do load."""

import pytest
import tiny
import torch

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.errors import UserError


def _model(*options, **changes):
    return Trainer.build_model(load_config(tiny.CONFIG, [*tiny.opts(**changes), *options]))


def _save(path, weights) -> str:
    torch.save({"model": weights}, path)
    return str(path)


def _load(model, path, tmp_path):
    cfg = load_config(tiny.CONFIG, tiny.opts(OUTPUT_DIR=tmp_path))
    return Trainer.build_checkpointer(cfg, model).resume_or_load(path, resume=False)


NARROW, DEEP = {"MODEL__RESNETS__STEM_OUT_CHANNELS": 8}, {"MODEL__RESNETS__DEPTH": 101}
WIDE = {"MODEL__RESNETS__WIDTH_PER_GROUP": 8}


@pytest.mark.parametrize(
    "saved, wanted",
    [({}, NARROW), (WIDE, {}), ({}, DEEP), (DEEP, {})],
    ids=["stem", "width", "R-50 into R-101", "R-101 into R-50"],
)
def test_weights_of_another_architecture(tmp_path, saved, wanted):
    path = _save(tmp_path / "other.pth", _model(**saved).state_dict())
    with pytest.raises(UserError, match="other.pth.*another architecture.*set MODEL.WEIGHTS"):
        _load(_model(**wanted), path, tmp_path)


@pytest.mark.parametrize("fused", [".norm.", ".running_"], ids=["norms", "statistics"])
def test_a_file_whose_norms_were_fused_is_refused(tmp_path, fused):
    weights = {k: v for k, v in _model().state_dict().items() if fused not in k}
    with pytest.raises(UserError, match="another architecture.*norm"):
        _load(_model(), _save(tmp_path / "fused.pth", weights), tmp_path)


@pytest.mark.parametrize("content", [{}, {"something": torch.zeros(3)}], ids=["empty", "foreign"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="another architecture"):
        _load(_model(), _save(tmp_path / "foreign.pth", content), tmp_path)


@pytest.mark.parametrize("name", ["cut.pth", "cut.pkl"])
def test_a_damaged_file_is_named(tmp_path, name):
    path = tmp_path / name
    _save(path, _model().state_dict())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{name}.*cannot be read"):
        _load(_model(), str(path), tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no/such.pth.*no such file"):
        _load(_model(), "no/such.pth", tmp_path)


def test_bn_weights_and_other_classes_load(tmp_path):
    """A norm without a reference takes it later; new classes have new heads."""
    source = _model(MODEL__RESNETS__NORM="BN")
    path = _save(tmp_path / "bn.pth", source.state_dict())
    model = _model(MODEL__ROI_HEADS__NUM_CLASSES=7)
    _load(model, path, tmp_path)
    for name in ("backbone.res4.5.conv2.weight", "roi_heads.res5.2.conv3.norm.running_var"):
        assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    assert model.roi_heads.box_predictor.cls_score.out_features == 8
