"""Recomputes the inference statistics with fixed weights (Algorithm 3, lines 8-9)."""

import itertools
from typing import Any, Dict, Iterable, List, Tuple

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..norms import (
    BatchRenorm2d,
    EvalRefBatchNorm2d,
    MovingAverageBatchNorm2d,
    ReferenceNorm2d,
    batch_moments,
)
from ..norms.capture import buffers_restored
from ..rng import forked_rng

__all__ = ["recompute_statistics"]


def _norms(model: nn.Module) -> List[nn.Module]:
    """The norms whose running statistics are used in inference only.

    BRN and MABN also train with them.
    """
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        and not isinstance(m, (BatchRenorm2d, MovingAverageBatchNorm2d))
        and m.running_mean is not None
    ]


@torch.no_grad()
def recompute_statistics(
    model: nn.Module, batches: Iterable[Any], num_batches: int, plain: bool = False
) -> int:
    """Sets running_mean and running_var to averages over training batches, with fixed weights.

    E[x] = E_B[mu] and Var[x] = E_B[n / (n - 1) var_B], where all batches of all processes have the
    same weight. mu and var are the statistics by which the norm normalizes in training, for RefBN
    the mixed ones. (fvcore's PreciseBN is not used, because it undoes a Bessel correction of the
    whole variance; in mixed statistics only the batch variance has one.) EvalRefBN also gets the
    weight of an image's own statistics from these batches. Weights, training flags, momenta, step
    counts and random states are restored.

    Args:
        model: Model whose norms that derive from BatchNorm are recomputed. A layer that no batch
            reaches keeps its statistics. If the model is in training mode, parts that the caller
            has put in evaluation mode stay in it and keep their statistics. If the model is in
            evaluation mode, the whole model runs in training mode here.
        batches: Model inputs; ``num_batches`` of them are used on every process.
        num_batches: Number of batches per process, >= 1.
        plain: Whether to average the batch statistics instead of the mixed ones. For comparison
            only, because RefBN does not normalize by them in training.

    Returns:
        Number of layers recomputed.

    Raises:
        ValueError: If ``num_batches`` < 1, or if a batch reaches a norm that has no reference.
    """
    if num_batches < 1:
        raise ValueError(f"num_batches must be >= 1, got {num_batches}")
    training = {m: m.training for m in model.modules()}
    held = set() if not model.training else {m for m, mode in training.items() if not mode}
    norms = [m for m in _norms(model) if m not in held]
    momenta = [m.momentum for m in norms]
    sums: Dict[nn.Module, List[Tensor]] = {}

    def check(m: ReferenceNorm2d, _inputs: Tuple[Tensor]) -> None:
        if not m.has_reference:
            raise ValueError(
                "the model has norms without a reference; call capture_reference(model, batch) "
                "first"
            )

    def add(m: nn.Module, inputs: Tuple[Tensor], _output: Tensor) -> None:
        x = inputs[0]
        if x.numel() == 0:
            return
        mean, var = m.running_mean, m.running_var  # momentum is 1: the batch's statistics
        if plain:
            n = x.numel() // x.shape[1]
            mean, var = batch_moments(x)
            var = var * (n / max(n - 1, 1))
        one = torch.ones(1, dtype=torch.float64, device=mean.device)
        row = torch.cat([one, mean.double(), var.double()])
        if isinstance(m, EvalRefBatchNorm2d):
            own = x.double().mean(dim=(2, 3))
            row = torch.cat([row, own.mean(0).square(), own.square().mean(0)])
        sums[m] = sums[m] + row if m in sums else row

    with_reference = [m for m in norms if isinstance(m, ReferenceNorm2d)]
    handles = [m.register_forward_pre_hook(check) for m in with_reference]
    handles += [m.register_forward_hook(add) for m in norms]
    try:
        for m in training:
            m.training = m not in held
        for m in norms:
            m.momentum = 1.0
        with buffers_restored(model), forked_rng(0), EventStorage():
            for m in norms:  # values that are not finite would remain: 0 x inf is NaN
                m.running_mean.zero_()
                m.running_var.fill_(1)
            for batch in itertools.islice(batches, num_batches):
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for m, momentum in zip(norms, momenta):
            m.momentum = momentum
        for m, mode in training.items():
            m.training = mode
    done = 0
    for m in norms:  # the same order on every process
        parts = 4 if isinstance(m, EvalRefBatchNorm2d) else 2
        total = sums.get(m, torch.zeros(1 + parts * m.num_features, dtype=torch.float64))
        total = total.to(m.running_mean.device)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(total)
        if total[0] > 0:
            mean, var, *squares = (total[1:] / total[0]).split(m.num_features)
            m.running_mean.copy_(mean)
            m.running_var.copy_(var)
            if squares:
                m.set_own_weight(*(((s - mean.square()) / (var + m.eps)).mean() for s in squares))
            done += 1
    return done
