"""The kernels as PyTorch operators, for tracers, dispatch modes and tensor subclasses.

``torch.ops.refbn_d2`` has an operator for each method of :class:`Kernels`. Dispatch modes, tracers
(make_fx, torch.export, torch.jit.trace) and tensor subclasses see each call as one operation. Its
fake implementation computes shapes and dtypes of the results; its autograd formula computes the
gradient. For tensors that have memory, an operator calls the set of kernels for their device.
Unlike the kernels, an operator also accepts tensors that are not dense.
"""

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor

from .base import (
    BatchStatistics,
    Kernels,
    check_vectors,
    dense,
    gradient_share,
    like,
    statistics_dtype,
)
from .formulas import Formulas, differentiable_backward

__all__ = ["Operators"]

_FORMULAS = Formulas()


class Operators(Kernels):
    """A set of kernels where each method calls one PyTorch operator.

    The constructor defines the operators, so it must be called only once per process.

    Args:
        kernels_for: Function that returns the set of kernels for a tensor that has memory.
    """

    name = "operators"
    differentiable = True

    def __init__(self, kernels_for: Callable[[Tensor], Kernels]):
        self._library = torch.library.Library("refbn_d2", "DEF")
        for schema, run, gradient in _OPERATORS:
            self._define(schema, run, *gradient, kernels_for)
        self._ops = torch.ops.refbn_d2

    def _define(self, schema, run, save, gradient, kernels_for) -> None:
        library, name = self._library, schema.split("(")[0]
        library.define(schema)
        library.impl(name, lambda *args: run(kernels_for(args[0]), *args), _ANY_DEVICE)
        name = f"refbn_d2::{name}"
        torch.library.register_fake(name, lambda *args: run(_FORMULAS, *args), lib=library)
        torch.library.register_autograd(name, gradient, setup_context=save, lib=library)

    def moments(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        return self._ops.moments(x)

    def normalize(self, x: Tensor, mean: Tensor, scale: Tensor, bias: Optional[Tensor]) -> Tensor:
        return self._ops.normalize(x, mean, scale, bias)

    def sums(self, g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
        return self._ops.sums(g, x, mean, invstd)

    def input_gradient(
        self, g: Tensor, x: Tensor, center: Tensor, scale: Tensor, mean_g: Tensor, slope: Tensor
    ) -> Tensor:
        return self._ops.input_gradient(g, x, center, scale, mean_g, slope)

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
        return self._ops.forward(x, ref_mean, ref_var, weight, bias, pseudo_count, eps)


# Implementations of the operators. Their first argument is the set of kernels to use.


def _moments(kernels: Kernels, x: Tensor) -> Tuple[Tensor, ...]:
    return tuple(v.to(statistics_dtype(x)) for v in kernels.moments(dense(x)))


def _normalize(kernels: Kernels, x: Tensor, *vectors: Any) -> Tensor:
    check_vectors(x, *vectors)
    return kernels.normalize(dense(x), *vectors)


def _sums(kernels: Kernels, g: Tensor, x: Tensor, *vectors: Tensor) -> Tuple[Tensor, Tensor]:
    check_vectors(x, *vectors)
    x = dense(x)
    return kernels.sums(like(g, x), x, *vectors)


def _input_gradient(kernels: Kernels, g: Tensor, x: Tensor, *vectors: Tensor) -> Tensor:
    check_vectors(x, *vectors)
    x = dense(x)
    return kernels.input_gradient(like(g, x), x, *vectors)


def _forward(kernels: Kernels, x: Tensor, *others: Any) -> Tuple[Tensor, ...]:
    check_vectors(x, *others[:4])
    return kernels.forward(dense(x), *others)


def _backward(kernels: Kernels, g: Tensor, x: Tensor, *others: Any) -> Tuple[Any, ...]:
    weight, batch_mean, mean, invstd, pseudo_count = others
    check_vectors(x, weight, batch_mean, mean, invstd)
    x = dense(x)
    share = _share(x, pseudo_count)
    return kernels.backward(like(g, x), x, weight, batch_mean, mean, invstd, share)


def _share(x: Tensor, pseudo_count: float) -> float:
    return gradient_share(pseudo_count, x.shape[0], x.numel() // x.shape[1])


def _differentiable_backward(g: Tensor, x: Tensor, *others: Any) -> Tuple[Any, ...]:
    weight, batch_mean, mean, invstd, pseudo_count = others
    share = _share(x, pseudo_count)
    return differentiable_backward(g, x, weight, batch_mean, mean, invstd, share)


# Gradients of the operators: a function that saves tensors, and one that computes the gradients.


def _of(formula: Callable[..., Any]) -> Tuple[Callable[..., None], Callable[..., Any]]:
    """Derives the gradient from ``formula``; it is differentiable as often as ``formula`` is."""

    def save(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)))
        ctx.constants = [None if isinstance(v, Tensor) else (v,) for v in inputs]

    def gradient(ctx: Any, *gradients: Tensor) -> Tuple[Any, ...]:
        def of_tensors(*tensors: Tensor) -> Any:
            remaining = iter(tensors)
            return formula(*(next(remaining) if c is None else c[0] for c in ctx.constants))

        product = torch.func.vjp(of_tensors, *ctx.saved_tensors)[1]
        results = iter(product(gradients if len(gradients) > 1 else gradients[0]))
        return tuple(next(results) if c is None else None for c in ctx.constants)

    return save, gradient


def _save_for_backward(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, ...]) -> None:
    x, _, _, weight, bias, pseudo_count, _ = inputs
    _, mean, var, batch_mean, invstd = output
    ctx.mark_non_differentiable(mean, var, batch_mean, invstd)
    ctx.save_for_backward(x, weight, batch_mean, mean, invstd)
    ctx.pseudo_count = pseudo_count
    ctx.dtypes = [None if v is None else v.dtype for v in (weight, bias)]


def _gradient_of_forward(ctx: Any, g: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
    grad_x, sum_g, sum_g_xhat = torch.ops.refbn_d2.backward(g, *ctx.saved_tensors, ctx.pseudo_count)
    affine = [None if d is None else s.to(d) for s, d in zip((sum_g_xhat, sum_g), ctx.dtypes)]
    return (grad_x, None, None, *affine, None, None)


_ANY_DEVICE = "CompositeExplicitAutograd"
_OPERATORS = [
    ("moments(Tensor x) -> (Tensor, Tensor)", _moments, _of(lambda x: _moments(_FORMULAS, x))),
    (
        "normalize(Tensor x, Tensor mean, Tensor scale, Tensor? bias) -> Tensor",
        _normalize,
        _of(_FORMULAS.normalize),
    ),
    (
        "sums(Tensor g, Tensor x, Tensor mean, Tensor invstd) -> (Tensor, Tensor)",
        _sums,
        _of(_FORMULAS.sums),
    ),
    (
        "input_gradient(Tensor g, Tensor x, Tensor center, Tensor scale, Tensor mean_g, "
        "Tensor slope) -> Tensor",
        _input_gradient,
        _of(_FORMULAS.input_gradient),
    ),
    (
        "forward(Tensor x, Tensor ref_mean, Tensor ref_var, Tensor? weight, Tensor? bias, "
        "float pseudo_count, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _forward,
        (_save_for_backward, _gradient_of_forward),
    ),
    (
        "backward(Tensor g, Tensor x, Tensor? weight, Tensor batch_mean, Tensor mean, "
        "Tensor invstd, float pseudo_count) -> (Tensor, Tensor, Tensor)",
        _backward,
        _of(_differentiable_backward),
    ),
]
