"""SyncRefBatchNorm2d on k processes equals RefBatchNorm2d on one with the whole batch."""

import copy

import oracle
import processes
import pytest
import torch
from torch import distributed as dist
from torch import nn

from refbn_d2.norms import RefBatchNorm2d, SyncRefBatchNorm2d, capture

C = 3
# Images of each process, by step. Each has at least one process with nothing.
UNEVEN = [[3, 1], [0, 4], [0, 0], [2, 0], [1, 0]]


def _layers(k=1.0, dtype=torch.float64, captured=True, momentum=0.1):
    torch.manual_seed(0)
    layers = []
    for kind in (SyncRefBatchNorm2d, RefBatchNorm2d):
        layer = kind(C, pseudo_count=k, momentum=momentum)
        layers.append(layer)
    sync, whole = layers
    with torch.no_grad():
        sync.weight.copy_(torch.randn(C))
        sync.bias.copy_(torch.randn(C))
    if captured:
        sync.set_reference(torch.randn(C), torch.rand(C) + 0.5, 100, 4)
    whole.load_state_dict(sync.state_dict())
    return sync.to(dtype), whole.to(dtype)


def _step(layer, x, g):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * g).sum().backward()
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


def _same_on_every_rank(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    assert all(torch.equal(parts[0], p) for p in parts)


def _close(actual, expected, tol):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.allclose(actual, expected, rtol=tol, atol=tol)


def _compare(rank, world_size, sync, whole, sizes, tol):
    start, stop = sum(sizes[:rank]), sum(sizes[: rank + 1])
    # Parts that differ in mean and scale: averages of per-process statistics would be wrong.
    x = torch.randn(sum(sizes), C, 4, 3, dtype=torch.float64)
    x = x * (1 + torch.arange(sum(sizes)).view(-1, 1, 1, 1)) + 5 * torch.randn(sum(sizes), 1, 1, 1)
    x, g = x.to(sync.weight.dtype), torch.randn(x.shape).to(sync.weight.dtype)
    y, grad, grad_weight, grad_bias = _step(sync, x[start:stop], g[start:stop])
    wanted = _step(whole, x, g)
    _close(y, wanted[0][start:stop], tol)
    _close(grad, wanted[1][start:stop], tol)
    for part, total in zip((grad_weight, grad_bias), wanted[2:]):
        dist.all_reduce(part)
        _close(part, total, tol * 100)
    state = whole.state_dict()
    for name, _ in whole.named_buffers():
        if name not in state:  # not what was loaded into sync
            continue
        buffer, actual = state[name], getattr(sync, name)
        assert actual.dtype == buffer.dtype
        _close(actual.double(), buffer.double(), tol)
        _same_on_every_rank(actual.double())


def _check_equality(rank, world_size):
    for k, captured, momentum, dtype, tol in [
        (1.0, True, 0.1, torch.float64, 1e-10),
        (1.0, False, None, torch.float64, 1e-10),
        (2.5, True, 0.1, torch.float32, 2e-5),
        (0.0, False, 0.1, torch.float64, 1e-10),
    ]:
        sync, whole = _layers(k, dtype, captured, momentum)
        sizes = UNEVEN if world_size == 2 else [[2, 0, 1, 4], [0, 0, 3, 0], [1, 1, 1, 1]]
        for step in sizes:
            _compare(rank, world_size, sync, whole, step, tol)
        assert sync.has_reference == (k > 0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_one_process_with_the_whole_batch(world_size):
    processes.run_group(world_size, _check_equality)


def _check_module_behaviour(rank, world_size):
    torch.manual_seed(0)
    # pseudo_count=0 is the true synchronized BatchNorm: nn.BatchNorm2d with the whole batch.
    sync, bn = SyncRefBatchNorm2d(C, pseudo_count=0).double(), nn.BatchNorm2d(C).double()
    x, g = torch.randn(5, C, 4, 4).double() * 2 + 1, torch.randn(5, C, 4, 4).double()
    part = slice(0, 4) if rank == 0 else slice(4, 5)
    y, grad, *_ = _step(sync, x[part], g[part])
    wanted = _step(bn, x, g)
    _close(y, wanted[0][part], 1e-10)
    _close(grad, wanted[1][part], 1e-10)
    _close(sync.running_mean, bn.running_mean, 1e-10)
    _close(sync.running_var, bn.running_var, 1e-10)

    # One value per channel on all processes together: every process says so, none waits.
    one = torch.randn(1 if rank == 0 else 0, C, 1, 1)
    for k, message in [(0, "more than 1 value per channel"), (1, "no reference is captured")]:
        with pytest.raises(ValueError, match=message):
            SyncRefBatchNorm2d(C, pseudo_count=k)(one)
    sync, whole = _layers()
    with torch.no_grad():
        all_of_it = torch.ones(1, C, 1, 1).double()
        y = sync(all_of_it[: 1 - rank])
        _close(y, whole(all_of_it)[: 1 - rank], 1e-12)

    # One value per process is two together: legal without any reference.
    layer = SyncRefBatchNorm2d(C).double()
    values = torch.tensor([1.0, 4.0]).double()
    layer(values[rank].expand(1, C, 1, 1))
    assert layer.ref_mean.tolist() == [2.5] * C and layer.ref_var.tolist() == [2.25] * C
    assert layer.ref_size == 2

    # In evaluation the processes need not be in step.
    if rank == 0:
        y = sync.eval()(x)
        assert torch.equal(y, whole.eval()(x))

    # bfloat16: an empty part must speak the others' dtype.
    sync, _ = _layers(dtype=torch.float32)
    xb = torch.randn(4 if rank else 0, C, 4, 4).bfloat16().requires_grad_()
    y = sync(xb)
    y.sum().backward()
    assert y.dtype == xb.grad.dtype == torch.bfloat16
    if rank:
        reference = sync.ref_mean.double(), sync.ref_var.double()
        affine = sync.weight.double(), sync.bias.double()
        assert oracle.relative_error(y, oracle.ref_bn(xb.double(), *reference, *affine)[0]) < 2e-2

    # An empty input that is cut off from the graph, and a first layer whose input needs no
    # gradient, still join the backward pass.
    x = torch.randn(4 if rank else 0, C, 4, 4, requires_grad=bool(rank))
    sync(x).sum().backward()
    assert (x.grad is not None) == bool(rank)

    # During a capture the layer itself does not communicate.
    if rank == 0:
        with capture(sync) as taken:
            sync(torch.randn(3, C, 4, 4))
        assert taken == [("", 48)]


def test_behaviour_as_a_module():
    processes.run_group(2, _check_module_behaviour)


def _check_whole_network(rank, world_size):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, C, 3), SyncRefBatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 1)
    ).append(SyncRefBatchNorm2d(C))
    net.double()
    whole = copy.deepcopy(net)
    for i in (1, 4):
        whole[i] = RefBatchNorm2d(C).double()
    parallel = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    for sizes in ([3, 2], [4, 0]):
        x = torch.randn(sum(sizes), 2, 5, 5).double()
        part = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))
        for model, images in ((parallel, x[part]), (whole, x)):
            model.zero_grad()
            (model(images) ** 3).sum().backward()
        for p, q in zip(net.parameters(), whole.parameters()):
            _close(p.grad * world_size, q.grad, 1e-8)  # DDP averages


def test_a_network_under_distributed_data_parallel():
    processes.run_group(2, _check_whole_network)


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("k", [0.0, 1.0])
def test_alone_it_is_ref_bn(in_group, captured, k, tmp_path):
    if in_group:
        store = f"file://{tmp_path}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        sync, whole = _layers(k, torch.float32, captured)
        for training in (True, True, False):
            x, g = torch.randn(4, C, 5, 5), torch.randn(4, C, 5, 5)
            results = [_step(m.train(training), x, g) for m in (sync, whole)]
            assert all(torch.equal(a, b) for a, b in zip(*results))
        assert all(torch.equal(v, whole.state_dict()[n]) for n, v in sync.state_dict().items())
        empty = torch.randn(0, C, 2, 2, requires_grad=True)
        assert sync.train()(empty).requires_grad
    finally:
        if in_group:
            dist.destroy_process_group()


def test_state_dict_and_copies_are_ref_bns():
    sync, whole = _layers()
    assert list(sync.state_dict()) == list(whole.state_dict())
    assert isinstance(sync, RefBatchNorm2d)
    assert repr(copy.deepcopy(sync)).startswith("SyncRefBatchNorm2d(3, ")
