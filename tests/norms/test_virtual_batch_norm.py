"""VirtualBatchNorm2d against the equations of its paper, with a captured reference."""

import copy

import oracle
import pytest
import torch
from torch import nn

from refbn_d2.norms import VirtualBatchNorm2d, capture


def _layer(c=3, n=5, **kwargs):
    """A layer with the reference of n random images, in float64."""
    layer = VirtualBatchNorm2d(c, **kwargs).double()
    with capture(layer):
        layer(torch.randn(n, c, 4, 4).double() * 2 + 1)
    assert layer.ref_size == n
    return layer


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
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (1, 3, 4, 4), (1, 3, 1, 1)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n", [1, 7])
def test_equals_the_equations_in_training_and_eval(dtype, tol, channels_last, shape, training, n):
    layer = _layer(n=n).to(torch.promote_types(dtype, torch.float32)).train(training)
    reference = layer.ref_mean.double(), layer.ref_var.double()

    def expected(x, weight, bias):
        return oracle.virtual(x, *reference, n, weight, bias)[0]

    oracle.check_module(
        layer, expected, shape, dtype, tol, "weight", "bias", channels_last=channels_last
    )


@pytest.mark.parametrize("training", [True, False])
def test_samples_do_not_influence_each_other(training):
    layer = _layer().train(training)
    x = torch.randn(3, 3, 4, 4).double()
    together = layer(x)
    apart = torch.cat([layer(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, apart, rtol=1e-12, atol=1e-12)


def test_mixing_is_pooling_with_the_reference_images():
    # The mean and mean of squares, mixed 1 : n, are those of the n + 1 images together.
    reference, x = torch.randn(4, 3, 5, 5).double() + 3, torch.randn(1, 3, 5, 5).double() * 2
    layer = VirtualBatchNorm2d(3).double()
    with capture(layer):
        layer(reference)
    pooled = nn.functional.batch_norm(torch.cat([x, reference]), None, None, training=True)
    assert torch.allclose(layer(x), pooled[:1], rtol=1e-10, atol=1e-12)


def test_gradcheck():
    layer = _layer(momentum=0.0)
    x = torch.randn(2, 3, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.weight, layer.bias))


def test_running_statistics_are_the_mean_of_what_normalized():
    layer = _layer(momentum=1.0)
    x = torch.randn(3, 3, 4, 4).double() * 3
    layer(x)
    ones = torch.ones(3).double()
    _, mean, var = oracle.virtual(x, layer.ref_mean, layer.ref_var, 5, ones, ones)
    assert torch.allclose(layer.running_mean, mean.mean((0, 2, 3)), rtol=1e-10, atol=1e-12)
    assert torch.allclose(layer.running_var, var.mean((0, 2, 3)), rtol=1e-10, atol=1e-12)
    before = layer.running_mean.clone()
    layer.eval()(x + 1)
    assert torch.equal(layer.running_mean, before)


def test_capture_normalizes_the_reference_by_itself():
    layer, x = VirtualBatchNorm2d(3), torch.randn(4, 3, 5, 5) * 2 + 1
    with capture(layer):
        y = layer(x)
    wanted = nn.functional.batch_norm(x, None, None, training=True)
    assert torch.allclose(y, wanted, rtol=1e-4, atol=1e-5)


def test_a_batch_norm_checkpoint_evaluates_as_batch_norm_until_a_reference_is_captured():
    bn, layer = nn.BatchNorm2d(3), _layer().float()
    bn(torch.randn(4, 3, 5, 5) + 2)
    layer.load_state_dict(bn.state_dict(), strict=True)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(layer.eval()(x), bn.eval()(x))
    layer.train()(x)  # the fallback reference
    assert layer.ref_size == 2 and not torch.allclose(layer.eval()(x), bn(x), atol=1e-3)


def test_state_dict_keeps_the_size():
    source, target = _layer(n=6), VirtualBatchNorm2d(3).double()
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 4, 4).double()
    assert target.ref_size == 6 and torch.equal(source.eval()(x), target.eval()(x))


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(captured, training):
    layer = (_layer() if captured else VirtualBatchNorm2d(3).double()).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(0, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 4, 4)
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0, 0, 0]
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_a_reference_of_unknown_size_is_refused():
    layer = VirtualBatchNorm2d(3)
    with pytest.raises(ValueError, match="number of samples"):
        layer.set_reference(torch.zeros(3), torch.ones(3), 100)
    assert not layer.has_reference


def test_without_affine():
    layer = _layer(affine=False)
    x = torch.randn(2, 3, 4, 4).double()
    one, zero = torch.ones(3).double(), torch.zeros(3).double()
    wanted = oracle.virtual(x, layer.ref_mean, layer.ref_var, 5, one, zero)[0]
    assert torch.allclose(layer(x), wanted, rtol=1e-10, atol=1e-12)
