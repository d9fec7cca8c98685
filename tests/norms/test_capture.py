"""Capturing references: exact for any split of the batch, and nothing else in the model changes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from refbn_d2.norms import Moments, RefBatchNorm2d, VirtualBatchNorm2d, capture


class _ReplacesItsBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps = self.steps + 1
        return x


def _net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        RefBatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        _ReplacesItsBuffer(),
        nn.Conv2d(4, 5, 1),
        RefBatchNorm2d(5),
    )


def _state(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def _differing(net, before):
    return {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}


def _reference(x):
    flat = x.double().transpose(0, 1).flatten(1)
    mean = flat.sum(1) / flat.shape[1]
    return mean, ((flat - mean[:, None]) ** 2).sum(1) / flat.shape[1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.floats(-1e3, 1e3))
def test_moments_do_not_depend_on_the_split(sizes, offset):
    parts = [torch.randn(n, 2, 3, n + 1, dtype=torch.float64) + offset for n in sizes]
    moments = Moments()
    for part in parts:
        moments.add(part)
    whole = torch.cat([p.transpose(0, 1).flatten(1) for p in parts], dim=1)[None, :, :, None]
    assert moments.count == whole.shape[2] and moments.samples == sum(sizes)
    if moments.count == 0:
        assert moments.mean is None and moments.var is None
        return
    mean, var = _reference(whole)
    assert torch.allclose(moments.mean, mean, rtol=1e-10, atol=1e-10)
    assert torch.allclose(moments.var, var, rtol=1e-9, atol=1e-12)


def test_moments_of_several_processes():
    parts = [torch.randn(n, 2, 3, 3) + n for n in (2, 0, 5)]
    sent = []
    for part in parts:
        Moments(lambda t: sent.append(t.clone()) or [t]).add(part)
    gathered = []
    for part in parts:
        m = Moments(lambda t: sent)
        m.add(part)
        gathered.append(m)
    mean, var = _reference(torch.cat(parts))
    for m in gathered:
        assert m.count == 63 and m.samples == 7
        assert torch.equal(m.mean, gathered[0].mean) and torch.equal(m.var, gathered[0].var)
    assert torch.allclose(m.mean, mean, rtol=1e-5) and torch.allclose(m.var, var, rtol=1e-5)


def test_references_are_those_of_the_inputs_each_layer_sees():
    net, x = _net(), torch.randn(4, 3, 6, 6)
    with capture(net) as taken:
        net(x)
    assert taken == [("1", 4 * 16), ("6", 4 * 16)]
    seen = net[0](x)
    mean, var = _reference(seen)
    assert torch.allclose(net[1].ref_mean, mean.float(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(net[1].ref_var, var.float(), rtol=1e-4)
    assert net[1].ref_size == 4
    # The deeper layer saw the first one's input normalized by the reference just taken.
    hidden = (seen - mean.float().view(1, -1, 1, 1)) / (var.float() + 1e-5).sqrt().view(1, -1, 1, 1)
    hidden = nn.functional.batch_norm(hidden.relu(), None, None, training=True)
    mean, var = _reference(net[5](hidden))
    assert torch.allclose(net[6].ref_mean, mean.float(), rtol=1e-3, atol=1e-4)
    assert torch.allclose(net[6].ref_var, var.float(), rtol=1e-3)


def test_only_the_references_change():
    net = _net()
    net(torch.randn(4, 3, 6, 6))
    net.eval()
    net[2].train()
    before, modes = _state(net), [m.training for m in net.modules()]
    buffer = net[3].running_mean
    with capture(net):
        net(torch.randn(4, 3, 6, 6) * 2)
        assert not torch.is_grad_enabled()
    assert _differing(net, before) == {"1.ref_mean", "1.ref_var", "6.ref_mean", "6.ref_var"}
    assert [m.training for m in net.modules()] == modes
    assert net[3].running_mean is buffer
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in net.parameters())


def test_several_calls_add_up():
    x = torch.randn(6, 3, 5, 5)
    layers = [RefBatchNorm2d(3).double(), RefBatchNorm2d(3).double()]
    for layer, parts in zip(layers, ([x], [x[:1], x[1:1], x[1:]])):
        with capture(layer) as taken:
            for part in parts:
                layer(part.double())
        assert taken == [("", 150)] and layer.ref_size == 6
    assert torch.allclose(layers[0].ref_mean, layers[1].ref_mean, rtol=1e-12, atol=1e-12)
    assert torch.allclose(layers[0].ref_var, layers[1].ref_var, rtol=1e-12, atol=1e-12)


def test_parts_weigh_as_many_elements_as_they_have():
    layer = RefBatchNorm2d(1).double()
    with capture(layer):
        layer(torch.zeros(1, 1, 1, 3).double())
        layer(torch.ones(1, 1, 1, 1).double())
    assert layer.ref_mean.item() == pytest.approx(0.25)
    assert layer.ref_var.item() == pytest.approx(0.25 * 0.75)


def test_buffers_that_cannot_be_written_are_no_obstacle():
    net = _net()
    net.register_buffer("positions", torch.arange(6).expand(3, 6))
    with torch.inference_mode():
        net.register_buffer("pixel_std", torch.ones(3))
    before = _state(net)
    with capture(net) as taken:
        net(torch.randn(2, 3, 6, 6))
    assert [name for name, _ in taken] == ["1", "6"]
    assert {k.split(".")[-1][:3] for k in _differing(net, before)} == {"ref"}


def test_captures_of_the_same_layers_do_not_overlap():
    net, x = _net(), torch.randn(2, 3, 6, 6)
    alone = copy.deepcopy(net)
    with capture(alone):
        alone(x)
    with capture(net):
        with pytest.raises(ValueError, match="another capture"):
            with capture(net[1]):
                pass
        net(x)
    assert not _differing(net, alone.state_dict())


@pytest.mark.parametrize("captured", [True, False])
def test_an_error_leaves_everything_as_it_was(captured):
    net = _net().eval()
    if captured:
        with capture(net):
            net(torch.randn(2, 3, 6, 6))
    before = _state(net)
    with pytest.raises(KeyError, match="stop"):
        with capture(net):
            net(torch.randn(4, 3, 6, 6))
            raise KeyError("stop")
    assert not _differing(net, before)
    assert [net[i].has_reference for i in (1, 6)] == [captured, captured]
    assert not any(m.training for m in net.modules())
    net(torch.randn(2, 3, 6, 6))  # no longer capturing
    assert not _differing(net, {**before, "4.steps": net[4].steps})


def test_a_layer_that_saw_too_little_spoils_no_other():
    net = nn.Sequential(RefBatchNorm2d(3), nn.AdaptiveAvgPool2d(1), RefBatchNorm2d(3))
    before = _state(net)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        with capture(net):
            net(torch.randn(1, 3, 4, 4))
    assert not _differing(net, before) and not net[0].has_reference


def test_layers_that_are_not_reached_keep_what_they_had():
    net = nn.ModuleList([RefBatchNorm2d(3), RefBatchNorm2d(3), RefBatchNorm2d(3)])
    net[1].set_reference(torch.ones(3), torch.ones(3) * 2, size=7)
    with capture(net) as taken:
        net[0](torch.randn(2, 3, 4, 4))
        net[2](torch.randn(0, 3, 4, 4))
    assert [name for name, _ in taken] == ["0"]
    assert net[1].ref_var.tolist() == [2, 2, 2] and net[1].ref_size == 7
    assert not net[2].has_reference


def test_a_shared_layer_takes_one_reference():
    shared = VirtualBatchNorm2d(3)
    net = nn.ModuleList([shared, shared])
    a, b = torch.randn(2, 3, 4, 4), torch.randn(3, 3, 2, 2) + 1
    with capture(net) as taken:
        net[0](a)
        net[1](b)
    assert taken == [("0", 32 + 12)] and shared.ref_size == 5
    both = torch.cat([a.transpose(0, 1).flatten(1), b.transpose(0, 1).flatten(1)], 1)
    mean, var = _reference(both[None, :, :, None])
    assert torch.allclose(shared.ref_mean, mean.float(), rtol=1e-4, atol=1e-6)
    assert torch.allclose(shared.ref_var, var.float(), rtol=1e-4)


def test_pseudo_count_zero_is_captured_too():
    layer = RefBatchNorm2d(3, pseudo_count=0)
    with capture(layer):
        layer(torch.randn(2, 3, 4, 4) + 5)
    assert layer.has_reference and (layer.ref_mean > 3).all()


def test_capture_again_replaces_the_reference():
    layer = RefBatchNorm2d(3)
    for offset in (0.0, 9.0):
        with capture(layer):
            layer(torch.randn(4, 3, 8, 8) + offset)
    other = copy.deepcopy(layer)
    assert (other.ref_mean - 9).abs().max() < 1
