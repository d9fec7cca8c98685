"""SwitchableNorm2d against the equations of its paper."""

import copy

import oracle
import pytest
import torch
from torch import nn

from refbn_d2.norms import SwitchableNorm2d

PARAMETERS = ("weight", "bias", "mean_weight", "var_weight")


@pytest.mark.parametrize(
    "dtype, tol",
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)],
)
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 4, 3, 3), (3, 4, 1, 1), (1, 4, 1, 1)])
def test_training_equals_the_equations(dtype, tol, shape):
    layer = SwitchableNorm2d(4).to(torch.promote_types(dtype, torch.float32))
    # Where statistics coincide (one sample, one pixel) the gradients of their weights cancel.
    cancels = shape[0] == 1 or shape[2] == 1
    oracle.check_module(layer, oracle.switchable, shape, dtype, tol, *PARAMETERS, cancels=cancels)


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_eval_takes_the_running_statistics_for_batch_norm(dtype, tol):
    layer = SwitchableNorm2d(4).to(dtype)
    layer.running_mean.copy_(torch.randn(4))
    layer.running_var.copy_(torch.rand(4) + 0.5)
    batch = layer.running_mean.double(), layer.running_var.double()
    before = copy.deepcopy(layer.state_dict())

    def expected(*args):
        return oracle.switchable(*args, batch=batch)

    oracle.check_module(layer.eval(), expected, (2, 4, 5, 5), dtype, tol, *PARAMETERS)
    assert all(torch.equal(getattr(layer, k), before[k]) for k in ("running_mean", "running_var"))


@pytest.mark.parametrize("k, own", [(0, "instance"), (1, "layer"), (2, "batch")])
def test_each_extreme_is_the_norm_it_is_named_after(k, own):
    layer = SwitchableNorm2d(4)
    with torch.no_grad():
        for p in (layer.mean_weight, layer.var_weight):
            p.fill_(-100)
            p[k] = 100
    x = torch.randn(3, 4, 5, 5) * 2 + 1
    theirs = {
        "instance": nn.InstanceNorm2d(4),
        "layer": nn.GroupNorm(1, 4),
        "batch": nn.BatchNorm2d(4),
    }[own]
    assert torch.allclose(layer(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, 0.6, None])
def test_running_statistics_are_of_the_batch_without_bessel(momentum):
    layer = SwitchableNorm2d(4, momentum=momentum).double()
    mean, var = torch.zeros(4).double(), torch.ones(4).double()
    for step in range(1, 4):
        x = torch.randn(2, 4, 3, 3).double() * step + 1
        layer(x)
        m, v = (t.flatten() for t in oracle.moments(x, 0, 2, 3))
        factor = 1 / step if momentum is None else momentum
        mean, var = mean + factor * (m - mean), var + factor * (v - var)
    assert torch.allclose(layer.running_mean, mean, rtol=1e-10, atol=1e-12)
    assert torch.allclose(layer.running_var, var, rtol=1e-10, atol=1e-12)
    assert layer.num_batches_tracked == 3


def test_large_means_do_not_cost_the_variance():
    layer, x = SwitchableNorm2d(4), torch.randn(2, 4, 8, 8) + 1000
    parameters = [getattr(layer, p).detach().double() for p in PARAMETERS]
    assert oracle.relative_error(layer(x), oracle.switchable(x.double(), *parameters)) < 1e-3


def test_gradcheck():
    layer = SwitchableNorm2d(3, momentum=0.0).double()
    x = torch.randn(3, 3, 2, 2).double().requires_grad_()
    params = tuple(getattr(layer, p) for p in PARAMETERS)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *params))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(training, shape):
    layer = SwitchableNorm2d(3).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    for p in layer.parameters():  # every one of them: DistributedDataParallel waits for each
        assert p.grad is not None and p.grad.abs().max() == 0
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_batch_norm_code_does_not_find_it_norm_code_does():
    layer = SwitchableNorm2d(3)
    assert not isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm))
    assert isinstance(layer, nn.InstanceNorm2d)


def test_state_dict():
    layer = SwitchableNorm2d(3)
    names = set(layer.state_dict())
    assert names == set(nn.BatchNorm2d(3).state_dict()) | {"mean_weight", "var_weight"}
    layer(torch.randn(2, 3, 4, 4))
    layer.mean_weight.data[0] = 5
    other = SwitchableNorm2d(3)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(layer.eval()(x), other.eval()(x))
    layer.reset_parameters()
    fresh = SwitchableNorm2d(3).state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (3, 4, 4)])
def test_wrong_shape(shape):
    with pytest.raises(ValueError, match="expected .N, 3, H, W."):
        SwitchableNorm2d(3)(torch.randn(shape))
