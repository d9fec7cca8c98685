"""Every set of kernels against the paper's equations: whole RefBN, forward and backward.

The Triton kernels run under Triton's interpreter, which has to be switched on before Triton is
imported: in a process of their own, which runs this file again.
"""

import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch

from refbn_d2.norms import functional
from refbn_d2.norms import kernels as choice
from refbn_d2.norms.kernels import cpu_aten
from refbn_d2.norms.kernels.cpu_aten import CpuAten
from refbn_d2.norms.kernels.formulas import Fallback, Formulas

INTERPRETED = os.getenv("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from refbn_d2.norms.kernels.cuda_triton import CudaTriton

    KERNELS = [CudaTriton()]
else:
    KERNELS = [CpuAten(), Formulas(), Fallback()]
    # test_cpu_cpp.py says when there must be such kernels.
    KERNELS += [k for k in [choice._cpu_cpp()] if k is not None]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# Rows shorter and longer than a vector and than a tile, channels that fill no tile, one value.
SHAPES = [(4, 3, 5, 7), (1, 3, 1, 1), (3, 2, 40, 30), (2, 33, 3, 3)]
SHAPES += [] if INTERPRETED else [(2, 1, 3, 3), (5, 40, 1, 1)]  # the interpreter is slow


@pytest.fixture(params=KERNELS, ids=lambda k: k.name)
def kernels(request, monkeypatch):
    monkeypatch.setattr(functional, "kernels_for", lambda x: request.param)
    return request.param


def _by_pieces(x, *others):
    # What SyncRefBN calls, where x may be a part of the batch: never the whole in one kernel.
    return functional.mixed_norm(x, functional.batch_statistics(x), *others)


@pytest.mark.parametrize("norm", [functional.ref_batch_norm, _by_pieces], ids=["whole", "pieces"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_equals_the_equations(kernels, norm, layout, shape, dtype, tol):
    c = shape[1]
    x = (torch.randn(shape) * 2 + 3).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    wide = torch.promote_types(dtype, torch.float32)
    ref_mean, ref_var = torch.randn(c, dtype=wide), torch.rand(c, dtype=wide) + 0.5
    leaves = [x.requires_grad_()]
    leaves += [torch.randn(c, dtype=wide, requires_grad=True) for _ in range(2)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = oracle.ref_bn(exact[0], ref_mean.double(), ref_var.double(), *exact[1:])

    y, mean, var = norm(leaves[0], ref_mean, ref_var, *leaves[1:])
    assert y.dtype == dtype and y.is_contiguous(memory_format=LAYOUTS[layout])
    assert oracle.relative_error(y, wanted[0]) < tol
    statistics = min(tol, 1e-5)
    assert oracle.relative_error(mean, wanted[1]) < statistics
    assert oracle.relative_error(var, wanted[2]) < statistics
    g = torch.randn(shape).to(dtype)
    grads = oracle.gradients(y, g, *leaves)
    if not kernels.differentiable:  # else PyTorch chooses the layout
        assert grads[0].is_contiguous(memory_format=LAYOUTS[layout])
    wanted_grads = oracle.gradients(wanted[0], g.double(), *exact)
    unit = float(g.abs().max())  # where all terms cancel
    for actual, expected in zip(grads, wanted_grads):
        assert oracle.relative_error(actual, expected, unit) < tol


def test_frozen_input_still_gives_the_affine_gradients(kernels):
    x, weight, bias = torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(3)
    leaves, g = [weight.requires_grad_(), bias.requires_grad_()], torch.randn(x.shape)
    wanted = oracle.ref_bn(x.double(), torch.zeros(3).double(), torch.ones(3).double(), *leaves)[0]
    y = functional.ref_batch_norm(x, torch.zeros(3), torch.ones(3), *leaves)[0]
    for actual, expected in zip(
        oracle.gradients(y, g, *leaves), oracle.gradients(wanted, g.double(), *leaves)
    ):
        assert oracle.relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("wrong", range(4))
def test_a_vector_of_the_wrong_length_is_an_error(kernels, wrong):
    vectors = [torch.ones(4 if i == wrong else 3) for i in range(4)]
    with pytest.raises(ValueError, match=r"expected 3 values.* got a tensor of shape \(4,\)"):
        functional.ref_batch_norm(torch.randn(2, 3, 4, 5), *vectors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [100.0, -1000.0])
def test_variance_keeps_its_digits_far_from_zero(kernels, layout, offset):
    x = (torch.randn(3, 20, 20, 40) + offset).contiguous(memory_format=LAYOUTS[layout])
    mean, var = kernels.moments(x)
    wanted_mean, wanted_var = oracle.moments(x.double(), 0, 2, 3)
    assert oracle.relative_error(mean, wanted_mean.flatten()) < 2e-6
    assert oracle.relative_error(var, wanted_var.flatten()) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_keeps_its_digits_beside_an_outlier(kernels, layout):
    # In the place that a sum of squares would be taken around.
    x = torch.randn(3, 20, 20, 40).contiguous(memory_format=LAYOUTS[layout])
    x[0, :, 0, 0] = 1e4
    wanted = oracle.moments(x.double(), 0, 2, 3)[1].flatten()
    assert oracle.relative_error(kernels.moments(x)[1], wanted) < 1e-4


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is slow")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_many_values_keep_their_digits(kernels, layout, count, threads):
    threads(count)
    x = (torch.randn(2, 3, 512, 512) * 2 + 3).contiguous(memory_format=LAYOUTS[layout])
    mean, var = kernels.moments(x)
    wanted_mean, wanted_var = oracle.moments(x.double(), 0, 2, 3)
    assert oracle.relative_error(mean, wanted_mean.flatten()) < 1e-5
    assert oracle.relative_error(var, wanted_var.flatten()) < 1e-5


def _against_float64(x, ref_mean):
    """Output, mean and gradients in float32 against the equations in float64: relative errors."""
    c = x.shape[1]
    ref_var = torch.rand(c) + 0.5
    leaves = [x.clone().requires_grad_()]
    leaves += [torch.randn(c, requires_grad=True) for _ in range(2)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    g = torch.randn(x.shape)
    y, mean, _ = functional.ref_batch_norm(leaves[0], ref_mean, ref_var, *leaves[1:])
    wanted = oracle.ref_bn(exact[0], ref_mean.double(), ref_var.double(), *exact[1:])
    pairs = [(y, wanted[0]), (mean, wanted[1])]
    pairs += zip(oracle.gradients(y, g, *leaves), oracle.gradients(wanted[0], g.double(), *exact))
    return [oracle.relative_error(a, b) for a, b in pairs]


@pytest.mark.skipif(INTERPRETED, reason="on CUDA float32 is what BatchNorm calculates in, too")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1e18, 1e20, 1e25, 1e30])
def test_squares_beyond_float32(kernels, layout, scale):
    x = (torch.randn(3, 20, 15, 20) * scale).contiguous(memory_format=LAYOUTS[layout])
    assert max(_against_float64(x, torch.randn(20) * scale)) < 2e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_variance_beyond_float32_is_never_nan(kernels, layout):
    # The statistics of several processes are float32: as BatchNorm's on CUDA, y is then the bias.
    x = (torch.randn(3, 20, 5, 4) * 1e25).contiguous(memory_format=LAYOUTS[layout])
    batch = functional.BatchStatistics(3, 60, torch.zeros(20), torch.full((20,), float("inf")))
    y, mean, _ = functional.mixed_norm(x, batch, torch.zeros(20), torch.ones(20))
    if not kernels.differentiable:
        assert y.abs().max() == 0 and mean.isfinite().all()


@pytest.mark.skipif(INTERPRETED, reason="slow")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_digits_far_from_zero(kernels, layout):
    x = (torch.randn(3, 20, 60, 90) + 1e4).contiguous(memory_format=LAYOUTS[layout])
    output, mean, grad_x, grad_weight, grad_bias = _against_float64(x, torch.randn(20) + 1e4)
    # mean in float32 has an error of up to 5e-4 standard deviations here.
    assert mean < 2e-7 and output < 3e-4 and grad_x < 3e-5
    assert grad_weight < 2e-3 and grad_bias < 1e-5
    wanted = oracle.moments(x.double(), 0, 2, 3)[1].flatten()
    assert oracle.relative_error(kernels.moments(x)[1], wanted) < 3e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_spread_as_in_batch_norm(kernels, layout, value):
    x = torch.randn(3, 4, 5, 6).contiguous(memory_format=LAYOUTS[layout])
    x[1, 2, 3, 4] = value
    results = []
    for norm in (
        lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
        lambda x: functional.ref_batch_norm(x, torch.zeros(4), torch.ones(4))[0],
    ):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, torch.randn(3, 4, 5, 6))))
    for theirs, ours in zip(*results):
        assert torch.equal(theirs.isfinite(), ours.isfinite())
        assert not ours[:, 2].isfinite().any() and ours[:, :2].isfinite().all()


def test_nan_in_the_gradient_stays_in_its_channel(kernels):
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    y = functional.ref_batch_norm(x, torch.zeros(4), torch.ones(4))[0]
    g = torch.randn(3, 4, 5, 6)
    g[0, 1, 0, 0] = float("nan")
    (grad,) = torch.autograd.grad(y, x, g)
    assert grad[:, 1].isnan().all() and grad[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("numel", [50, 7 * 9 * 11, 10**9])
def test_blocks_cover_everything_once(numel, monkeypatch):
    monkeypatch.setattr(cpu_aten, "_BLOCK", numel)
    for layout in LAYOUTS.values():
        x = torch.zeros(5, 7, 9, 11).contiguous(memory_format=layout)
        blocks = list(cpu_aten._blocks(x))
        for b in blocks:
            x[b] += 1
            assert x[b].is_contiguous(memory_format=layout)
            assert x[b].numel() <= max(numel, 99)
        assert (x == 1).all()


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_triton_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout and "failed" not in result.stdout


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("last, wide", [(False, False), (True, True)])
def test_triton_kernels_compile_for_a_gpu(last, wide, tmp_path, monkeypatch):
    """The interpreter takes what the compiler would refuse; compiling needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from refbn_d2.norms.kernels import cuda_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"BR": 64, "BC": 32, "BLOCK": 1024, "LAST": last, "WIDE": wide}
    constants["ACC"] = triton.language.float32
    integers = {"rows", "chunk", "pixels", "channels", "splits", "size"}
    types = dict.fromkeys(integers, "i64" if wide else "i32")
    types.update(dict.fromkeys(("x", "g", "y"), "*bf16"), eps="fp32")
    for name in ("moments", "merge", "sums", "normalize", "input_gradient"):
        kernel = getattr(cuda_triton, f"_{name}_kernel")
        used = {n: v for n, v in constants.items() if n in kernel.arg_names}
        signature = {
            n: "constexpr" if n in used else types.get(n, "*fp32") for n in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=used)
        assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
