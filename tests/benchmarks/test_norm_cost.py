"""The benchmark: it measures the norms that it names, each against BatchNorm."""

import torch
from tiny import opts
from torch import nn

from refbn_d2 import get_config_file
from refbn_d2.benchmarks.norm_cost import (
    PlainRefBatchNorm2d,
    SyncKernelsBatchNorm2d,
    compiled_ref_batch_norm,
    layer_times,
    model_times,
)
from refbn_d2.norms import RefBatchNorm2d


def _times(**norms):
    contiguous, dtype = torch.contiguous_format, torch.float32
    return layer_times({"BN": nn.BatchNorm2d, **norms}, (2, 8, 40, 50), contiguous, dtype, 3)


def test_every_norm_is_measured_against_batch_norm():
    times = _times(RefBN=RefBatchNorm2d)
    for t in times.values():
        for what in ("forward", "backward", "both"):
            assert 0 < t[what]["low"] <= t[what]["median"] <= t[what]["high"]
            assert t[what]["ratio"] > 0 and t[what]["floor_ratio"] > 0
        assert t["forward"]["median"] + t["backward"]["median"] < 10  # seconds, not milliseconds
    assert times["BN"]["forward"]["ratio"] == times["BN"]["backward"]["ratio"] == 1


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


def test_the_kernels_of_syncbn_are_batch_norm():
    x = torch.randn(3, 4, 5, 6)
    wanted = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(SyncKernelsBatchNorm2d(4)(x), wanted)


def test_the_compiled_layer_is_the_same_norm(monkeypatch):
    graphs = []

    def backend(graph, inputs):  # as torch.compile, but for writing C++
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend=backend, **kw))
    x, results = torch.randn(3, 4, 5, 6), []
    for norm in (compiled_ref_batch_norm(4), RefBatchNorm2d(4)):
        norm.set_reference(torch.arange(4.0), torch.arange(1.0, 5), 60, 3)
        results.append(norm(x))
    torch.testing.assert_close(*results)
    assert len(graphs) == 1  # the whole layer, and only of the first


def test_models_are_measured_against_the_first():
    config = get_config_file("Quick/Base-mask_rcnn_R_50_C4_quick.yaml")
    options = opts(MODEL__WEIGHTS="")
    times = model_times(config, ["BN", "RefBN"], 1, (64, 96), options, 2)
    assert list(times) == ["BN", "RefBN"]
    for t in times.values():
        assert t["peak_bytes"] > 50e6
        assert 0 < t["inference"]["median"] and 0 < t["step"]["median"] < 60
    assert times["BN"]["step"]["ratio"] == times["BN"]["inference"]["ratio"] == 1
