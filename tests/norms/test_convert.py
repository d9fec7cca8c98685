"""Converting between norms: exact in evaluation, and nothing is lost."""

import copy
import pickle

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn.utils import parametrize, prune

import refbn_d2  # noqa: F401  (registers FrozenBN)
from refbn_d2.norms import (
    NORM_TYPES,
    BatchRenorm2d,
    RefBatchNorm2d,
    SwitchableNorm2d,
    SyncRefBatchNorm2d,
    VirtualBatchNorm2d,
    convert_norm,
    fold_norms,
)

NAMES = [name for name, t in NORM_TYPES.items() if t.convertible]
OURS = ["RefBN", "SyncRefBN", "EvalRefBN", "VBN", "BRN", "SN", "IN"]


def _trained(kind, c=4, **kwargs):
    torch.manual_seed(1)
    layer = kind(c, **kwargs)
    if isinstance(layer, nn.SyncBatchNorm):  # trains on a GPU only
        layer.eval()
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
    ours = ["BN", "RefBN", "SyncRefBN", "EvalRefBN", "VBN", "BRN", "SyncBN"]
    assert NAMES == [*ours, "FrozenBN", "naiveSyncBN"]


# With a reference VBN evaluates per sample, and so does a trained EvalRefBN; tested below.
BY_SAMPLE = ("VBN", "EvalRefBN")
PAIRS = [
    (a, b) for a in NAMES for b in NAMES if a not in BY_SAMPLE and (a[-5:], b) != ("RefBN", "VBN")
]


@pytest.mark.parametrize("source, target", PAIRS)
def test_evaluation_stays_the_same_exactly(source, target):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), _trained(NORM_TYPES[source].kind)).eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        wanted = net(x)
        assert convert_norm(net, target) is net
        assert type(net[1]) is NORM_TYPES[target].kind
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


@pytest.mark.parametrize("target", [SyncRefBatchNorm2d, VirtualBatchNorm2d])
def test_reference_and_pseudo_count_are_carried_over(target):
    source = _trained(RefBatchNorm2d, pseudo_count=2.0)
    name = next(k for k, t in NORM_TYPES.items() if t.kind is target)
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


@pytest.mark.parametrize("target", ["RefBN", "SyncRefBN", "VBN"])
def test_a_layer_without_tensors_is_where_its_neighbours_are(target):
    bare = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), bare).to("meta", torch.float64)
    layer = convert_norm(net, target)[1]
    assert all(b.is_meta and b.dtype == torch.float64 for b in layer.buffers())


def test_buffers_that_are_not_saved_stay_so():
    bn = nn.BatchNorm2d(4)
    bn.register_buffer("num_batches_tracked", bn.num_batches_tracked, persistent=False)
    for name in ("BRN", "BN"):
        bn = convert_norm(bn, name)
        assert set(bn.state_dict()) == {"weight", "bias", "running_mean", "running_var"}


def test_a_counter_that_is_none_as_in_frozen_norms_of_later_detectron2():
    frozen = FrozenBatchNorm2d(4)
    frozen.register_buffer("num_batches_tracked", None)
    for name in ("BN", "RefBN", "EvalRefBN", "BRN"):
        layer = convert_norm(copy.deepcopy(frozen), name).train()
        layer(torch.randn(2, 4, 3, 3))
        assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("kind", [t.kind for n, t in NORM_TYPES.items() if n in OURS])
def test_the_input_may_be_named_as_for_batch_norm(kind):
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(kind(4)(input=x), kind(4)(x))


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
    with pytest.raises(
        ValueError, match="'GN': known are BN, RefBN, SyncRefBN, EvalRefBN, VBN, BRN"
    ):
        convert_norm(nn.BatchNorm2d(3), "GN")
    monkeypatch.delitem(NORM_TYPES, "FrozenBN")
    with pytest.raises(ValueError, match="import refbn_d2 first"):
        convert_norm(nn.BatchNorm2d(3), "FrozenBN")


def _trains(optimizer, model):
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return all(id(p) in known for p in model.parameters())


@pytest.mark.parametrize("source, target", [("BN", "RefBN"), ("RefBN", "BRN"), ("VBN", "SyncBN")])
def test_an_optimizer_made_before_trains_the_converted_layer(source, target):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), NORM_TYPES[source].build(4))
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    assert _trains(optimizer, convert_norm(net, target))


def test_tied_parameters_stay_tied():
    a, b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    b.weight = a.weight
    net = convert_norm(nn.Sequential(a, b), "RefBN")
    assert net[0].weight is net[1].weight and net[0].bias is not net[1].bias


def test_hooks_stay_and_can_still_be_removed():
    net, seen = nn.Sequential(nn.BatchNorm2d(4)), []
    handles = [
        net[0].register_forward_hook(lambda m, x, y: seen.append(("forward", type(m)))),
        net[0].register_full_backward_hook(lambda m, gx, gy: seen.append(("backward", type(m)))),
        net[0].register_load_state_dict_pre_hook(lambda m, *_: seen.append(("load", type(m)))),
    ]
    convert_norm(net, "RefBN")
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    net(x).sum().backward()
    net.load_state_dict(net.state_dict())
    assert seen == [(what, RefBatchNorm2d) for what in ("forward", "backward", "load")]
    for handle in handles:
        handle.remove()
    net(x)
    assert len(seen) == 3


class _Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def test_parametrizations_stay():
    bn = _trained(nn.BatchNorm2d).eval()
    parametrize.register_parametrization(bn, "weight", _Doubled())
    original, x = bn.parametrizations.weight.original, torch.randn(2, 4, 3, 3)
    wanted = bn(x)
    net = convert_norm(nn.Sequential(bn), "RefBN")
    assert isinstance(net[0], RefBatchNorm2d) and torch.equal(net(x), wanted)
    assert net[0].parametrizations.weight.original is original


class _ByMode(nn.Module):
    def forward(self, w):
        return 2 * w if self.training else 3 * w


@pytest.mark.parametrize("training", [True, False])
def test_a_parametrization_stays_in_its_mode(training):
    bn = nn.BatchNorm2d(4).train(not training)
    parametrize.register_parametrization(bn, "weight", _ByMode())
    bn.parametrizations.weight[0].train(training)
    assert convert_norm(bn, "RefBN").weight.tolist() == [2 if training else 3] * 4


@pytest.mark.parametrize("target", [n for n in NAMES if n not in ("FrozenBN", "naiveSyncBN")])
def test_a_layer_without_bias(target):
    bn = nn.BatchNorm2d(3)
    bn.register_parameter("bias", None)  # older versions of torch have no argument for it
    result = convert_norm(nn.Sequential(bn), target)[0]
    assert result.bias is None and result.weight is bn.weight
    if target != "SyncBN":  # trains on a GPU only
        y = result(torch.randn(2, 3, 4, 4, requires_grad=True))
        y.square().sum().backward()
        assert result.weight.grad.isfinite().all()


def test_a_frozen_layer_made_of_one_without_bias_shifts_by_nothing():
    bn = _trained(nn.BatchNorm2d).eval()
    bn.register_parameter("bias", None)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(convert_norm(bn, "FrozenBN")(x), bn(x))


class _Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def _pruned():
    layer = nn.BatchNorm2d(4)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def _replaced_forward():
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    "build, text",
    [
        (lambda: _Own(4), "1 _Own (1)"),
        (lambda: nn.BatchNorm1d(4), "1 BatchNorm1d (1)"),
        (lambda: nn.BatchNorm3d(4), "1 BatchNorm3d (1)"),
        (lambda: nn.LazyBatchNorm2d(), "1 LazyBatchNorm2d (1)"),
        (_pruned, "1 BatchNorm2d (1)"),
        (_replaced_forward, "1 BatchNorm2d (1)"),
    ],
)
def test_what_would_change_its_function_is_left_and_the_log_says_so(build, text, caplog):
    own = build()
    net = nn.Sequential(nn.Conv2d(3, 4, 1), own, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    with caplog.at_level("INFO"):
        convert_norm(net, "RefBN")
    assert net[1] is own and type(net[3]) is RefBatchNorm2d
    assert "Converted 1 BatchNorm2d to RefBN" in caplog.text
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert text in warning


@pytest.mark.parametrize("before", [nn.Linear(3, 4), nn.Conv1d(3, 4, 1), nn.Conv3d(3, 4, 1)])
def test_sync_batch_norm_of_other_dimensions_is_left(before, caplog):
    net = nn.Sequential(before, nn.ReLU(), nn.SyncBatchNorm(4))
    convert_norm(net, "RefBN")
    assert type(net[2]) is nn.SyncBatchNorm and "1 SyncBatchNorm (2)" in caplog.text


def test_frozen_norms_of_torchvision_are_converted():
    frozen = torchvision.ops.FrozenBatchNorm2d(4)
    for b in frozen.buffers():
        b.uniform_(0.5, 1.5)
    x = torch.randn(2, 4, 3, 3)
    result = convert_norm(nn.Sequential(frozen).eval(), "RefBN")
    assert type(result[0]) is RefBatchNorm2d
    assert torch.allclose(result(x), frozen(x), atol=1e-5)
    assert result[0].weight.requires_grad


def test_a_refused_conversion_changes_nothing():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    layers = list(net)
    with pytest.raises(ValueError, match="running statistics"):
        convert_norm(net, "BRN")
    assert all(a is b for a, b in zip(net, layers))


class TestTimm:
    """timm's norms hold an activation and a drop layer, which conversion and folding keep."""

    @pytest.fixture(autouse=True)
    def _timm(self):
        self.timm = pytest.importorskip("timm", reason="pip install timm")

    def _layer(self, name="BatchNormAct2d"):
        kind = getattr(self.timm.layers, name)
        layer = kind(4, act_layer=nn.Hardswish, drop_layer=nn.Dropout)
        for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            t.data.uniform_(0.5, 1.5)
        return layer.eval()

    @pytest.mark.parametrize("target", NAMES)
    @pytest.mark.parametrize("source", ["BatchNormAct2d", "FrozenBatchNormAct2d"])
    def test_every_target_keeps_the_activation(self, source, target):
        layer, x = self._layer(source), torch.randn(2, 4, 3, 3)
        wanted = layer(x)
        net = convert_norm(nn.Sequential(layer), target)
        assert isinstance(net[0], NORM_TYPES[target].kind) and torch.allclose(net(x), wanted)
        assert net[0].act is layer.act and net[0].drop is layer.drop
        if source == "BatchNormAct2d" and target != "VBN":
            names = {k for k in net.state_dict() if "ref_" not in k}
            assert set(nn.Sequential(layer).state_dict()) - names <= {"0.num_batches_tracked"}

    @pytest.mark.parametrize("training", [True, False])
    def test_the_drop_layer_stays_in_its_mode(self, training):
        """Dropout that stays active in evaluation, or a norm that trains without it."""
        layer = self._layer().train(not training)
        layer.drop.train(training)
        result = convert_norm(layer, "RefBN")
        assert (result.training, result.drop.training) == (not training, training)

    @pytest.mark.parametrize("target", ["BN", "RefBN", "SyncRefBN", "EvalRefBN", "BRN"])
    def test_converted_layers_can_be_scripted(self, target):
        layer, x = self._layer(), torch.randn(2, 4, 3, 3)
        scripted = torch.jit.script(convert_norm(nn.Sequential(copy.deepcopy(layer)), target))
        assert torch.allclose(scripted(x), layer(x), atol=1e-6)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_converted_layers_can_be_copied_and_converted_back(self, copied):
        layer, x = self._layer(), torch.randn(2, 4, 3, 3)
        net = copied(convert_norm(nn.Sequential(layer), "RefBN"))
        assert torch.equal(net(x), layer(x)) and isinstance(net[0], RefBatchNorm2d)
        back = convert_norm(net, "BN")
        assert torch.equal(back(x), layer(x)) and not isinstance(back[0], RefBatchNorm2d)

    @pytest.mark.parametrize("name", ["efficientnet_b0", "regnety_002", "tf_efficientnet_lite0"])
    def test_networks_compute_the_same_converted_and_folded(self, name):
        net = self.timm.create_model(name).eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            wanted = net(x)
            assert torch.equal(convert_norm(net, "RefBN")(x), wanted)
            fold_norms(net)
            assert not any(isinstance(m, RefBatchNorm2d) for m in net.modules())
            assert (net(x) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
