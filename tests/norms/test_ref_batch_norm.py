"""RefBatchNorm2d as a module: state, modes, and its similarity to nn.BatchNorm2d."""

import copy
import io
import logging
import pickle

import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from refbn_d2.norms import RefBatchNorm2d, ReferenceNorm2d


def _layer(c=3, **kwargs):
    layer = RefBatchNorm2d(c, **kwargs)
    mean, var = torch.randn(c), torch.rand(c) + 0.5
    layer.set_reference(mean, var, 100, 4)
    return layer


@pytest.mark.parametrize(
    "dtype, tol, channels_last",
    [
        (torch.float64, 1e-10, False),
        (torch.float32, 1e-5, False),
        (torch.float32, 1e-5, True),
        (torch.bfloat16, 2e-2, False),
    ],
)
@pytest.mark.parametrize("shape", [(4, 3, 6, 5), (1, 3, 4, 4)])
def test_training_step_equals_the_equations(dtype, tol, channels_last, shape):
    layer = _layer(pseudo_count=2.0, eps=1e-3)
    if dtype == torch.float64:
        layer.double()
    reference = layer.ref_mean.double(), layer.ref_var.double()

    def expected(x, weight, bias):
        return oracle.ref_bn(x, *reference, weight, bias, 2.0, 1e-3)[0]

    oracle.check_module(
        layer, expected, shape, dtype, tol, "weight", "bias", channels_last=channels_last
    )


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
def test_running_statistics_average_the_mixed_ones(momentum):
    layer = _layer(momentum=momentum).double()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    ones, zeros = torch.ones(3).double(), torch.zeros(3).double()
    for step in range(1, 4):
        x = torch.randn(3, 3, 4, 4).double() * 2
        layer(x)
        _, m, v = oracle.ref_bn(x, layer.ref_mean, layer.ref_var, ones, zeros)
        factor = 1 / step if momentum is None else momentum
        mean, var = mean + factor * (m - mean), var + factor * (v - var)
    assert torch.allclose(layer.running_mean, mean, rtol=1e-10, atol=1e-12)
    assert torch.allclose(layer.running_var, var, rtol=1e-10, atol=1e-12)
    assert layer.num_batches_tracked == 3


def test_eval_is_batch_norm_bit_for_bit_and_changes_nothing():
    layer, bn = _layer(), nn.BatchNorm2d(3)
    for _ in range(3):
        layer(torch.randn(4, 3, 5, 5))
    bn.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("ref_")})
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(layer.eval()(x), bn.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


class TestPseudoCountZero:
    """k = 0 is nn.BatchNorm2d."""

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("track", [True, False])
    def test_training_and_eval(self, momentum, affine, track):
        kwargs = dict(momentum=momentum, affine=affine, track_running_stats=track)
        ours, theirs = RefBatchNorm2d(3, pseudo_count=0, **kwargs), nn.BatchNorm2d(3, **kwargs)
        for training in (True, True, False):
            x = torch.randn(4, 3, 5, 5)
            results = []
            for layer in (ours.train(training), theirs.train(training)):
                xi = x.clone().requires_grad_()
                y = layer(xi)
                inputs = [xi, *layer.parameters()]
                results.append([y, *torch.autograd.grad((y**3).sum(), inputs)])
            assert all(torch.equal(a, b) for a, b in zip(*results))
        state = ours.state_dict()
        assert all(torch.equal(state[k], v) for k, v in theirs.state_dict().items())

    @pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 4, 4), (2, 5, 3, 3)])
    def test_errors(self, shape):
        x, errors = torch.randn(shape), []
        for layer in (RefBatchNorm2d(3, pseudo_count=0), nn.BatchNorm2d(3)):
            with pytest.raises(Exception) as e:
                layer(x)
            errors.append((e.type, str(e.value)))
        assert errors[0] == errors[1]

    def test_the_function_itself_agrees_to_rounding(self):
        # The layer above delegates; this is the shared arithmetic in the same place.
        from refbn_d2.norms import ref_batch_norm

        x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
        bn = nn.BatchNorm2d(3, momentum=1.0).double()
        y, mean, var = ref_batch_norm(x, torch.randn(3), torch.rand(3), pseudo_count=0)
        wanted = bn(x)
        assert torch.allclose(y, wanted, rtol=1e-12, atol=1e-12)
        assert torch.allclose(mean, bn.running_mean) and torch.allclose(var, bn.running_var)
        g = torch.randn_like(y)
        grads = [torch.autograd.grad(out, x, g)[0] for out in (y, wanted)]
        assert torch.allclose(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [0.0, 1.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("captured", [True, False])
def test_empty_batch(k, training, captured):
    layer = _layer(pseudo_count=k) if captured else RefBatchNorm2d(3, pseudo_count=k)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = layer.train(training)(x)
    assert y.shape == x.shape and y.requires_grad
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0, 0, 0]
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_one_value_per_channel_needs_a_reference():
    x = torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError, match="capture a reference batch before training"):
        RefBatchNorm2d(3)(x)
    layer = _layer()
    y = layer(x)
    wanted = oracle.ref_bn(x, layer.ref_mean, layer.ref_var, layer.weight, layer.bias)[0]
    assert oracle.relative_error(y, wanted) < 1e-5
    assert layer.running_var.isfinite().all()


def test_first_batch_is_the_fallback_reference_and_the_log_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(ReferenceNorm2d, "_fallback_logged", False)
    net = nn.Sequential(RefBatchNorm2d(3), RefBatchNorm2d(3))
    first = torch.randn(4, 3, 5, 5) * 3 + 1
    with caplog.at_level(logging.WARNING):
        net(first)
        reference = net[0].ref_mean.clone(), net[0].ref_var.clone()
        net(torch.randn(4, 3, 5, 5))
    assert len(caplog.records) == 1 and "No reference was captured" in caplog.text
    mean, var = oracle.moments(first, 0, 2, 3)
    assert torch.allclose(reference[0], mean.flatten(), rtol=1e-5, atol=1e-6)
    assert torch.allclose(reference[1], var.flatten(), rtol=1e-5)
    assert torch.equal(net[0].ref_mean, reference[0]) and net[0].ref_size == 4


def test_without_running_statistics_evaluation_needs_a_reference():
    layer = RefBatchNorm2d(3, track_running_stats=False).eval()
    x = torch.randn(4, 3, 5, 5)
    with pytest.raises(ValueError, match="no reference is captured"):
        layer(x)
    assert not layer.has_reference
    layer.set_reference(torch.zeros(3), torch.ones(3))
    wanted = oracle.ref_bn(x, torch.zeros(3), torch.ones(3), layer.weight, layer.bias)[0]
    assert oracle.relative_error(layer(x), wanted) < 1e-5


def test_without_affine():
    layer = _layer(affine=False)
    x = torch.randn(2, 3, 4, 4)
    wanted = oracle.ref_bn(x, layer.ref_mean, layer.ref_var, torch.ones(3), torch.zeros(3))[0]
    assert oracle.relative_error(layer(x), wanted) < 1e-5
    assert list(layer.parameters()) == []


@pytest.mark.parametrize("k", [-1.0, float("nan"), float("inf")])
def test_bad_pseudo_count(k):
    with pytest.raises(ValueError, match="pseudo_count must be a finite number >= 0"):
        RefBatchNorm2d(3, pseudo_count=k)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 4, 3, 3), (2, 1, 3, 3)])
def test_wrong_shape_is_an_error_that_changes_nothing(shape):
    for layer in (RefBatchNorm2d(3), _layer(), RefBatchNorm2d(1) if shape[1] == 4 else _layer()):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match="expected"):
            layer(torch.randn(shape))
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


class TestState:
    def test_round_trip(self):
        source, target = _layer(), RefBatchNorm2d(3)
        source(torch.randn(4, 3, 5, 5))
        target.load_state_dict(source.state_dict(), strict=True)
        assert target.has_reference
        x = torch.randn(4, 3, 5, 5)
        assert torch.equal(source(x), target(x))
        assert torch.equal(source.running_var, target.running_var)

    def test_names_are_batch_norms_and_the_references(self):
        own = set(RefBatchNorm2d(3).state_dict()) - set(nn.BatchNorm2d(3).state_dict())
        assert own == {"ref_mean", "ref_var", "ref_captured", "ref_size"}

    def test_uncaptured_round_trip(self):
        target = _layer()
        target.load_state_dict(RefBatchNorm2d(3).state_dict())
        assert not target.has_reference

    @pytest.mark.parametrize("captured", [True, False])
    def test_batch_norm_checkpoint_loads_strictly_and_drops_the_reference(self, captured):
        bn = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        bn(torch.randn(4, 2, 3, 3))
        net = nn.Sequential(nn.Conv2d(2, 3, 1), _layer() if captured else RefBatchNorm2d(3))
        result = net.load_state_dict(bn.state_dict(), strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert not net[1].has_reference and not net[1].ref_captured and net[1].ref_size == 0
        x = torch.randn(2, 2, 3, 3)
        assert torch.equal(net.eval()(x), bn.eval()(x))

    def test_old_batch_norm_checkpoint_without_counter(self):
        state = nn.BatchNorm2d(3).state_dict()
        del state["num_batches_tracked"], state._metadata
        assert not RefBatchNorm2d(3).load_state_dict(state, strict=True).missing_keys

    def test_half_a_reference_is_reported(self):
        state = _layer().state_dict()
        del state["ref_var"]
        with pytest.raises(RuntimeError, match="ref_var"):
            RefBatchNorm2d(3).load_state_dict(state)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"]
    )
    def test_copies_are_equal_and_independent(self, copied):
        layer = _layer(pseudo_count=3.0)
        if copied == "torch.save":
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        else:
            other = copied(layer)
        x = torch.randn(4, 3, 5, 5)
        assert other.has_reference and torch.equal(layer(x), other(x))
        other.drop_reference()
        assert layer.has_reference and layer.ref_captured

    def test_reset_parameters_forgets_the_reference(self):
        layer = _layer()
        layer(torch.randn(4, 3, 5, 5))
        layer.reset_parameters()
        fresh = RefBatchNorm2d(3).state_dict()
        assert all(torch.equal(v, fresh[k]) for k, v in layer.state_dict().items())
        assert not layer.has_reference

    def test_reference_of_one_value_is_refused(self):
        layer = RefBatchNorm2d(3)
        with pytest.raises(ValueError, match="more than 1 value per channel, got 1"):
            layer.set_reference(torch.zeros(3), torch.zeros(3), 1)
        assert not layer.has_reference

    def test_repr(self):
        assert "reference=not captured, pseudo_count=0.5" in repr(
            RefBatchNorm2d(3, pseudo_count=0.5)
        )
        assert "reference=captured, pseudo_count=1" in repr(_layer())


def _network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), RefBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    net[1].set_reference(torch.randn(4), torch.rand(4) + 0.5, 100, 4)
    return net


def _step(net, x, call=None):
    y = (call or net)(x)
    return y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))


# aot_eager is torch.compile without code generation, which would need a C++ compiler.
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_in_one_graph_it_is_the_same(layout):
    x = torch.randn(5, 3, 9, 8).contiguous(memory_format=layout)
    plain, compiled = _network(), _network()
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for wanted, actual in zip(_step(plain, x), _step(compiled, x, graph)):
            assert oracle.relative_error(actual, wanted) < 1e-5
    for key, wanted in plain.state_dict().items():
        assert oracle.relative_error(compiled.state_dict()[key], wanted) < 1e-5
    assert torch.allclose(graph.eval()(x), plain.eval()(x), atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_a_batch_twice_as_batch_norm_does(reentrant):
    x = torch.randn(5, 3, 9, 8, requires_grad=True)

    def call(x):
        return checkpoint(recomputed, x, use_reentrant=reentrant)

    for build, norm in ((_network, None), (_network, nn.BatchNorm2d(4))):
        plain, recomputed = build(), build()
        if norm is not None:
            plain[1], recomputed[1] = copy.deepcopy(norm), copy.deepcopy(norm)
        plain(x).square().sum().backward()
        call(x).square().sum().backward()
        for wanted, actual in zip(plain.parameters(), recomputed.parameters()):
            assert torch.equal(wanted.grad, actual.grad)
        plain(x)  # recomputing is one more forward pass in training mode
        state = recomputed[1].state_dict()
        assert state["num_batches_tracked"] == 2
        assert all(torch.equal(v, state[k]) for k, v in plain[1].state_dict().items())
