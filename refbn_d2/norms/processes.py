"""Which processes take a common reference if none was captured before training."""

from typing import List, Optional

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..log import get_logger
from .moments import Gather

__all__ = ["agreement_group", "all_gather", "warn_of_own_references"]

logger = get_logger(__name__)

_warned = False


def all_gather(group: Optional["dist.ProcessGroup"] = None) -> Gather:
    """Returns a function that gathers a tensor of this process from all processes of ``group``."""

    def gather(part: Tensor) -> List[Tensor]:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        return parts

    return gather


def _is_spread() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _active_ddp() -> Optional[DistributedDataParallel]:
    """The DistributedDataParallel whose forward pass is running, if any."""
    # This attribute is private, but there is no public one. PyTorch has it since 1.11.
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def agreement_group() -> Optional["dist.ProcessGroup"]:
    """Returns the group of processes that can exchange statistics in this forward pass, or None.

    A collective call waits for every process of the group. It is therefore safe only if all of them
    are known to reach it: in a forward pass of DistributedDataParallel, which requires that every
    process uses every layer in every step, possibly with an empty batch. The result is None with
    ``find_unused_parameters``, because a process may then skip layers, and with
    ``broadcast_buffers``, because DistributedDataParallel then copies the reference of rank 0 to
    every process before the next step.
    """
    ddp = _active_ddp() if _is_spread() else None
    if ddp is None or ddp.find_unused_parameters or ddp.will_sync_module_buffers():
        return None
    return ddp.process_group


def warn_of_own_references() -> None:
    """Logs once that this process has taken a reference that other processes do not share."""
    global _warned
    ddp = _active_ddp()
    if _warned or not _is_spread() or (ddp is not None and ddp.will_sync_module_buffers()):
        return
    _warned = True
    logger.warning(
        "Each process takes its own first batch as the reference, because the processes cannot "
        "agree on one without DistributedDataParallel, or with find_unused_parameters. A "
        "checkpoint stores the reference of one process only, so a resumed run continues with "
        "different references. Call refbn_d2.capture_reference(model, batch) on every process "
        "before training."
    )
