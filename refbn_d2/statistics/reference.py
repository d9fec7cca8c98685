"""Captures the reference of a detectron2 model, on any number of processes."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List

import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch import distributed as dist
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from ..log import get_logger
from ..norms import ReferenceNorm2d, capture
from ..norms.processes import all_gather
from ..rng import forked_rng
from ..upstream import exchanged

__all__ = ["capture_reference", "reference_layers"]

logger = get_logger(__name__)

_SYNC = (nn.SyncBatchNorm, NaiveSyncBatchNorm)


def reference_layers(model: nn.Module) -> Dict[str, ReferenceNorm2d]:
    """Returns the norms of ``model`` that can hold a reference, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ReferenceNorm2d)}


class _OrderFreeRandperm(TorchFunctionMode):
    """Makes the result of torch.randperm(n) depend on the seed and n only.

    R-CNNs use randperm to sample anchors and proposals of each image. With one random stream, the
    sample for an image would depend on the images that the same process handled before it.
    """

    def __init__(self, seed: int):
        super().__init__()
        self._seed = seed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.randperm:
            # Drawn on the CPU, so that the result does not depend on the device.
            device = kwargs.pop("device", None)
            generator = torch.Generator().manual_seed(self._seed)
            return func(*args, **{**kwargs, "generator": generator}).to(device)
        return func(*args, **kwargs)


@contextmanager
def _padded_to(height: int, width: int) -> Iterator[None]:
    """Makes ImageList pad every batch as if it contained an image of height x width.

    The padding affects the statistics, so it must not depend on how images are split over
    processes.
    """
    from_tensors = ImageList.from_tensors

    def padded(tensors: List[Tensor], *args, **kwargs) -> ImageList:
        extra = tensors[0].new_zeros(*tensors[0].shape[:-2], height, width)
        images = from_tensors([*tensors, extra], *args, **kwargs)
        return ImageList(images.tensor[:-1], images.image_sizes[:-1])

    with exchanged("detectron2.structures:ImageList.from_tensors", staticmethod(padded)):
        yield


def capture_reference(
    model: nn.Module, batch: List[Dict[str, Any]], seed: int = 0
) -> Dict[str, Dict[str, float]]:
    """Sets the reference of every reference norm of ``model`` from one batch (eq. 11-12).

    This runs one forward pass without gradients; each module keeps its mode. See
    :func:`refbn_d2.norms.capture`. In an R-CNN in training mode the pass includes proposals, the
    sampling of RoIs and the RoI heads. Only the references change: the rest of the model and all
    random states are restored.

    With several processes, every process must call this function with the *same whole* batch. The
    images are split over the processes, the statistics are combined exactly, and all processes get
    bitwise identical references. They equal those that one process would take from the whole
    batch, up to rounding.

    Args:
        model: Model, with or without a DistributedDataParallel wrapper.
        batch: Batch of the training loader, a list of dicts with "image" of shape (C, H, W).
        seed: Seed of the sampling in the forward pass.

    Returns:
        For each layer that took a reference, by name: ``count`` (number of elements per channel),
        and ``mean`` and ``var`` (averages over channels).

    Raises:
        ValueError: If ``batch`` is empty, or if a layer saw only one value per channel.
        UserError: If there are fewer images than processes, and the model also has a SyncBN, which
            waits for all processes.
    """
    if not batch:
        raise ValueError("the reference batch is empty: pass at least one image")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    layers = reference_layers(model)
    if not layers:
        return {}
    world_size, rank = comm.get_world_size(), comm.get_rank()
    sizes = [d["image"].shape[-2:] for d in batch]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    # If there are fewer images than processes, the remaining processes only receive the result.
    num_active = min(len(batch), world_size)
    waits = any(isinstance(m, _SYNC) and m.training for m in model.modules())
    if waits and num_active < world_size:
        raise UserError(
            f"a reference batch of {len(batch)} images for {world_size} processes: a SyncBN of "
            "the model needs an image on each; set MODEL.REFBN.REFERENCE.NUM_IMAGES higher"
        )
    group = dist.new_group(list(range(num_active))) if num_active < world_size else None
    gather = all_gather(group) if world_size > 1 else None
    taken = []
    if rank < num_active:
        with forked_rng(seed), _OrderFreeRandperm(seed), _padded_to(height, width):
            # R-CNNs log to the current EventStorage. This one keeps the pass out of training's log.
            with EventStorage(), capture(model, gather) as taken:
                model(batch[rank::num_active])
    if group is not None and rank < num_active:
        dist.destroy_process_group(group)
    if world_size > 1:
        taken = _broadcast(layers, taken)
    missed = sorted(set(layers) - {name for name, _ in taken})
    if missed:
        logger.warning(
            "The forward pass did not reach %d of %d reference norms; each will take the first "
            "batch it sees: %s",
            len(missed),
            len(layers),
            ", ".join(missed),
        )
    return {
        name: {
            "count": count,
            "mean": float(layers[name].ref_mean.mean()),
            "var": float(layers[name].ref_var.mean()),
        }
        for name, count in taken
    }


def _broadcast(layers: Dict[str, ReferenceNorm2d], taken: List) -> List:
    """Gives every process the references that rank 0 took."""
    message = [taken]
    device = next(iter(layers.values())).ref_mean.device
    dist.broadcast_object_list(message, src=0, device=device)
    for name, count in message[0]:
        layer = layers[name]
        for buffer in (layer.ref_mean, layer.ref_var, layer.ref_size):
            dist.broadcast(buffer, src=0)
        layer.set_reference(layer.ref_mean, layer.ref_var, count, int(layer.ref_size))
    return message[0]
