"""The operators that replace the kernels for tracers, dispatch modes and tensor subclasses."""

import oracle
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from refbn_d2.norms import RefBatchNorm2d
from refbn_d2.norms.functional import batch_moments, batch_statistics, mixed_norm, ref_batch_norm

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
OPS = torch.ops.refbn_d2


def _arguments(name, dtype=torch.float64, layout="NCHW", shape=(4, 3, 5, 2)):
    c = shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    x, g = (
        torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2)
    )
    a, b, d, e = (torch.randn(c, dtype=wide) for _ in range(4))
    var = torch.rand(c, dtype=wide) + 0.5
    return {
        "moments": (x,),
        "normalize": (x, a, b, d),
        "sums": (g, x, a, var),
        "input_gradient": (g, x, a, b, d, e),
        "forward": (x, a, var, d, e, 1.5, 1e-5),
        "backward": (g, x, d, a, a, var, 1.5),
    }[name]


NAMES = ["moments", "normalize", "sums", "input_gradient", "forward", "backward"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype, layout):
    arguments = [
        t.requires_grad_() if isinstance(t, torch.Tensor) else t
        for t in _arguments(name, dtype, layout)
    ]
    torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("name", ["normalize", "sums", "input_gradient", "moments"])
def test_gradients_of_the_pieces(name):
    arguments = [t.requires_grad_() for t in _arguments(name)]
    assert torch.autograd.gradcheck(getattr(OPS, name), arguments)


def test_gradients_of_the_whole():
    x, ref_mean, ref_var, weight, bias, *constants = _arguments("forward")

    def forward(x, weight, bias):
        return OPS.forward(x, ref_mean, ref_var, weight, bias, *constants)[0]

    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(forward, leaves)
    assert torch.autograd.gradgradcheck(forward, leaves)
    assert not any(t.requires_grad for t in OPS.forward(*_arguments("forward"))[1:])


def test_arguments_need_not_be_dense():
    x, *others = _arguments("forward")
    view = x.transpose(2, 3)[:, :, :, ::2]
    wanted = oracle.ref_bn(view, *others)
    for a, b in zip(OPS.forward(view, *others), wanted):
        assert oracle.relative_error(a, b) < 1e-10


@pytest.mark.parametrize("name", ["normalize", "sums", "input_gradient", "forward", "backward"])
def test_a_vector_that_is_too_short_is_an_error(name):
    arguments = list(_arguments(name))
    arguments[-1 if name == "sums" else -3] = torch.ones(2).double()
    with pytest.raises(ValueError, match="expected 3 values"):
        getattr(OPS, name)(*arguments)


def _norm(x):
    return ref_batch_norm(x, torch.zeros(3), torch.ones(3))[0]


def _part(x):
    # As SyncRefBN, with a stand-in for the sum over the processes.
    batch = batch_statistics(x)
    return mixed_norm(x, batch, torch.zeros(3), torch.ones(3), all_reduce=lambda t: t.mul_(1))[0]


@pytest.mark.parametrize("function", [_norm, _part, lambda x: torch.stack(batch_moments(x))])
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(function, mode):
    x = torch.randn(4, 3, 8, 8)
    graph = make_fx(function, tracing_mode=mode)(x)
    other = torch.randn(6 if mode == "symbolic" else 4, 3, 8, 8) + 1
    assert torch.equal(graph(other), function(other))


def test_make_fx_of_a_gradient():
    def gradient(x):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(_norm(leaf).pow(3).sum(), leaf)[0]

    x, other = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    assert torch.equal(make_fx(gradient)(x)(other), gradient(other))


def test_what_has_no_memory_of_its_own():
    with FakeTensorMode():
        x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        y = _norm(x)
        assert y.shape == x.shape and y.stride() == x.stride()
        assert batch_moments(x)[0].shape == (3,)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators():
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    with Seen() as seen:
        _norm(x).sum().backward()
    assert "refbn_d2.forward.default" in seen.names and "refbn_d2.backward.default" in seen.names


def _layer():
    layer = RefBatchNorm2d(3)
    layer.set_reference(torch.arange(3.0), torch.arange(1.0, 4), 80, 4)
    return layer


def _step(call, x):
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    return y.detach(), torch.autograd.grad(y.pow(3).sum(), leaf)[0]


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_training_step(strict):
    x, layer = torch.randn(4, 3, 8, 8), _layer()
    shapes = ({0: torch.export.Dim("n", min=2)},)
    program = torch.export.export(_layer(), (x,), dynamic_shapes=shapes, strict=strict)
    assert any("refbn_d2.forward" in str(n.target) for n in program.graph.nodes)
    other = torch.randn(6, 3, 8, 8)
    exported = program.module()
    assert all(torch.equal(a, b) for a, b in zip(_step(exported, other), _step(layer, other)))
    buffers = dict(exported.named_buffers())
    assert torch.equal(buffers["running_var"], layer.running_var)


def test_jit_trace_of_a_training_step():
    traced = torch.jit.trace(_norm, torch.randn(4, 3, 8, 8))
    other = torch.randn(6, 3, 8, 8)
    assert torch.equal(traced(other), _norm(other))
