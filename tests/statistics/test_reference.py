"""Capturing on one and on several processes, compared with one pass and a float64 oracle."""

import random

import numpy as np
import processes
import pytest
import tiny
import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import nn

from refbn_d2 import RefBatchNorm2d, capture_reference
from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.errors import UserError
from refbn_d2.statistics.reference import _OrderFreeRandperm, _padded_to, reference_layers


class Net(nn.Module):
    """Takes detectron2's inputs; two norms, of which the second sees what the first put out."""

    def __init__(self):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), RefBatchNorm2d(4)
        self.two, self.norm2 = nn.Conv2d(4, 2, 1), RefBatchNorm2d(2)

    def forward(self, batch):
        x = ImageList.from_tensors([d["image"] for d in batch]).tensor
        return self.norm2(self.two(self.norm1(self.one(x)).relu()))


def _net():
    torch.manual_seed(0)
    return Net()


def _batch(sizes):
    g = torch.Generator().manual_seed(1)
    return [{"image": torch.randn(3, *size, generator=g) + n} for n, size in enumerate(sizes)]


def _references(model):
    return {n: (m.ref_mean, m.ref_var) for n, m in reference_layers(model).items()}


def _assert_close(actual, expected, tol=1e-5):
    assert actual.keys() == expected.keys() and len(actual) > 0
    for name in expected:
        for a, e in zip(actual[name], expected[name]):
            assert torch.allclose(a.double(), e.double(), rtol=tol, atol=tol), name


def _oracle(net, sizes):
    """eq. 11-12 layer by layer in float64: each norm normalizes by the moments it just took."""
    with torch.no_grad():
        images = _batch(sizes)
        h, w = max(s[0] for s in sizes), max(s[1] for s in sizes)
        x = torch.zeros(len(sizes), 3, h, w, dtype=torch.float64)
        for n, d in enumerate(images):
            x[n, :, : sizes[n][0], : sizes[n][1]] = d["image"]
        found = {}
        for conv, norm, name in ((net.one, net.norm1, "norm1"), (net.two, net.norm2, "norm2")):
            weight, bias = conv.weight.double(), conv.bias.double()
            x = nn.functional.conv2d(x, weight, bias, padding=conv.padding)
            mean = x.mean(dim=(0, 2, 3))
            var = ((x - mean.view(-1, 1, 1)) ** 2).mean(dim=(0, 2, 3))
            found[name] = mean, var
            x = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + norm.eps).sqrt()
            x = x.clamp(min=0)  # gamma 1, beta 0, and the ReLU between them
        return found


SIZES = [(5, 7), (6, 4), (7, 7), (3, 8)]


def test_one_process_against_the_oracle():
    net = _net()
    record = capture_reference(net, _batch(SIZES))
    _assert_close(_references(net), _oracle(net, SIZES))
    assert {n: r["count"] for n, r in record.items()} == {"norm1": 4 * 7 * 8, "norm2": 4 * 7 * 8}
    assert record["norm1"]["mean"] == pytest.approx(net.norm1.ref_mean.mean().item())


def test_nothing_but_the_reference_changes():
    net = _net().train()
    net.norm2.eval()
    before = {k: v.clone() for k, v in net.state_dict().items() if "ref_" not in k}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with EventStorage() as storage:
        capture_reference(net, _batch(SIZES), seed=3)
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert net.training and net.norm1.training and not net.norm2.training
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert storage.latest() == {}


def test_an_empty_batch_and_a_model_without_references():
    with pytest.raises(ValueError, match="reference batch is empty"):
        capture_reference(_net(), [])
    assert capture_reference(nn.Conv2d(3, 3, 1), _batch([(4, 4)])) == {}


def test_a_layer_out_of_reach_is_named(caplog):
    net = _net()
    net.unused = RefBatchNorm2d(5)
    record = capture_reference(net, _batch(SIZES))
    assert set(record) == {"norm1", "norm2"} and not net.unused.has_reference
    assert "1 of 3 reference norms" in caplog.text and "unused" in caplog.text


def test_randperm_is_a_function_of_n():
    plain = torch.randperm(9)
    with _OrderFreeRandperm(5):
        first = torch.randperm(9)
        torch.randperm(4), torch.rand(3)
        again = torch.randperm(9, device=torch.device("cpu"))
        other = torch.randperm(10)
    assert torch.equal(first, again) and len(other) == 10
    assert sorted(first.tolist()) == list(range(9)) == sorted(plain.tolist())
    with _OrderFreeRandperm(6):
        assert not torch.equal(torch.randperm(9), first)


def test_padding_as_if_a_larger_image_were_there():
    images = [torch.ones(3, 4, 6), torch.ones(3, 5, 2)]
    with _padded_to(7, 9):
        padded = ImageList.from_tensors(images, 4)
    whole = ImageList.from_tensors([*images, torch.zeros(3, 7, 9)], 4)
    assert torch.equal(padded.tensor, whole.tensor[:2])
    assert [tuple(s) for s in padded.image_sizes] == [(4, 6), (5, 2)]
    assert ImageList.from_tensors(images, 4).tensor.shape[-2:] == (8, 8)  # no trace afterwards


def _detector(data):
    """A Mask R-CNN C4 and a batch of images of different sizes, proposals and RoIs included."""
    tiny.register(data)
    cfg = load_config(
        tiny.CONFIG,
        tiny.opts(
            SOLVER__IMS_PER_BATCH=4,
            # More candidates than are kept, so that the sampling decides.
            MODEL__RPN__BATCH_SIZE_PER_IMAGE=8,
            MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=4,
            INPUT__MIN_SIZE_TRAIN=(48, 64, 80),
        ),
    )
    torch.manual_seed(0)
    return Trainer.build_model(cfg), Trainer.load_reference_batch(cfg)


def _save_capture(rank, world_size, folder, data, num_images):
    if num_images is None:
        model, batch = _detector(data)
    else:
        model, batch = _net(), _batch(SIZES[:num_images])
    results = {"record": capture_reference(model, batch, seed=1)}
    results["references"] = _references(model)
    results["held"] = [m.has_reference for m in reference_layers(model).values()]
    torch.save(results, f"{folder}/{rank}.pt")


def _capture(world_size, folder, data, num_images):
    processes.run_group(world_size, _save_capture, str(folder), data, num_images)
    files = [f"{folder}/{rank}.pt" for rank in range(world_size)]
    return [torch.load(f, weights_only=True) for f in files]


def _assert_same_on_every_rank(results):
    for other in results[1:]:
        assert other["record"] == results[0]["record"]
        for name, pair in results[0]["references"].items():
            assert all(torch.equal(a, b) for a, b in zip(pair, other["references"][name])), name
    assert all(all(r["held"]) for r in results)


@pytest.mark.parametrize("world_size, num_images", [(2, 4), (4, 3), (2, 1)])
def test_processes_share_the_reference_of_the_whole_batch(tmp_path, world_size, num_images):
    """Also unevenly, and with fewer images than processes."""
    results = _capture(world_size, tmp_path, None, num_images)
    _assert_same_on_every_rank(results)
    _assert_close(results[0]["references"], _oracle(_net(), SIZES[:num_images]))


def _capture_beside_a_synchronized_norm(rank, world_size):
    net = _net()
    net.one = nn.Sequential(net.one, NaiveSyncBatchNorm(4))
    batch = _batch(SIZES)
    assert len(capture_reference(net, batch)) == 2
    with pytest.raises(UserError, match="1 images for 2 processes.*NUM_IMAGES higher"):
        capture_reference(net, batch[:1])
    net.one.eval()  # then it does not wait for the other process
    assert len(capture_reference(net, batch[:1])) == 2


def test_a_synchronized_norm_needs_an_image_on_each_process():
    processes.run_group(2, _capture_beside_a_synchronized_norm)


@pytest.mark.parametrize("world_size", [2, 4])
def test_detector_on_processes_equals_one_with_the_whole_batch(tiny_data, tmp_path, world_size):
    model, batch = _detector(tiny_data)
    assert len({tuple(d["image"].shape) for d in batch}) > 1
    record = capture_reference(model, batch, seed=1)
    results = _capture(world_size, tmp_path, tiny_data, None)
    _assert_same_on_every_rank(results)
    assert len(record) == 53
    counts = {n: r["count"] for n, r in record.items()}
    assert {n: r["count"] for n, r in results[0]["record"].items()} == counts
    # Float32 passes over parts of a batch round differently, and 53 layers pass it on.
    _assert_close(results[0]["references"], _references(model), tol=2e-3)
