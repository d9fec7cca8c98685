"""RefBN's forward, gradient and statistics against the paper's equations in float64 autograd."""

from functools import partial

import oracle
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from refbn_d2.norms import functional
from refbn_d2.norms.functional import (
    batch_moments,
    batch_statistics,
    mixed_norm,
    ref_batch_norm,
    sample_norm,
)
from refbn_d2.norms.kernels.cpu_aten import CpuAten

SHAPES = [(4, 3, 5, 7), (1, 3, 4, 4), (2, 1, 3, 3), (5, 3, 1, 1), (1, 3, 1, 1), (2, 6, 1, 9)]


def _inputs(shape, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    c = shape[1]
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype)
    weight, bias = torch.randn(c).double().to(dtype), torch.randn(c).double().to(dtype)
    ref_mean, ref_var = torch.randn(c).double().to(dtype), torch.rand(c).double().to(dtype) + 0.5
    return x, weight, bias, ref_mean, ref_var


def _compare(shape, dtype, k, tol, channels_last=False):
    x, weight, bias, ref_mean, ref_var = _inputs(shape, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y, mean, var = ref_batch_norm(x, ref_mean, ref_var, weight, bias, k)
    wanted = oracle.ref_bn(exact[0], ref_mean.double(), ref_var.double(), *exact[1:], k)
    for a, b in zip((y, mean, var), wanted):
        assert oracle.relative_error(a, b) < tol
    g = torch.randn(shape, dtype=torch.float64).to(dtype)
    grads = oracle.gradients(y, g, *leaves)
    for a, b in zip(grads, oracle.gradients(wanted[0], g.double(), *exact)):
        # One value per channel without a reference: the gradient is zero up to cancellation.
        assert oracle.relative_error(a, b) < tol or float(b.abs().max()) < 1e-12
    return y


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [0.0, 0.5, 1.0, 4.0])
def test_equals_the_equations_in_float64(shape, k):
    _compare(shape, torch.float64, k, 1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_equals_the_equations_in_float32(shape, channels_last):
    y = _compare(shape, torch.float32, 1.0, 1e-5, channels_last)
    if channels_last:
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype, tol", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_narrow_input_loses_no_more_than_its_own_rounding(dtype, tol):
    x, weight, bias, ref_mean, ref_var = _inputs((4, 3, 16, 16), torch.float32)
    x = x.to(dtype).requires_grad_()
    y, mean, var = ref_batch_norm(x, ref_mean, ref_var, weight, bias)
    exact = x.detach().double().requires_grad_()
    affine = [t.double() for t in (ref_mean, ref_var, weight, bias)]
    wanted = oracle.ref_bn(exact, *affine)
    assert y.dtype == dtype and mean.dtype == var.dtype == torch.float32
    assert oracle.relative_error(mean, wanted[1]) < 1e-5
    assert oracle.relative_error(var, wanted[2]) < 1e-5
    assert oracle.relative_error(y, wanted[0]) < tol
    g = torch.randn(x.shape).to(dtype)
    (grad,) = oracle.gradients(y, g, x)
    assert grad.dtype == dtype
    assert oracle.relative_error(grad, oracle.gradients(wanted[0], g.double(), exact)[0]) < tol


def test_statistics_of_many_bfloat16_values_keep_their_digits():
    x = (torch.randn(4, 2, 128, 128) + 10).bfloat16()
    mean, var = batch_moments(x)
    wanted = oracle.moments(x.double(), 0, 2, 3)
    assert oracle.relative_error(mean, wanted[0].flatten()) < 1e-6
    assert oracle.relative_error(var, wanted[1].flatten()) < 1e-4


@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(affine):
    x, weight, bias, ref_mean, ref_var = _inputs((3, 2, 2, 3))
    leaves = (x, weight, bias) if affine else (x,)

    def forward(x, *affine):
        return ref_batch_norm(x, ref_mean, ref_var, *affine)[0]

    assert torch.autograd.gradcheck(forward, [t.requires_grad_() for t in leaves])


def test_no_gradient_reaches_reference_or_statistics():
    x, weight, bias, ref_mean, ref_var = _inputs((3, 2, 2, 3))
    ref_mean.requires_grad_()
    y, mean, var = ref_batch_norm(x.requires_grad_(), ref_mean, ref_var, weight, bias)
    assert not mean.requires_grad and not var.requires_grad
    y.sum().backward()
    assert ref_mean.grad is None


def test_an_output_without_a_gradient_has_one_of_zeros():
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.sum()

        @staticmethod
        def backward(ctx, g):
            return None

    x, weight, bias, ref_mean, ref_var = _inputs((3, 2, 2, 3))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    Drop.apply(ref_batch_norm(x, ref_mean, ref_var, weight, bias)[0]).backward()
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["NCHW", "last"])
def leaves(request):
    x, weight, bias, *_ = _inputs((3, 2, 2, 3))
    return [x.contiguous(memory_format=request.param), weight, bias]


def _function(k, norm=ref_batch_norm):
    _, _, _, ref_mean, ref_var = _inputs((3, 2, 2, 3))
    return lambda x, weight, bias: norm(x, ref_mean, ref_var, weight, bias, k)[0]


@pytest.mark.parametrize("k", [0.0, 1.0])
def test_second_derivative(leaves, k):
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradgradcheck(_function(k), leaves)


def _batch_norm(x, weight, bias):
    return torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)


@pytest.mark.parametrize(
    "k, wanted, order",
    [
        (0.0, _batch_norm, 2),  # it has no third
        (1.0, _function(1.0, oracle.ref_bn), 2),
        (1.0, _function(1.0, oracle.ref_bn), 3),
    ],
)
def test_derivatives_of_higher_order(leaves, k, wanted, order):
    results = []
    for function in (_function(k), wanted):
        inputs = [t.clone().requires_grad_() for t in leaves]
        value = function(*inputs).pow(3).sum()
        for _ in range(order):
            gradients = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum(g.square().sum() for g in gradients)
        results.append(gradients)
    for actual, expected in zip(*results):
        assert oracle.relative_error(actual, expected) < 1e-9


def test_second_derivative_in_float32():
    x, weight, bias, ref_mean, ref_var = _inputs((4, 3, 8, 8), torch.float32)
    results = []
    for dtype, norm in ((torch.float32, ref_batch_norm), (torch.float64, oracle.ref_bn)):
        leaf = x.to(dtype).requires_grad_()
        vectors = (v.to(dtype) for v in (ref_mean, ref_var, weight, bias))
        value = norm(leaf, *vectors)[0].pow(3).sum()
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    assert oracle.relative_error(*results) < 1e-4


def test_a_part_of_a_batch_has_no_second_derivative():
    x, weight, bias, ref_mean, ref_var = _inputs((3, 2, 2, 3))
    vectors = ref_mean, ref_var, weight, bias
    y = mixed_norm(x.requires_grad_(), batch_statistics(x), *vectors, all_reduce=lambda t: None)[0]
    (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_forward_mode(leaves):
    assert torch.autograd.gradcheck(
        _function(1.0), [t.requires_grad_() for t in leaves], check_forward_ad=True
    )


TRANSFORMS = {
    "grad": lambda f, *a: torch.func.grad(lambda *a: f(*a).pow(3).sum(), (0, 1, 2))(*a),
    "vjp": lambda f, *a: torch.func.vjp(f, *a)[1](a[0]),
    "jvp": lambda f, *a: torch.func.jvp(f, a, a),
    "hessian": lambda f, *a: torch.func.hessian(lambda *a: f(*a).pow(3).sum())(*a),
    "jacrev": lambda f, *a: torch.func.jacrev(f, argnums=(0, 1))(*a),
    "vmap": lambda f, *a: torch.func.vmap(f)(*(torch.stack([t, 2 * t]) for t in a)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func(leaves, transform):
    apply = TRANSFORMS[transform]
    actual = torch.utils._pytree.tree_leaves(apply(_function(1.0), *leaves))
    wanted = torch.utils._pytree.tree_leaves(apply(_function(1.0, oracle.ref_bn), *leaves))
    assert len(actual) == len(wanted)
    for a, b in zip(actual, wanted):
        assert oracle.relative_error(a, b) < 1e-9


def test_statistics_are_constants_of_a_transform():
    x, _, _, ref_mean, ref_var = _inputs((3, 2, 2, 3))

    def through_statistics(x):
        _, mean, var = ref_batch_norm(x, ref_mean, ref_var)
        return (mean + var + batch_moments(x)[1]).sum()

    assert torch.func.grad(through_statistics)(x).abs().max() == 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_checkpointing(compiled, reentrant, monkeypatch):
    # It refuses to hand out a saved tensor twice.
    if not compiled:
        monkeypatch.setattr(functional, "kernels_for", lambda x: CpuAten())
    x, weight, bias, ref_mean, ref_var = _inputs((3, 2, 2, 3))
    results = []
    for call in (lambda f, *a: f(*a), partial(checkpoint, use_reentrant=reentrant)):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = call(lambda x, w, b: ref_batch_norm(x, ref_mean, ref_var, w, b)[0], *inputs)
        y.pow(3).sum().backward()
        results.append([t.grad for t in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_non_contiguous_input_and_expanded_gradient():
    x, weight, bias, ref_mean, ref_var = _inputs((3, 2, 4, 6))
    view = x.transpose(2, 3)[:, :, ::2].requires_grad_()
    assert not view.is_contiguous()
    exact = view.detach().clone().requires_grad_()
    y = ref_batch_norm(view, ref_mean, ref_var, weight, bias)[0]
    wanted = oracle.ref_bn(exact, ref_mean, ref_var, weight, bias)[0]
    ones = torch.ones((), dtype=y.dtype).expand_as(y)
    (grad,) = torch.autograd.grad(y, view, ones)
    assert oracle.relative_error(y, wanted) < 1e-10
    # The gradient is small against its parts here: it would be zero in BatchNorm.
    assert (grad - oracle.gradients(wanted, ones, exact)[0]).abs().max() < 1e-12


def test_autocast_does_not_narrow_the_gradient():
    x, weight, bias, ref_mean, ref_var = _inputs((4, 3, 8, 8), torch.float32)
    grads = []
    for enabled in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = ref_batch_norm(leaves[0], ref_mean, ref_var, leaves[1], bias)[0]
            assert y.dtype == torch.float32
            (y**3).sum().backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_bfloat16_under_autocast_is_as_without():
    # What a convolution under autocast hands to a norm whose parameters are float32.
    x, weight, bias, ref_mean, ref_var = _inputs((4, 3, 8, 8), torch.float32)
    results = []
    for enabled in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x.bfloat16(), weight, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, *statistics = ref_batch_norm(leaves[0], ref_mean, ref_var, *leaves[1:])
        assert y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert [t.dtype for t in grads] == [torch.bfloat16, torch.float32, torch.float32]
        results.append((y, *statistics, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_does_not_narrow_statistics_that_come_from_blocks(dtype, monkeypatch):
    monkeypatch.setattr(functional, "kernels_for", lambda x: CpuAten())
    torch.manual_seed(0)
    x = (torch.randn(8, 16, 64, 64) + 4).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        mean, var = batch_moments(x)
    wanted = oracle.moments(x.double(), 0, 2, 3)
    assert oracle.relative_error(mean, wanted[0].flatten()) < 1e-5
    assert oracle.relative_error(var, wanted[1].flatten()) < 1e-4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_an_empty_part_has_an_empty_gradient(layout, shape):
    _, weight, bias, ref_mean, ref_var = _inputs((2, 3, 4, 4))
    batch = batch_statistics(torch.randn(2, 3, 4, 4).double())
    leaves = [torch.empty(shape).double().contiguous(memory_format=layout), weight, bias]
    leaves = [t.requires_grad_() for t in leaves]
    y = mixed_norm(leaves[0], batch, ref_mean, ref_var, *leaves[1:])[0]
    assert y.shape == shape
    grads = torch.autograd.grad(y.sum(), leaves)
    assert grads[0].shape == shape
    assert grads[1].tolist() == grads[2].tolist() == [0, 0, 0]


def test_parts_of_a_batch_with_the_whole_batchs_statistics():
    # What SyncRefBN does, in one process: the sums that all_reduce would add are given by hand.
    x, weight, bias, ref_mean, ref_var = _inputs((5, 3, 4, 4))
    whole = x.clone().requires_grad_()
    g = torch.randn_like(x)
    wanted = ref_batch_norm(whole, ref_mean, ref_var, weight, bias)[0]
    (wanted_grad,) = oracle.gradients(wanted, g, whole)

    batch, parts = batch_statistics(x), (slice(0, 2), slice(2, 2), slice(2, 5))
    sums = []

    def collect(t):
        sums.append(t.clone())

    for replay in (False, True):
        reduce = (lambda t: t.copy_(sum(sums))) if replay else collect
        for part in parts:
            xp = x[part].clone().requires_grad_()
            y = mixed_norm(xp, batch, ref_mean, ref_var, weight, bias, all_reduce=reduce)[0]
            (grad,) = oracle.gradients(y, g[part], xp)
            if replay:
                assert torch.allclose(y, wanted[part], rtol=1e-12, atol=1e-12)
                assert torch.allclose(grad, wanted_grad[part], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_sample_norm(affine):
    x, weight, bias, _, _ = _inputs((3, 2, 4, 5))
    mean, var = torch.randn(3, 2).double(), torch.rand(3, 2).double() + 0.1
    y = sample_norm(x, mean, var, *((weight, bias) if affine else ()), eps=0.1)
    for n in range(3):
        for c in range(2):
            wanted = (x[n, c] - mean[n, c]) / (var[n, c] + 0.1) ** 0.5
            wanted = wanted * weight[c] + bias[c] if affine else wanted
            assert torch.allclose(y[n, c], wanted, rtol=1e-12, atol=1e-12)
