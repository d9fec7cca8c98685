"""The choice of the compiled kernels and their special properties; see also test_kernels.py."""

import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from refbn_d2.norms import kernels as choice

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# Which kernels a new process takes, and what they say the mean of [[0, 1], [2, 3]] is.
PROBE = """
import torch
from refbn_d2.norms import functional, kernels
x = torch.arange(4.0).view(2, 1, 2, 1)
print(kernels.kernels_for(x).name, float(functional.batch_moments(x)[0]))
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
def test_compiled_at_the_first_start_and_mended_at_a_later_one(tmp_path):
    assert _probe(XDG_CACHE_HOME=str(tmp_path)) == "cpu_cpp 1.5"
    (library,) = tmp_path.rglob("*.so")
    os.truncate(library, 5000)  # to load it would end the process with SIGBUS
    assert _probe(XDG_CACHE_HOME=str(tmp_path)) == "cpu_cpp 1.5"


@pytest.fixture
def chosen(tmp_path, monkeypatch, caplog):
    """Chooses the kernels for the CPU as a new process does: the set, and what is logged."""

    def choose(**environment):
        for name, value in {"XDG_CACHE_HOME": str(tmp_path), **environment}.items():
            monkeypatch.setenv(name, value)
        with caplog.at_level(logging.INFO, "detectron2.refbn_d2"):
            kernels = choice._cpu_cpp.__wrapped__()
        return kernels, [(r.levelname, r.getMessage()) for r in caplog.records]

    return choose


@pytest.mark.parametrize(
    "environment, reason",
    [
        (
            {"CXX": "no-such-compiler"},
            "no C++ compiler 'no-such-compiler': install one, or set CXX to its path",
        ),
        ({"CXX": "/"}, "the C++ compiler '/' is not executable: set CXX to another one"),
        ({"CXX": "false"}, "the C++ compiler 'false' failed: exit status 1"),
        ({"CXX": '"'}, 'CXX=" is not a command: No closing quotation'),
        ({"XDG_CACHE_HOME": "/dev/null"}, "/dev/null/refbn_d2: Not a directory"),
    ],
)
def test_slow_kernels_are_one_warning_with_the_reason(chosen, environment, reason, tmp_path):
    kernels, ((level, message),) = chosen(**environment)
    assert kernels is None and level == "WARNING"
    assert "cpu_aten" in message and message.endswith(reason)
    assert not list(tmp_path.rglob("*.so"))


def test_slow_kernels_that_were_asked_for_are_no_warning(chosen):
    kernels, messages = chosen(REFBN_NATIVE="0")
    assert kernels is None
    assert messages == [("INFO", "The norms run on the kernels cpu_aten (REFBN_NATIVE=0)")]


@needs_compiler
def test_the_log_says_which_kernels_run(chosen, monkeypatch):
    monkeypatch.setattr(choice, "load_library", lambda *args: choice.CpuAten())
    assert chosen()[1] == [("INFO", "The norms run on the kernels cpu_aten")]


def test_without_a_home_directory_there_is_a_reason(chosen, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(choice.Path, "home", no_home)
    _, ((level, message),) = chosen(XDG_CACHE_HOME="")
    assert level == "WARNING" and "Could not determine home directory" in message


def test_a_relative_cache_folder_is_passed_over(monkeypatch, tmp_path):
    # So says the XDG specification; and a library must not come from wherever the program is run.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert choice._compiler_and_cache()[1] == tmp_path / ".cache" / "refbn_d2"


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 120, 130), (70, 33, 7, 7)])
def test_the_number_of_threads_changes_no_bit(layout, shape, threads):
    x, g = (torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    kernels, results = choice._cpu_cpp(), []
    for count in (1, 2, 5):
        threads(count)
        mean, var = kernels.moments(x)
        y = kernels.normalize(x, mean, var, None)
        sums = kernels.sums(g, x, mean, var)
        grad = kernels.input_gradient(g, x, mean, var, *sums)
        forward = kernels.forward(x, mean, var, None, None, 0.2, 1e-5)
        backward = kernels.backward(g, x, None, mean, mean, var, 1e-3)
        results.append((mean, var, y, *sums, grad, *forward, *backward))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@needs_compiler
def test_bfloat16_is_rounded_as_torch_rounds():
    wide = torch.randn(2, 3, 50, 41) * torch.logspace(-30, 30, 41)
    wide.view(-1)[:3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    x = wide.bfloat16()
    zero, one, bias = torch.zeros(3), torch.ones(3), torch.full((3,), 0.1)
    y = choice._cpu_cpp().normalize(x, zero, one, bias)
    wanted = (x.float() + 0.1).bfloat16()
    assert torch.equal(y.isnan(), wanted.isnan()) and y.isnan().sum() == 1
    assert torch.equal(y.nan_to_num(), wanted.nan_to_num())
