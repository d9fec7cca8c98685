"""The kernels of the norms, and the choice of a set of kernels for a tensor.

Environment variables, which are read when a set of kernels is first needed:

* ``REFBN_NATIVE=0``: do not compile C++ for the CPU; use PyTorch's own kernels.
* ``CXX``: command of the C++ compiler (default ``c++``).
* ``XDG_CACHE_HOME``: folder for caches (default ``~/.cache``). The compiled kernels are in its
  subfolder ``refbn_d2``.
* ``REFBN_TRITON=1``: use the Triton kernels on CUDA. Their speed on a GPU has not been measured.
"""

import functools
import os
from pathlib import Path
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...log import get_logger
from . import cpu_cpp
from .base import (
    BatchStatistics,
    Kernels,
    check_vectors,
    dense,
    gradient_share,
    like,
    per_channel,
    statistics_dtype,
)
from .cpu_aten import CpuAten
from .cpu_cpp import CpuCpp
from .cuda_aten import CudaAten
from .formulas import Fallback, Formulas, differentiable_backward
from .library import LibraryError, load_library
from .operators import Operators

__all__ = [
    "BatchStatistics",
    "Kernels",
    "check_vectors",
    "dense",
    "differentiable_backward",
    "gradient_share",
    "kernels_for",
    "like",
    "per_channel",
    "statistics_dtype",
]

logger = get_logger(__name__)

_FORMULAS, _FALLBACK = Formulas(), Fallback()
_CPU_ATEN = CpuAten()


def kernels_for(x: Tensor) -> Kernels:
    """Returns the set of kernels for x.

    torch.compile gets formulas that it can fuse; torch.func's transforms and forward-mode
    differentiation get formulas that PyTorch can differentiate; tracers, dispatch modes and tensor
    subclasses get operators. In all other cases the device of x determines the set.
    """
    if torch.compiler.is_compiling():
        return _OPERATORS if _exporting() else _FALLBACK
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _FORMULAS
    if _observed(x):
        return _OPERATORS
    return direct_kernels_for(x)


def _exporting() -> bool:
    # New in PyTorch 2.7. In older versions torch.export gets the same kernels as torch.compile.
    return getattr(torch.compiler, "is_exporting", bool)()


def _observed(x: Tensor) -> bool:
    """Whether a tracer, a dispatch mode or a tensor subclass must see each operation on x.

    They do not see a kernel that is called through ctypes, and a fake tensor has no memory that
    such a kernel could read.
    """
    return (
        type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def direct_kernels_for(x: Tensor) -> Kernels:
    """Returns the set of kernels for the device and dtype of x."""
    if x.is_cpu:
        compiled = _cpu_cpp()
        return compiled if compiled is not None and compiled.takes(x) else _CPU_ATEN
    return _cuda() if x.is_cuda else _fallback()


_OPERATORS = Operators(direct_kernels_for)


@functools.lru_cache(maxsize=None)
def _cpu_cpp() -> Optional[CpuCpp]:
    """The compiled kernels, or None if they cannot be compiled or loaded."""
    if os.getenv("REFBN_NATIVE") == "0":
        _announce(_CPU_ATEN, " (REFBN_NATIVE=0)")
        return None
    try:
        compiler, cache = _compiler_and_cache()
        kernels = load_library(cpu_cpp.SOURCE, compiler, cpu_cpp.compiler_flags(), cache, CpuCpp)
    except (LibraryError, AttributeError) as e:
        logger.warning(
            "The norms run on the slow kernels %s, because the C++ kernels are not available: %s",
            _CPU_ATEN.name,
            e,
        )
        return None
    _announce(kernels)
    return kernels


def _compiler_and_cache() -> Tuple[str, Path]:
    compiler = os.getenv("CXX", "").strip() or "c++"
    folder = Path(os.getenv("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():  # unset; the XDG specification says to ignore relative paths
        try:
            folder = Path.home() / ".cache"
        except RuntimeError as e:  # no home directory can be determined
            raise LibraryError(f"{e}; set XDG_CACHE_HOME to a folder for them") from None
    return compiler, folder / "refbn_d2"


@functools.lru_cache(maxsize=None)
def _cuda() -> Kernels:
    kernels: Kernels = CudaAten()
    if os.getenv("REFBN_TRITON") == "1":
        try:
            from .cuda_triton import CudaTriton

            kernels = CudaTriton()
        except ImportError as e:
            logger.warning("REFBN_TRITON=1 has no effect: %s", e)
    _announce(kernels)
    return kernels


@functools.lru_cache(maxsize=None)
def _fallback() -> Kernels:
    _announce(_FALLBACK)
    return _FALLBACK


def _announce(kernels: Kernels, why: str = "") -> None:
    logger.info("The norms run on the kernels %s%s", kernels.name, why)
