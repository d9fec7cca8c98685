"""What the benchmark measures is what it says."""

import torch
from torch import nn

from refbn_d2.benchmark import PlainRefBatchNorm2d, layer_times
from refbn_d2.norms import RefBatchNorm2d


def _times(**norms):
    contiguous, dtype = torch.contiguous_format, torch.float32
    return layer_times({"BN": nn.BatchNorm2d, **norms}, (2, 8, 40, 50), contiguous, dtype, 3)


def test_every_norm_is_measured_against_batch_norm():
    times = _times(RefBN=RefBatchNorm2d)
    assert times["BN"]["ratio"] == 1
    for t in times.values():
        assert 0 < t["both"]["low"] <= t["both"]["median"] <= t["both"]["high"]
        assert t["forward"]["median"] + t["backward"]["median"] < 10  # seconds, not milliseconds


def test_refbn_keeps_no_more_for_backward_than_batch_norm():
    times = _times(RefBN=RefBatchNorm2d, plain=PlainRefBatchNorm2d)
    x = 2 * 8 * 40 * 50 * 4
    assert min(t["bytes_kept"] for t in times.values()) >= x
    assert times["RefBN"]["bytes_kept"] <= 1.01 * times["BN"]["bytes_kept"]
    assert times["plain"]["bytes_kept"] >= 2 * x


def test_the_plain_formula_is_the_same_norm():
    x = torch.randn(3, 4, 5, 6, dtype=torch.double, requires_grad=True)
    results = []
    for build in (RefBatchNorm2d, PlainRefBatchNorm2d):
        norm = build(4, dtype=torch.double)
        norm.set_reference(torch.arange(4.0), torch.arange(1.0, 5), 60, 3)
        y = norm(x)
        results.append((y.detach(), *torch.autograd.grad((y**2).sum(), (x, norm.weight))))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
