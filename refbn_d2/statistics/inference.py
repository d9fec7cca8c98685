"""Inference statistics recomputed with fixed weights (Algorithm 3, lines 8-9)."""

import itertools
from typing import Any, Dict, Iterable, List, Tuple

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..norms import BatchRenorm2d, ReferenceNorm2d, batch_moments
from ..rng import forked_rng

__all__ = ["recompute_statistics"]


def _norms(model: nn.Module) -> List[nn.Module]:
    """The norms whose running statistics only inference uses; BRN's also steer its training."""
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        and not isinstance(m, BatchRenorm2d)
        and m.running_mean is not None
    ]


@torch.no_grad()
def recompute_statistics(
    model: nn.Module, batches: Iterable[Any], num_batches: int, plain: bool = False
) -> int:
    """Sets running_mean and running_var to averages over training batches with the weights as is.

    E[x] = E_B[mu], Var[x] = E_B[n / (n - 1) var_B], each batch weighing the same, on all processes
    together. mu and var are what the norm's own training uses: the mixed ones for RefBN. (fvcore's
    PreciseBN takes back a Bessel correction of the whole variance, which mixed statistics do not
    have.) Weights, training flags, momenta, step counts and random states are as before.

    Args:
        model: Its norms that derive from BatchNorm are recomputed; a layer that no batch reaches is
            left alone. Parts of a model in training mode that the user holds in evaluation mode
            stay so, with their statistics. A model in evaluation mode runs in training mode here.
        batches: model inputs; ``num_batches`` of them are taken on every process.
        num_batches: >= 1.
        plain: for comparison only: average the batches' own statistics although RefBN normalizes
            them by the mixed ones.

    Returns:
        Number of layers recomputed.

    Raises:
        ValueError: ``num_batches`` < 1, or a norm's reference is not captured.
    """
    if num_batches < 1:
        raise ValueError(f"num_batches must be >= 1, got {num_batches}")
    if not all(m.has_reference for m in model.modules() if isinstance(m, ReferenceNorm2d)):
        raise ValueError("the model has norms without a reference; capture one first")
    training = {m: m.training for m in model.modules()}
    held = set() if not model.training else {m for m, mode in training.items() if not mode}
    norms = [m for m in _norms(model) if m not in held]
    momenta = [m.momentum for m in norms]
    buffers = [(b, b.clone()) for b in model.buffers()]
    sums: Dict[nn.Module, List[Tensor]] = {}

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
        sums[m] = sums[m] + row if m in sums else row

    handles = [m.register_forward_hook(add) for m in norms]
    try:
        for m in training:
            m.training = m not in held
        for m in norms:
            m.momentum = 1.0
        with forked_rng(0), EventStorage():
            for batch in itertools.islice(batches, num_batches):
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for m, momentum in zip(norms, momenta):
            m.momentum = momentum
        for buffer, value in buffers:
            buffer.copy_(value)
        for m, mode in training.items():
            m.training = mode
    done = 0
    for m in norms:  # the same order on every process
        total = sums.get(m, torch.zeros(1 + 2 * m.num_features, dtype=torch.float64))
        total = total.to(m.running_mean.device)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(total)
        if total[0] > 0:
            mean, var = (total[1:] / total[0]).split(m.num_features)
            m.running_mean.copy_(mean)
            m.running_var.copy_(var)
            done += 1
    return done
