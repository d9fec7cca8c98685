"""InstanceNorm2d against its equation, also where torch's own raises an error."""

import oracle
import pytest
import torch
from torch import nn

from refbn_d2.norms import InstanceNorm2d


@pytest.mark.parametrize(
    "dtype, tol",
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)],
)
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 4, 2, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_equation(dtype, tol, shape, training):
    layer = InstanceNorm2d(4).train(training)
    layer.to(torch.promote_types(dtype, torch.float32))
    oracle.check_module(layer, oracle.instance, shape, dtype, tol, "weight", "bias")


def test_state_is_batch_norms_parameters_and_starts_as_the_identity():
    layer = InstanceNorm2d(3)
    assert list(layer.state_dict()) == ["weight", "bias"]
    bn = nn.BatchNorm2d(3)
    assert torch.equal(layer.weight, bn.weight) and torch.equal(layer.bias, bn.bias)
    # Where detectron2 looks for norms: no weight decay for them, and no freezing as BatchNorm.
    assert isinstance(layer, nn.InstanceNorm2d) and not isinstance(layer, nn.BatchNorm2d)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_per_map_is_the_bias(training, dtype):
    layer = InstanceNorm2d(3).train(training)
    layer.bias.data = torch.tensor([1.0, -2.0, 0.5])
    x = torch.randn(2, 3, 1, 1, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype and y.flatten(1).tolist() == [[1, -2, 0.5]] * 2
    y.sum().backward()
    assert x.grad.abs().max() == 0 and layer.weight.grad.abs().max() == 0
    assert layer.bias.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 3, 1, 1), (2, 3, 0, 4)])
def test_empty(shape):
    layer = InstanceNorm2d(3)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 4, 1, 1), (0, 4, 3, 3), (5, 3)])
def test_wrong_shape(shape):
    with pytest.raises(ValueError, match="expected"):
        InstanceNorm2d(3)(torch.randn(shape))
