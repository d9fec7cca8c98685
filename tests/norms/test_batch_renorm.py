"""BatchRenorm2d against Algorithm 1 of its paper, and its schedule."""

import copy

import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from refbn_d2.norms import BatchRenorm2d

EPS = 1e-5


def _layer(step, momentum=0.01, **kwargs):
    """A layer with some history, ``step`` of 40 into its schedule."""
    layer = BatchRenorm2d(3, momentum=momentum, schedule_steps=40, **kwargs)
    layer.running_mean.copy_(torch.tensor([0.0, 1.0, -20.0]))
    layer.running_var.copy_(torch.tensor([400.0, 0.2, 6.0]))
    layer.num_batches_tracked.fill_(step)
    return layer


@pytest.mark.parametrize(
    "step, r_max, d_max",
    [(0, 1, 0), (5, 1, 0), (15, 1 + 2 * 10 / 35, 2.5), (25, 1 + 2 * 20 / 35, 5), (40, 3, 5)]
    + [(10**6, 3, 5)],
)
def test_schedule_of_the_paper(step, r_max, d_max):
    # With 1 for 1,000 steps: r_max 1 to 3 from 5k to 40k, d_max 0 to 5 from 5k to 25k.
    limits = [v.item() for v in _layer(step).limits()]
    assert limits == pytest.approx([r_max, d_max])
    default = BatchRenorm2d(1)
    default.num_batches_tracked.fill_(step * 1000)
    assert [v.item() for v in default.limits()] == pytest.approx([r_max, d_max])


@pytest.mark.parametrize(
    "dtype, tol, channels_last",
    [
        (torch.float64, 1e-10, False),
        (torch.float32, 1e-5, False),
        (torch.float32, 1e-5, True),
        (torch.bfloat16, 3e-2, False),
        (torch.float16, 5e-3, False),
    ],
)
@pytest.mark.parametrize("step, limits", [(0, (1, 0)), (15, (1 + 2 * 10 / 35, 2.5)), (40, (3, 5))])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (1, 3, 4, 4)])
def test_equals_algorithm_1(dtype, tol, channels_last, step, limits, shape):
    # Scale and means are such that r and d are clipped in some channels and not in others.
    layer = _layer(step).to(torch.promote_types(dtype, torch.float32))
    mu = layer.running_mean.double().clone()
    sigma = (layer.running_var.double() + EPS).sqrt()

    def expected(x, weight, bias):
        return oracle.renorm(x, mu, sigma, weight, bias, *limits, EPS)[0]

    oracle.check_module(
        layer, expected, shape, dtype, tol, "weight", "bias", channels_last=channels_last
    )


@pytest.mark.parametrize("momentum", [0.01, 0.5, None])
def test_moving_averages_are_of_sigma(momentum):
    layer = BatchRenorm2d(3, momentum=momentum).double()
    mu, sigma = torch.zeros(3).double(), torch.full((3,), 1 + EPS, dtype=torch.float64).sqrt()
    for step in range(1, 5):
        x = torch.randn(2, 3, 3, 3).double() * step
        layer(x)
        ones = torch.ones(3).double()
        _, mean_b, sigma_b = oracle.renorm(x, mu, sigma, ones, ones, 1, 0, EPS)
        factor = 1 / step if momentum is None else momentum
        mu, sigma = mu + factor * (mean_b - mu), sigma + factor * (sigma_b - sigma)
    assert torch.allclose(layer.running_mean, mu, rtol=1e-10, atol=1e-12)
    assert torch.allclose((layer.running_var + EPS).sqrt(), sigma, rtol=1e-10, atol=1e-12)
    # Inference: y = weight (x - mu) / sigma + bias, and exactly what BatchNorm makes of it.
    x = torch.randn(2, 3, 3, 3).double()
    bn = nn.BatchNorm2d(3).double().eval()
    bn.load_state_dict(layer.state_dict())
    y = layer.eval()(x)
    assert torch.allclose(
        y, (x - oracle.channel(mu)) / oracle.channel(sigma), rtol=1e-9, atol=1e-12
    )
    assert torch.equal(y, bn(x))


def test_begins_as_batch_norm():
    ours, theirs = BatchRenorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5) * 3 + 2
    assert torch.allclose(ours(x), theirs(x), rtol=1e-6)


def test_ends_as_its_moving_averages():
    # Within the limits, Batch Renormalization in training equals inference before the update.
    layer = _layer(40, momentum=0.0)
    layer.running_mean.zero_()
    x = torch.randn(4, 3, 6, 6)
    assert torch.allclose(layer(x)[:, 2], layer.eval()(x)[:, 2], rtol=1e-4, atol=1e-5)


def test_gradcheck():
    # r and d have no gradient by definition, so a numerical one exists only where both are clipped.
    layer = _layer(40, momentum=0.0).double()
    layer.running_mean.fill_(-1e5)
    layer.running_var.fill_(1e4)
    x = torch.randn(3, 3, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.weight, layer.bias))


def test_without_affine():
    layer = _layer(40, affine=False)
    mu, sigma = layer.running_mean.clone(), (layer.running_var + EPS).sqrt()
    x = torch.randn(4, 3, 5, 5)
    y = oracle.renorm(x, mu, sigma, torch.ones(3), torch.zeros(3), 3, 5, EPS)[0]
    assert oracle.relative_error(layer(x), y) < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    layer = _layer(10).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 4, 4)
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0, 0, 0]
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 4, 4), (2, 5, 3, 3)])
def test_what_batch_norm_refuses_is_refused_and_changes_nothing(shape):
    layer = _layer(10)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(shape))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_constant_input_keeps_the_variance_positive():
    layer = BatchRenorm2d(3, momentum=1.0)
    layer(torch.ones(2, 3, 4, 4))
    assert (layer.running_var >= 0).all() and (layer.running_var < 1e-9).all()
    assert layer.eval()(torch.randn(2, 3, 4, 4)).isfinite().all()


def test_state_dict_is_batch_norms_and_holds_the_schedule():
    source = _layer(15)
    assert list(source.state_dict()) == list(nn.BatchNorm2d(3).state_dict())
    target = BatchRenorm2d(3, schedule_steps=40)
    target.load_state_dict(source.state_dict(), strict=True)
    assert target.limits() == source.limits()
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(target(x), source(x))


def test_impossible_settings():
    with pytest.raises(ValueError, match="schedule_steps must be >= 1, got 0"):
        BatchRenorm2d(3, schedule_steps=0)
    with pytest.raises(ValueError, match="needs running statistics"):
        BatchRenorm2d(3, track_running_stats=False)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("calls", [1, 3])
def test_activation_checkpointing_changes_no_gradient(reentrant, calls):
    """The backward pass recomputes with the r and d of the forward pass, though averages moved."""
    torch.manual_seed(1)
    base = nn.Sequential(nn.Conv2d(3, 4, 1), BatchRenorm2d(4, schedule_steps=4))
    for _ in range(6):  # past the schedule's start, where r and d are 1 and 0
        base(torch.randn(4, 3, 4, 4))
    x = 2 * torch.randn(4, 3, 4, 4) + 1

    def gradients(run):
        model, leaf = copy.deepcopy(base), x.clone().requires_grad_()
        out = sum(run(model, leaf * (k + 1)).pow(3).sum() for k in range(calls))
        out.backward()
        return [leaf.grad, *(p.grad for p in model.parameters())]

    plain = gradients(lambda model, x: model(x))
    saved = gradients(lambda model, x: checkpoint(model, x, use_reentrant=reentrant))
    for a, b in zip(plain, saved):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


def test_passes_on_another_device_are_not_recalled():
    with torch.device("meta"):
        norm = BatchRenorm2d(4)
    norm(torch.empty(2, 4, 3, 3, device="meta"))
    norm.to_empty(device="cpu").load_state_dict(nn.BatchNorm2d(4).state_dict())
    plain, x = copy.deepcopy(norm), torch.randn(2, 4, 3, 3, requires_grad=True)
    (wanted,) = torch.autograd.grad(plain(x).pow(3).sum(), x)
    (grad,) = torch.autograd.grad(checkpoint(norm, x, use_reentrant=False).pow(3).sum(), x)
    assert torch.equal(grad, wanted)


def test_running_statistics_that_are_taken_away_or_frozen():
    norm, theirs, x = BatchRenorm2d(4), nn.BatchNorm2d(4), torch.randn(2, 4, 3, 3)
    norm.track_running_stats = False
    norm(x)
    assert norm.running_mean.tolist() == [0] * 4 and norm.num_batches_tracked == 0
    norm.track_running_stats = True
    for m in (norm, theirs):
        torch.func.replace_all_batch_norm_modules_(m)
    assert torch.equal(norm(x), theirs(x)) and torch.equal(norm.eval()(x), theirs.eval()(x))
