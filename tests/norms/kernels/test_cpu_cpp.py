"""How the compiled kernels come to be, and what only they promise; test_kernels.py has the rest."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from refbn_d2.norms import functional
from refbn_d2.norms.kernels import cpu_aten, cpu_cpp

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# Which kernels a new process takes, and what they say the mean of [[0, 1], [2, 3]] is.
PROBE = """
import torch
from refbn_d2.norms import functional
x = torch.arange(4.0).view(2, 1, 2, 1)
print(functional._kernels(x).__name__.rsplit(".", 1)[-1], float(functional.batch_moments(x)[0]))
"""


def _probe(**environment):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    return result.stdout.strip()


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@needs_compiler
def test_compiled_once_then_loaded(tmp_path):
    assert _probe(XDG_CACHE_HOME=str(tmp_path)) == "cpu_cpp 1.5"
    (library,) = (tmp_path / "refbn_d2").iterdir()  # and nothing half-done beside it
    assert _probe(XDG_CACHE_HOME=str(tmp_path), CXX="env c++") == "cpu_cpp 1.5"
    before = library.stat().st_mtime_ns
    # The path of the compiler is not looked at where there is nothing to compile.
    assert _probe(XDG_CACHE_HOME=str(tmp_path), PATH="/nowhere") == "cpu_cpp 1.5"
    assert library.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "environment",
    [
        {"REFBN_NATIVE": "0"},
        {"CXX": "no-such-compiler"},
        {"CXX": "false"},
        {"XDG_CACHE_HOME": "/dev/null"},
    ],
    ids=lambda e: "=".join(*e.items()),
)
def test_without_them_pytorchs_pieces_do_the_work_silently(environment, tmp_path):
    assert _probe(**{"XDG_CACHE_HOME": str(tmp_path), **environment}) == "cpu_aten 1.5"
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_a_damaged_library_is_not_fatal(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cpu_cpp._compiled()
    with open(path, "wb") as f:
        f.write(b"not a library")
    assert _probe(XDG_CACHE_HOME=str(tmp_path)) == "cpu_aten 1.5"


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 120, 130), (70, 33, 7, 7)])
def test_the_number_of_threads_changes_no_bit(layout, shape, threads):
    x, g = (torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    results = []
    for count in (1, 2, 5):
        threads(count)
        mean, var = cpu_cpp.moments(x)
        y = cpu_cpp.normalize(x, mean, var, None, None, 1e-5)
        sums = cpu_cpp.sums(g, x, mean, var)
        grad = cpu_cpp.input_gradient(g, x, mean, var, *sums)
        forward = cpu_cpp.forward(x, mean, var, None, None, 0.2, 1e-5)
        backward = cpu_cpp.backward(g, x, None, mean, mean, var, 1e-3)
        results.append((mean, var, y, *sums, grad, *forward, *backward))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@needs_compiler
def test_bfloat16_is_rounded_as_torch_rounds():
    wide = torch.randn(2, 3, 50, 41) * torch.logspace(-30, 30, 41)
    wide.view(-1)[:3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    x = wide.bfloat16()
    zero, one, bias = torch.zeros(3), torch.ones(3), torch.full((3,), 0.1)
    y = cpu_cpp.normalize(x, zero, one, None, bias, 0.0)
    wanted = (x.float() + 0.1).bfloat16()
    assert torch.equal(y.isnan(), wanted.isnan()) and y.isnan().sum() == 1
    assert torch.equal(y.nan_to_num(), wanted.nan_to_num())


def test_what_has_no_memory_of_its_own_is_left_to_pytorch():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(2, 3, 4, 4)
        assert functional._kernels(x) is cpu_aten
        assert functional.batch_moments(x)[0].shape == (3,)
