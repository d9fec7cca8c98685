"""The kernels on a CPU in C++, in cpu_cpp.cpp, which library.py compiles at the first use."""

import ctypes
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Union

import torch
from torch import Tensor

from .base import BatchStatistics, Kernels, reference_weight, statistics_dtype

__all__ = ["SOURCE", "CpuCpp", "compiler_flags"]

SOURCE = Path(__file__).with_suffix(".cpp")
_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
# Arguments of each function after x, n, c, s, channels_last and threads: p a pointer, d a double.
_ARGUMENTS = {
    "moments": "pp",
    "sums": "ppppp",
    "normalize": "pppp",
    "input_gradient": "pppppp",
    "forward": "ppppddppppp",
    "backward": "pppppdppp",
}
_C_TYPES = {"p": ctypes.c_void_p, "d": ctypes.c_double}
# Compiler flags for each CPU capability that torch reports. They are the instruction sets for which
# torch's own kernels are built.
_INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


def compiler_flags() -> Tuple[str, ...]:
    """Returns the compiler flags for ``SOURCE`` on this machine."""
    instructions = _INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    return ("-std=c++17", "-O3", "-fPIC", "-fopenmp", *instructions)


class CpuCpp(Kernels):
    """The compiled kernels.

    The forward and backward passes are one call each. In NCHW they read memory once less, because
    each channel is processed while it is in the cache.

    Args:
        library: Library compiled from ``SOURCE``.

    Raises:
        AttributeError: If the library lacks a function.
    """

    name = "cpu_cpp"

    def __init__(self, library: ctypes.CDLL):
        self._functions: Dict[Tuple[str, torch.dtype], Any] = {}
        for name, arguments in _ARGUMENTS.items():
            for dtype, type_name in _TYPES.items():
                function = getattr(library, f"{name}_{type_name}")
                function.restype = None
                function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_bool]
                function.argtypes += [ctypes.c_int, *[_C_TYPES[a] for a in arguments]]
                self._functions[name, dtype] = function

    def takes(self, x: Tensor) -> bool:
        """Whether there are kernels for the CPU tensor x."""
        return x.dtype in _TYPES and x.numel() > 0

    def _call(self, name: str, x: Tensor, *arguments: Union[Tensor, float, None]) -> None:
        samples, channels, height, width = x.shape
        self._functions[name, x.dtype](
            x.data_ptr(),
            samples,
            channels,
            height * width,
            # If H W = 1, x is both contiguous and channels_last; channels_last is then faster.
            x.is_contiguous(memory_format=torch.channels_last),
            torch.get_num_threads(),
            # Numbers are passed unchanged, and None as a null pointer.
            *[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments],
        )

    def forward(
        self,
        x: Tensor,
        ref_mean: Tensor,
        ref_var: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        pseudo_count: float,
        eps: float,
        batch: Optional[BatchStatistics] = None,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if batch is not None:
            return super().forward(x, ref_mean, ref_var, weight, bias, pseudo_count, eps, batch)
        dtype = statistics_dtype(x)
        mean, var, batch_mean, invstd = [torch.empty(x.shape[1], dtype=dtype) for _ in range(4)]
        y = torch.empty_like(x)
        lambda1 = reference_weight(pseudo_count, x.shape[0])
        given = [_vector(v, dtype) for v in (ref_mean, ref_var, weight, bias)]
        self._call("forward", x, *given, lambda1, eps, batch_mean, mean, var, invstd, y)
        return y, mean, var, batch_mean, invstd

    def backward(
        self,
        g: Tensor,
        x: Tensor,
        weight: Optional[Tensor],
        batch_mean: Tensor,
        mean: Tensor,
        invstd: Tensor,
        share: float,
        all_reduce: Optional[Callable[[Tensor], object]] = None,
        input_gradient: bool = True,
    ) -> Tuple[Optional[Tensor], Tensor, Tensor]:
        vectors = weight, batch_mean, mean, invstd
        if all_reduce is not None or not input_gradient:
            return super().backward(g, x, *vectors, share, all_reduce, input_gradient)
        sum_g, sum_g_xhat = torch.empty_like(mean), torch.empty_like(mean)
        grad = torch.empty_like(x)
        weight = _vector(weight, mean.dtype)
        self._call(
            "backward", x, g, weight, batch_mean, mean, invstd, share, sum_g, sum_g_xhat, grad
        )
        return grad, sum_g, sum_g_xhat

    def moments(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        mean, var = (torch.empty(x.shape[1], dtype=statistics_dtype(x)) for _ in range(2))
        self._call("moments", x, mean, var)
        return mean, var

    def normalize(self, x: Tensor, mean: Tensor, scale: Tensor, bias: Optional[Tensor]) -> Tensor:
        bias = torch.zeros_like(scale) if bias is None else bias.contiguous()
        y = torch.empty_like(x)
        self._call("normalize", x, mean.contiguous(), scale.contiguous(), bias, y)
        return y

    def sums(self, g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
        sum_g, sum_g_xhat = torch.empty_like(invstd), torch.empty_like(invstd)
        self._call("sums", x, g, mean.contiguous(), invstd.contiguous(), sum_g, sum_g_xhat)
        return sum_g, sum_g_xhat

    def input_gradient(
        self, g: Tensor, x: Tensor, center: Tensor, scale: Tensor, mean_g: Tensor, slope: Tensor
    ) -> Tensor:
        grad = torch.empty_like(x)
        vectors = (v.contiguous() for v in (center, scale, mean_g, slope))
        self._call("input_gradient", x, g, *vectors, grad)
        return grad


def _vector(v: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    return None if v is None else v.to(dtype).contiguous()
