"""The arithmetic of the norms: which set of kernels works on which tensor.

Environment variables, all read here, when a set is first needed:

* ``REFBN_NATIVE=0``: do not compile C++ for the CPU; PyTorch's own pieces do the work.
* ``CXX``: the C++ compiler (``c++``), as a command.
* ``XDG_CACHE_HOME``: the compiled kernels are in ``refbn_d2`` there (``~/.cache``).
* ``REFBN_TRITON=1``: use the Triton kernels on CUDA. Nobody has measured them on a GPU yet.
"""

import functools
import logging
import os
from pathlib import Path
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

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

logger = logging.getLogger(__name__)

_FORMULAS, _FALLBACK = Formulas(), Fallback()
_CPU_ATEN = CpuAten()


def kernels_for(x: Tensor) -> Kernels:
    """The set of kernels for x.

    torch.compile gets formulas that it can fuse; torch.func's transforms and forward-mode
    differentiation get formulas that PyTorch can differentiate; tracers, dispatch modes and tensor
    subclasses get operators. In all other cases it is the set for the device of x.
    """
    if torch.compiler.is_compiling():
        return _OPERATORS if _exporting() else _FALLBACK
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _FORMULAS
    if _observed(x):
        return _OPERATORS
    return direct_kernels_for(x)


def _exporting() -> bool:
    # New in PyTorch 2.7; before it, torch.export sees what torch.compile sees.
    return getattr(torch.compiler, "is_exporting", bool)()


def _observed(x: Tensor) -> bool:
    """Whether a tracer, a dispatch mode or a tensor subclass follows each operation on x.

    None of them sees a kernel that is called by ctypes, and a fake tensor has no memory for it.
    """
    return (
        type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def direct_kernels_for(x: Tensor) -> Kernels:
    """The set of kernels for the memory of x."""
    if x.is_cpu:
        compiled = _cpu_cpp()
        return compiled if compiled is not None and compiled.takes(x) else _CPU_ATEN
    return _cuda() if x.is_cuda else _fallback()


_OPERATORS = Operators(direct_kernels_for)


@functools.lru_cache(maxsize=None)
def _cpu_cpp() -> Optional[CpuCpp]:
    """The compiled kernels, or None where they cannot be had."""
    if os.getenv("REFBN_NATIVE") == "0":
        _announce(_CPU_ATEN, " (REFBN_NATIVE=0)")
        return None
    try:
        compiler, cache = _compiler_and_cache()
        kernels = load_library(cpu_cpp.SOURCE, compiler, cpu_cpp.compiler_flags(), cache, CpuCpp)
    except (LibraryError, AttributeError) as e:
        logger.warning(
            "The norms run on the slow kernels, %s, since the compiled ones cannot be had: %s",
            _CPU_ATEN.name,
            e,
        )
        return None
    _announce(kernels)
    return kernels


def _compiler_and_cache() -> Tuple[str, Path]:
    compiler = os.getenv("CXX", "").strip() or "c++"
    folder = Path(os.getenv("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():  # unset, or against the XDG specification
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
