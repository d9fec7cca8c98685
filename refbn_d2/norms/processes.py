"""Which processes take a reference together where nobody captured one."""

import logging
from typing import List, Optional

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .moments import Gather

__all__ = ["agreement_group", "all_gather", "warn_of_own_references"]

logger = logging.getLogger(__name__)

_warned = False


def all_gather(group: Optional["dist.ProcessGroup"] = None) -> Gather:
    """A function that maps a tensor of this process to those of all processes of ``group``."""

    def gather(part: Tensor) -> List[Tensor]:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        return parts

    return gather


def _is_spread() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _active_ddp() -> Optional[DistributedDataParallel]:
    """The DistributedDataParallel whose forward pass is running, if any."""
    # Private, but there is no other way to tell; PyTorch has it since 1.11.
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def agreement_group() -> Optional["dist.ProcessGroup"]:
    """The processes with which this forward pass can exchange statistics; None for none.

    A collective call waits for every process, so it is made only where all of them are known to
    come by: in a forward pass of DistributedDataParallel, which demands that each process uses each
    layer in each step, be it with an empty batch. Not with ``find_unused_parameters``, which allows
    a process to leave layers out; and not with ``broadcast_buffers``, which gives every process the
    reference of the first one before the next step anyway.
    """
    ddp = _active_ddp() if _is_spread() else None
    if ddp is None or ddp.find_unused_parameters or ddp.will_sync_module_buffers():
        return None
    return ddp.process_group


def warn_of_own_references() -> None:
    """Logs, once, that this process has taken a reference that the others do not know."""
    global _warned
    ddp = _active_ddp()
    if _warned or not _is_spread() or (ddp is not None and ddp.will_sync_module_buffers()):
        return
    _warned = True
    logger.warning(
        "Each process takes its own first batch as the reference, and keeps it: without "
        "DistributedDataParallel, or with find_unused_parameters, the processes cannot agree on "
        "one. A checkpoint has that of one process, so a resumed run trains another function. "
        "Call refbn_d2.capture_reference(model, batch) on every process before training."
    )
