"""The kernels of functional.py on a CPU, compiled from cpu_cpp.cpp when first needed.

The system's C++ compiler takes some seconds, once for each machine and version of the source; the
result is kept in ``refbn_d2`` under ``$XDG_CACHE_HOME`` (``~/.cache``). Without a compiler, or with
``REFBN_NATIVE=0``, cpu_aten.py does the same work. x and g are dense, in the same memory format,
contiguous or channels_last, and not empty.

Beside the four functions of every set of kernels there are :func:`forward` and :func:`backward`,
for a batch that is all here: one call each, and in NCHW one way through memory less.
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
from typing import Any, Dict, Optional, Tuple, Union

import torch
from torch import Tensor

from .formulas import statistics_dtype

__all__ = [
    "available_for",
    "backward",
    "forward",
    "input_gradient",
    "moments",
    "normalize",
    "sums",
]

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
# What each takes behind x, n, c, s, channels_last and threads: pointers and doubles.
_ARGUMENTS = {
    "moments": "pp",
    "sums": "ppppp",
    "normalize": "pppp",
    "input_gradient": "pppppp",
    "forward": "ppppddppppp",
    "backward": "pppppdppp",
}
_C_TYPES = {"p": ctypes.c_void_p, "d": ctypes.c_double}
# By what torch found that this machine can do: the instructions that its own kernels are built for.
_INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


def available_for(x: Tensor) -> bool:
    """Whether these kernels can be had for x, a tensor on a CPU."""
    # A subclass (a fake tensor, say) need not have the memory that these kernels read.
    return type(x) is Tensor and x.numel() > 0 and ("moments", x.dtype) in _functions()


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
    for name, arguments in _ARGUMENTS.items():
        for dtype, type_name in _TYPES.items():
            function = functions[name, dtype] = getattr(library, f"{name}_{type_name}")
            function.restype = None
            function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_bool]
            function.argtypes += [ctypes.c_int, *[_C_TYPES[a] for a in arguments]]
    return functions


def _compiled() -> str:
    """Path of the library, which is compiled unless it is there."""
    compiler = shlex.split(os.getenv("CXX", "c++"))
    flags = ["-std=c++17", "-O3", "-fPIC", "-fopenmp"]
    flags += _INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    key = hashlib.sha256(" ".join(compiler + flags).encode() + _SOURCE.read_bytes()).hexdigest()
    cache = Path(os.getenv("XDG_CACHE_HOME") or Path.home() / ".cache", "refbn_d2")
    library = cache / f"cpu_cpp-{key[:16]}.so"
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


def _call(name: str, x: Tensor, *arguments: Union[Tensor, float, None]) -> None:
    samples, channels, height, width = x.shape
    _functions()[name, x.dtype](
        x.data_ptr(),
        samples,
        channels,
        height * width,
        # Both where a channel is one pixel, and then this is the faster way to look at it.
        x.is_contiguous(memory_format=torch.channels_last),
        torch.get_num_threads(),
        # Numbers and None, which is a null pointer, as they are.
        *[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments],
    )


def _vector(v: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    return None if v is None else v.to(dtype).contiguous()


def forward(
    x: Tensor,
    ref_mean: Tensor,
    ref_var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    lambda1: float,
    eps: float,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalizes a batch by its own statistics mixed with those of the reference (eq. 15-16).

    Returns:
        ``(y, mean, var, batch_mean, invstd)``: the first three as functional.ref_batch_norm, and
        what :func:`backward` needs besides.
    """
    dtype = statistics_dtype(x)
    mean, var, batch_mean, invstd = [torch.empty(x.shape[1], dtype=dtype) for _ in range(4)]
    y = torch.empty_like(x)
    given = [_vector(v, dtype) for v in (ref_mean, ref_var, weight, bias)]
    _call("forward", x, *given, lambda1, eps, batch_mean, mean, var, invstd, y)
    return y, mean, var, batch_mean, invstd


def backward(
    g: Tensor,
    x: Tensor,
    weight: Optional[Tensor],
    batch_mean: Tensor,
    mean: Tensor,
    invstd: Tensor,
    share: float,
) -> Tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, and of weight and bias as :func:`sums` has them."""
    sum_g, sum_g_xhat, grad = torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(x)
    weight = _vector(weight, mean.dtype)
    _call("backward", x, g, weight, batch_mean, mean, invstd, share, sum_g, sum_g_xhat, grad)
    return grad, sum_g, sum_g_xhat


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
