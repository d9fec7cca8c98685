"""Folded models against what they were: outputs, what is folded, what must not be."""

import copy

import oracle
import pytest
import torch
import torchvision
from torch import nn

from refbn_d2.norms import (
    BatchRenorm2d,
    RefBatchNorm2d,
    SyncRefBatchNorm2d,
    VirtualBatchNorm2d,
    convert_norm,
    fold_norms,
)


def _trained_statistics(model):
    """As if the model had been trained: nothing at the values that would hide a mistake."""
    for m in model.modules():
        if hasattr(m, "running_mean") and m.running_mean is not None:
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 1.5)
            m.weight.data.uniform_(0.5, 1.2)
            m.bias.data.uniform_(-0.2, 0.2)
    return model.eval()


def _norms(model):
    return [m for m in model.modules() if hasattr(m, "running_mean")]


NORMS = [
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    RefBatchNorm2d,
    SyncRefBatchNorm2d,
    BatchRenorm2d,
    torchvision.ops.FrozenBatchNorm2d,
]


@pytest.mark.parametrize("norm", NORMS)
def test_a_block_of_torchvision(norm):
    block = torchvision.models.resnet.Bottleneck(16, 4, norm_layer=norm)
    model = _trained_statistics(block)
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        wanted = model(x)
        assert not _norms(fold_norms(model))
        assert oracle.relative_error(model(x), wanted) < 1e-5


def test_torchvision_resnet50():
    model = convert_norm(torchvision.models.resnet50(), "RefBN")
    model = _trained_statistics(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        folded = fold_norms(model)
        assert folded is model and not _norms(model)
        assert oracle.relative_error(model(x), wanted) < 1e-5


@pytest.mark.parametrize("norm", ["RefBN", "FrozenBN"])
def test_detectron2_r50_c4(norm):
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone
    from detectron2.modeling.roi_heads import Res5ROIHeads

    import refbn_d2  # noqa: F401

    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = norm, 0
    backbone = build_backbone(cfg)
    res5, _ = Res5ROIHeads._build_res5_block(cfg)
    model = _trained_statistics(nn.Sequential(backbone, res5))
    assert len(_norms(model)) == 53
    x, rois = torch.randn(1, 3, 64, 96), torch.randn(3, 1024, 14, 14)
    with torch.no_grad():
        wanted = backbone(x)["res4"], res5(rois)
        assert not _norms(fold_norms(model))
        for actual, expected in zip((backbone(x)["res4"], res5(rois)), wanted):
            assert oracle.relative_error(actual, expected) < 1e-5


class _Branches(nn.Module):
    """Everything that must be left alone, and one pair that need not be."""

    def __init__(self):
        super().__init__()
        self.before, self.shared = RefBatchNorm2d(3), RefBatchNorm2d(3)
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1, bias=k > 0) for k in range(4))
        self.used_twice, self.plain = RefBatchNorm2d(3), RefBatchNorm2d(3)

    def forward(self, x):
        x = self.before(x)
        x = self.shared(self.a(x)) + self.shared(self.b(x))
        y = self.c(x)
        return self.used_twice(y) + y + self.plain(self.d(x))


def test_only_what_is_safe_is_folded():
    model = _trained_statistics(_Branches())
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        wanted = model(x)
        fold_norms(model)
        assert oracle.relative_error(model(x), wanted) < 1e-5
    kinds = {name: type(m) for name, m in model.named_children()}
    assert kinds["plain"] is nn.Identity
    assert {kinds[n] for n in ("before", "shared", "used_twice")} == {RefBatchNorm2d}


class _Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_a_norm_that_does_more_or_differs_between_samples_is_left_alone():
    vbn = VirtualBatchNorm2d(4)
    vbn.set_reference(torch.zeros(4), torch.ones(4), size=2)
    for norm in (_Activated(4), vbn, nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval()
        x = torch.randn(2, 3, 6, 6)
        with torch.no_grad():
            wanted = model(x)
            assert oracle.relative_error(fold_norms(model)(x), wanted) < 1e-5
        assert (model[1] is norm) == (type(norm) is not nn.BatchNorm2d)


def test_training_mode_is_an_error():
    with pytest.raises(ValueError, match="model.eval"):
        fold_norms(nn.Sequential(nn.Conv2d(3, 4, 1), RefBatchNorm2d(4)))


class _Untraceable(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_is_refused_unchanged():
    model = _trained_statistics(_Untraceable(nn.Conv2d(3, 3, 1), RefBatchNorm2d(3)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="precede 1: torch.fx cannot trace _Untraceable"):
        fold_norms(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
