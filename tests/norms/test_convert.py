"""Walking from one norm to another: exact in evaluation, nothing lost on the way."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

import refbn_d2  # noqa: F401  (registers FrozenBN)
from refbn_d2.norms import (
    BatchRenorm2d,
    RefBatchNorm2d,
    SwitchableNorm2d,
    SyncRefBatchNorm2d,
    VirtualBatchNorm2d,
    convert_norm,
)
from refbn_d2.norms.convert import CONVERTIBLE

NAMES = ["BN", "RefBN", "SyncRefBN", "BRN", "VBN", "FrozenBN"]


def _trained(kind, c=4, **kwargs):
    torch.manual_seed(1)
    layer = kind(c, **kwargs)
    if isinstance(layer, FrozenBatchNorm2d):
        for b in layer.buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(c) + 0.5)
        return layer
    with torch.no_grad():
        layer.weight.copy_(torch.randn(c))
        layer.bias.copy_(torch.randn(c))
    for _ in range(3):
        layer(torch.randn(4, c, 5, 5) * 2 + 1)
    return layer


def test_the_names():
    assert list(CONVERTIBLE) == ["BN", "RefBN", "SyncRefBN", "VBN", "BRN", "FrozenBN"]


# With a reference VBN evaluates per sample; that is tested below.
PAIRS = [(a, b) for a in NAMES for b in NAMES if a != "VBN" and (a[-5:], b) != ("RefBN", "VBN")]


@pytest.mark.parametrize("source, target", PAIRS)
def test_evaluation_stays_the_same_exactly(source, target):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), _trained(CONVERTIBLE[source])).eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        wanted = net(x)
        assert convert_norm(net, target) is net
        assert type(net[1]) is CONVERTIBLE[target]
        assert torch.equal(net(x), wanted)
    assert net[1].eps == 1e-5 and not net[1].training


def test_back_and_forth_keeps_the_state():
    layer = _trained(nn.BatchNorm2d, momentum=0.3, eps=1e-3)
    layer.bias.requires_grad_(False)
    there = convert_norm(layer, "RefBN")
    back = convert_norm(there, "BN")
    assert back is not layer and type(back) is nn.BatchNorm2d
    state = back.state_dict()
    assert all(torch.equal(state[k], v) for k, v in layer.state_dict().items())
    assert (back.momentum, back.eps) == (0.3, 1e-3)
    assert back.weight.requires_grad and not back.bias.requires_grad
    # Nothing is shared with the source.
    back.weight.data.zero_()
    assert layer.weight.abs().min() > 0


@pytest.mark.parametrize("target", [SyncRefBatchNorm2d, VirtualBatchNorm2d])
def test_reference_and_pseudo_count_are_carried_over(target):
    source = _trained(RefBatchNorm2d, pseudo_count=2.0)
    name = next(k for k, v in CONVERTIBLE.items() if v is target)
    result = convert_norm(source, name)
    assert result.has_reference and result.ref_size == 4
    assert torch.equal(result.ref_mean, source.ref_mean)
    assert torch.equal(result.ref_var, source.ref_var)
    assert getattr(result, "pseudo_count", 2.0) == 2.0


def test_a_reference_of_unknown_size_cannot_become_vbns():
    source = RefBatchNorm2d(4)
    source.set_reference(torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="number of samples"):
        convert_norm(source, "VBN")


def test_from_vbn_the_running_statistics_are_kept():
    source = _trained(VirtualBatchNorm2d)
    result = convert_norm(source, "FrozenBN")
    assert torch.equal(result.running_mean, source.running_mean)
    assert torch.equal(result.running_var, source.running_var)


def test_sync_batch_norm_is_a_source():
    source = nn.SyncBatchNorm(4)
    source.running_mean.fill_(3)
    result = convert_norm(nn.Sequential(source), "RefBN")[0]
    assert type(result) is RefBatchNorm2d and result.running_mean.tolist() == [3] * 4


@pytest.mark.parametrize("target", ["BN", "RefBN", "SyncRefBN", "VBN"])
def test_without_affine_or_running_statistics(target):
    source = nn.BatchNorm2d(3, affine=False, track_running_stats=False, momentum=None)
    result = convert_norm(nn.Sequential(source), target)[0]
    assert result.weight is None and result.running_mean is None and result.momentum is None


@pytest.mark.parametrize("target", ["FrozenBN", "BRN"])
def test_running_statistics_that_are_needed_and_missing(target):
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="running statistics"):
        convert_norm(net, target)


def test_shared_layers_stay_shared():
    shared = nn.BatchNorm2d(3)
    block = nn.Sequential(nn.Conv2d(3, 3, 1), shared)
    net = nn.ModuleDict({"a": shared, "b": shared, "c": block, "d": nn.ModuleList([block])})
    convert_norm(net, "RefBN")
    assert type(net["a"]) is RefBatchNorm2d
    assert net["a"] is net["b"] is net["c"][1] is net["d"][0][1]
    assert net["c"] is net["d"][0]


def test_dtype_and_mode_are_kept():
    net = nn.Sequential(nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).eval())
    convert_norm(net, "RefBN")
    assert net[0].weight.dtype == net[0].ref_mean.dtype == net[0].running_var.dtype == torch.float64
    assert [m.training for m in net] == [True, False]


def test_other_norms_and_layers_of_that_norm_are_left_alone():
    own = RefBatchNorm2d(4, pseudo_count=5.0)
    others = [nn.GroupNorm(2, 4), SwitchableNorm2d(4), nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 1)]
    net = nn.Sequential(*others, own)
    net.register_module("nothing", None)
    convert_norm(net, "RefBN")
    assert all(a is b for a, b in zip(net, [*others, own]))
    assert net.nothing is None


def test_batch_renorm_starts_where_batch_norm_stopped():
    result = convert_norm(_trained(nn.BatchNorm2d), "BRN")
    assert type(result) is BatchRenorm2d and result.num_batches_tracked == 3


def test_unknown_name_lists_the_known_ones(monkeypatch):
    with pytest.raises(ValueError, match="'GN': known are BN, RefBN, SyncRefBN, VBN, BRN"):
        convert_norm(nn.BatchNorm2d(3), "GN")
    monkeypatch.delitem(CONVERTIBLE, "FrozenBN")
    with pytest.raises(ValueError, match="import refbn_d2 first"):
        convert_norm(nn.BatchNorm2d(3), "FrozenBN")
