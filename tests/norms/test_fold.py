"""Folded models, compared with the original ones: outputs, and which norms are folded."""

import copy

import oracle
import pytest
import torch
import torchvision
from torch import nn

from refbn_d2.norms import (
    BatchRenorm2d,
    MovingAverageBatchNorm2d,
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
    MovingAverageBatchNorm2d,
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


class _Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w, self.bias)


class _Detectron2Conv:
    @staticmethod
    def activated():
        from detectron2.layers import Conv2d

        return Conv2d(3, 4, 3, activation=nn.functional.relu)


def _hooked():
    conv = nn.Conv2d(3, 4, 3)
    conv.register_forward_hook(lambda m, x, y: 2 * y)
    return conv


@pytest.mark.parametrize(
    "build", [lambda: _Standardized(3, 4, 3), _Detectron2Conv.activated, _hooked]
)
def test_a_convolution_that_does_more_is_left_alone(build, caplog):
    model = _trained_statistics(nn.Sequential(build(), nn.BatchNorm2d(4)))
    norm, x = model[1], torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(fold_norms(model)(x), wanted)
    assert model[1] is norm and "1 norms were not folded: 1 BatchNorm2d (1)" in caplog.text


def test_a_norm_watched_by_a_hook_is_left_alone():
    model = _trained_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].register_forward_hook(lambda m, x, y: 2 * y)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(fold_norms(model)(x), wanted)


class _Pair(nn.Module):
    """A convolution and a norm that a subclass also uses in a way that folding would change."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), RefBatchNorm2d(4)
        self.last, self.seen = None, []


class _TiedWeight(_Pair):
    def forward(self, x):
        y = self.bn(self.conv(x)).relu()
        return nn.functional.conv_transpose2d(y, self.conv.weight, padding=1)


class _NormWeightUsed(_Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn.weight.abs().mean() + self.bn.running_var.mean()


class _OutputWithoutSkip(_Pair):
    def forward(self, x, skip=None):
        y = self.conv(x)
        return self.bn(y) + (y if skip is None else skip)


class _NormIfAsked(_Pair):
    def forward(self, x, normalized=None):
        y = self.conv(x)
        return y if normalized is None else self.bn(y)


class _LeftInAnAttribute(_Pair):
    def forward(self, x):
        self.last = self.conv(x)
        return self.bn(self.last)


class _LeftInAList(_Pair):
    def forward(self, x):
        self.seen[:] = []
        self.seen.append(self.conv(x))
        return self.bn(self.seen[0])


class _SeenByAHook(_Pair):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(self.conv)
        self.conv.register_forward_hook(lambda m, x, y: setattr(self, "last", y))

    def forward(self, x):
        return self.bn(self.conv(x))


class _OwnForward(_Pair):
    def __init__(self):
        super().__init__()
        forward = self.conv.forward
        self.conv.forward = lambda x: 2 * forward(x)

    def forward(self, x):
        return self.bn(self.conv(x))


class _OwnForwardOfAll(_OwnForward):
    def __init__(self):
        super().__init__()
        del self.conv.forward
        self.forward = lambda x: self.bn(self.conv(x)) + self.conv(x)


@pytest.mark.parametrize("kind", [k for k in _Pair.__subclasses__()] + [_OwnForwardOfAll])
def test_a_pair_that_is_used_in_another_way_too_is_left_alone(kind):
    model = _trained_statistics(kind())
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        wanted = [model(x), model.last, *model.seen]
        model.seen.clear()
        try:
            fold_norms(model)
        except ValueError:
            assert kind is _OwnForwardOfAll  # cannot be traced
        assert type(model.bn) is RefBatchNorm2d and model.seen == []
        for actual, expected in zip([model(x), model.last, *model.seen], wanted):
            assert actual is expected is None or torch.equal(actual, expected)


def test_optional_arguments_alone_prevent_nothing():
    class Optional(_Pair):
        def forward(self, x, skip=None, scale=2.0):
            y = self.bn(self.conv(x)) * scale
            return y if skip is None else y + skip

    model = _trained_statistics(Optional())
    x, skip = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        wanted = [model(x), model(x, skip), model(x, scale=3.0)]
        fold_norms(model)
        for actual, expected in zip([model(x), model(x, skip), model(x, scale=3.0)], wanted):
            assert oracle.relative_error(actual, expected) < 1e-5
    assert type(model.bn) is nn.Identity


class _PartlyTraceable(nn.Module):
    """Cannot be traced as a whole; ``shared`` is used by two of its parts."""

    def __init__(self):
        super().__init__()
        shared = nn.Conv2d(3, 3, 1)
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), RefBatchNorm2d(3))
        self.one = nn.Sequential(shared, RefBatchNorm2d(3))
        self.other = nn.Sequential(shared, nn.ReLU())

    def forward(self, x):
        assert x.dim() == 4 and x.shape[1] == 3
        return self.body(x) + self.one(x) + self.other(x)


def test_parts_of_a_model_that_cannot_be_traced(caplog):
    model = _trained_statistics(_PartlyTraceable())
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        wanted = model(x)
        fold_norms(model)
        assert oracle.relative_error(model(x), wanted) < 1e-5
    assert type(model.body[1]) is nn.Identity and type(model.one[1]) is RefBatchNorm2d
    assert "1 norms were not folded: 1 RefBatchNorm2d (one.1)" in caplog.text


def test_regnet_of_detectron2():
    from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem

    import refbn_d2  # noqa: F401

    sizes = {"stem_width": 8, "depth": 4, "w_a": 8, "w_0": 8, "w_m": 2.5, "group_width": 8}
    blocks = {"stem_class": SimpleStem, "block_class": ResBottleneckBlock}
    model = RegNet(**blocks, **sizes, norm="RefBN", out_features=["s1"])
    model = _trained_statistics(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)["s1"]
        assert not _norms(fold_norms(model))
        assert oracle.relative_error(model(x)["s1"], wanted) < 1e-5


def test_a_norm_that_takes_turns_is_left_and_keeps_its_turn(caplog):
    from detectron2.layers import CycleBatchNormList

    norms = CycleBatchNormList(2, RefBatchNorm2d, num_features=4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), norms)
    model.eval()
    norms[0].running_mean.fill_(1)
    x = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        wanted = [model(x), model(x)]
        fold_norms(model)
        for expected in wanted:
            assert oracle.relative_error(model(x), expected) < 1e-5
    assert type(model[1]) is nn.Identity and "3.0, 3.1" in caplog.text


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
