"""The kernels of functional.py on a CPU, compiled from native_kernels.cpp when first needed.

The system's C++ compiler takes a second or two, once for each machine and version of the source;
the result is kept in ``refbn_d2`` under ``$XDG_CACHE_HOME`` (``~/.cache``). Without a compiler, or
with ``REFBN_NATIVE=0``, cpu_kernels.py does the same work. x and g are dense, in the same memory
format, contiguous or channels_last, and not empty.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor

from .plain_kernels import statistics_dtype

__all__ = ["available_for", "input_gradient", "moments", "normalize", "sums"]

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
# Pointers behind those that all kernels take: x, n, c, s, channels_last, threads.
_POINTERS = {"moments": 2, "sums": 5, "normalize": 4, "input_gradient": 6}
# By what torch found that this machine can do: the instructions that its own kernels are built for.
_INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


def available_for(x: Tensor) -> bool:
    """Whether these kernels can be had for x, a tensor on a CPU."""
    # A subclass (a fake tensor, say) need not have the memory that these kernels read.
    return type(x) is Tensor and ("moments", x.dtype) in _functions()


@functools.lru_cache(maxsize=None)
def _functions() -> Dict[Tuple[str, torch.dtype], Any]:
    """The kernels by name and dtype; none where they cannot be had."""
    if os.getenv("REFBN_NATIVE") == "0":
        return {}
    try:
        library = ctypes.CDLL(_compiled())
    # RuntimeError: there is no home.
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        logger.debug("norms run without compiled kernels: %s", e)
        return {}
    functions = {}
    for name, pointers in _POINTERS.items():
        for dtype, type_name in _TYPES.items():
            function = functions[name, dtype] = getattr(library, f"{name}_{type_name}")
            function.restype = None
            function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_bool]
            function.argtypes += [ctypes.c_int, *[ctypes.c_void_p] * pointers]
    return functions


def _compiled() -> str:
    """Path of the library, which is compiled unless it is there."""
    compiler = shlex.split(os.getenv("CXX", "c++"))
    flags = ["-std=c++17", "-O3", "-fPIC", "-fopenmp"]
    flags += _INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    key = hashlib.sha256(" ".join(compiler + flags).encode() + _SOURCE.read_bytes()).hexdigest()
    cache = Path(os.getenv("XDG_CACHE_HOME") or Path.home() / ".cache", "refbn_d2")
    library = cache / f"native_kernels-{key[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Many processes may be here at once: each compiles for itself, and the last one's stays.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            objects, linked = f"{folder}/kernels.o", f"{folder}/kernels.so"
            # Linked without -fopenmp, it takes torch's own OpenMP, whose threads are there already:
            # those of a second one would fight with them.
            for command in (
                [*compiler, *flags, "-c", str(_SOURCE), "-o", objects],
                [*compiler, "-shared", objects, "-o", linked],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=120)
            os.replace(linked, library)
    return str(library)


def _call(name: str, x: Tensor, *tensors: Tensor) -> None:
    samples, channels, height, width = x.shape
    _functions()[name, x.dtype](
        x.data_ptr(),
        samples,
        channels,
        height * width,
        # Both where a channel is one pixel, and then this is the faster way to look at it.
        x.is_contiguous(memory_format=torch.channels_last),
        torch.get_num_threads(),
        *[t.data_ptr() for t in tensors],
    )


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    mean, var = (torch.empty(x.shape[1], dtype=statistics_dtype(x)) for _ in range(2))
    _call("moments", x, mean, var)
    return mean, var


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
) -> Tensor:
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale *= weight
    bias = torch.zeros_like(scale) if bias is None else bias.contiguous()
    y = torch.empty_like(x)
    _call("normalize", x, mean.contiguous(), scale, bias, y)
    return y


def sums(g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
    sum_g, sum_g_xhat = torch.empty_like(invstd), torch.empty_like(invstd)
    _call("sums", x, g, mean.contiguous(), invstd.contiguous(), sum_g, sum_g_xhat)
    return sum_g, sum_g_xhat


def input_gradient(
    g: Tensor, x: Tensor, center: Tensor, scale: Tensor, mean_g: Tensor, slope: Tensor
) -> Tensor:
    grad = torch.empty_like(x)
    vectors = (v.contiguous() for v in (center, scale, mean_g, slope))
    _call("input_gradient", x, g, *vectors, grad)
    return grad
