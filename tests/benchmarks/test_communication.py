"""The collective operations of a training step, also for a process with an empty batch."""

import processes
import pytest
import tiny
import torch
from detectron2.utils.events import EventStorage
from torch import distributed as dist
from torch import nn

from refbn_d2.benchmarks.communication import communication
from refbn_d2.config import load_config
from refbn_d2.engine import Trainer

NUM_NORMS = 53


def _config(norm, **changes):
    return load_config(tiny.CONFIG, tiny.opts(MODEL__RESNETS__NORM=norm, **changes))


def _check_communication(rank, world_size, data, folder):
    tiny.register(data)
    norms = ("BN", "RefBN", "SyncRefBN")
    bn, ref_bn, sync = (communication(_config(n, OUTPUT_DIR=f"{folder}/{n}")) for n in norms)
    assert bn["all_reduce"] > 0 and bn["elements"] > 0
    assert ref_bn == bn  # RefBN adds nothing
    model = Trainer.build_model(_config("SyncRefBN"))
    channels = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(channels) == NUM_NORMS
    # Mean, variance, elements and samples forward; the two sums of the gradient backward.
    bn["all_gather"] += NUM_NORMS
    bn["all_reduce"] += NUM_NORMS
    bn["elements"] += sum(2 * c + 2 + 2 * c for c in channels)
    assert sync == bn


def test_ref_bn_adds_nothing_and_sync_ref_bn_two_operations_a_layer(tiny_data, tmp_path):
    processes.run_group(2, _check_communication, tiny_data, str(tmp_path))


def _check_without_rois(rank, world_size, data, norm):
    tiny.register(data)
    torch.manual_seed(0)
    cfg = _config(norm)
    model = Trainer.build_model(cfg).train()
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    # No proposals; only the ground truth of rank 0 becomes RoIs.
    model.proposal_generator.post_nms_topk[True] = 0
    batch = Trainer.load_reference_batch(cfg)
    if rank == 1:
        for image in batch:
            image["instances"] = image["instances"][:0]
    rois = []
    model.roi_heads.res5.register_forward_pre_hook(lambda m, x: rois.append(len(x[0])))
    for _ in range(2):  # the first step takes the reference
        with EventStorage():
            losses = parallel(batch)
        parallel.zero_grad()
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
    assert (rois[-1] == 0) == (rank == 1)
    for name, p in model.named_parameters():
        parts = [torch.empty_like(p.grad) for _ in range(world_size)]
        dist.all_gather(parts, p.grad)
        assert torch.equal(parts[0], parts[1]) and parts[0].isfinite().all(), name


@pytest.mark.parametrize("norm", ["RefBN", "SyncRefBN"])
def test_a_process_without_rois_does_not_hang_the_others(tiny_data, norm):
    processes.run_group(2, _check_without_rois, tiny_data, norm)
