"""The buffers alone define the reference, and training steps do not wait for the device."""

import copy

import processes
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils._python_dispatch import TorchDispatchMode

from refbn_d2.norms import RefBatchNorm2d, ReferenceNorm2d, VirtualBatchNorm2d, capture

KINDS = [RefBatchNorm2d, VirtualBatchNorm2d]


def _captured(kind=RefBatchNorm2d, offset=3.0, c=3):
    layer = kind(c)
    with capture(layer):
        layer(torch.randn(5, c, 4, 4) * 2 + offset)
    return layer


def _x(c=3):
    return torch.randn(4, c, 4, 4)


def _assert_holds(layer, source):
    """``layer`` computes what ``source`` does, and keeps the reference over a training step."""
    x, training = _x(), layer.training
    for mode in (False, True):
        a, b = copy.deepcopy(layer).train(mode), copy.deepcopy(source).train(mode)
        b.running_mean.copy_(a.running_mean)
        b.running_var.copy_(a.running_var)
        assert torch.equal(a(x), b(x))
    layer.train()(x + 9)
    layer.train(training)
    assert layer.has_reference and torch.equal(layer.ref_mean, source.ref_mean)


def _write_in_place(target, source):
    for a, b in zip(target.buffers(), source.buffers()):
        a.copy_(b)


def _write_data(target, source):
    for a, b in zip(target.buffers(), source.buffers()):
        a.data.copy_(b)


def _replace_buffers(target, source):
    for name, b in source.named_buffers():
        target._buffers[name] = b.clone()


def _load(target, source):
    target.load_state_dict(source.state_dict())


def _assign(target, source):
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used_before", ["never", "trained", "evaluated"])
@pytest.mark.parametrize("write", [_write_in_place, _write_data, _replace_buffers, _load, _assign])
def test_whoever_writes_the_buffers_sets_the_reference(kind, used_before, write):
    source, target = _captured(kind), kind(3)
    if used_before == "trained":
        target(_x() - 4)
    elif used_before == "evaluated":
        target.eval()(_x())
    write(target, source)
    _assert_holds(target, source)


@pytest.mark.parametrize("write", [_write_in_place, _replace_buffers, _load, _assign])
def test_whoever_writes_the_buffers_drops_the_reference(write):
    target = _captured()
    target(_x())
    write(target, RefBatchNorm2d(3))
    assert not target.has_reference
    x = _x() - 7
    target(x)
    assert torch.allclose(target.ref_mean, x.mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("multi_avg_fn", [None, get_ema_multi_avg_fn(0.9)])
def test_averages_of_models_hold_the_reference(kind, use_buffers, multi_avg_fn):
    model = nn.Sequential(kind(3))
    average = AveragedModel(model, multi_avg_fn=multi_avg_fn, use_buffers=use_buffers)
    with capture(model):
        model(_x() + 2)
    for _ in range(4):
        model(_x())
        average.update_parameters(model)
    assert torch.equal(average.module[0].ref_size, model[0].ref_size)
    reloaded = nn.Sequential(kind(3))
    reloaded.load_state_dict(average.module.state_dict())
    _assert_holds(average.module[0], reloaded[0])
    update_bn([_x() * 5 + 7], average)
    assert torch.equal(average.module[0].ref_mean, model[0].ref_mean)


def test_functional_call_uses_the_state_that_it_is_given():
    layer, other, x = RefBatchNorm2d(3), _captured(), _x()
    state = {k: v.clone() for k, v in other.state_dict().items()}
    assert torch.equal(functional_call(layer, state, (x,)), other(x))
    assert not layer.has_reference
    layer(x)
    assert torch.allclose(layer.ref_mean, x.mean((0, 2, 3)), atol=1e-5)


def test_per_example_gradients():
    """Under vmap no value of the buffers can be read."""
    layer, x = _captured().eval(), _x()
    parameters = dict(layer.named_parameters())

    def loss(parameters, example):
        return functional_call(layer, parameters, (example[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    wanted = [torch.func.grad(loss)(parameters, example)["weight"] for example in x]
    assert torch.allclose(grads["weight"], torch.stack(wanted), rtol=1e-4)


def test_replicas_of_data_parallel_take_the_reference_once():
    layer, seen = RefBatchNorm2d(3), []
    for _ in range(3):
        replica = layer._replicate_for_data_parallel()
        replica._buffers, replica._parameters = dict(layer._buffers), dict(layer._parameters)
        replica(_x() + torch.randn(1))
        seen.append(layer.ref_mean.clone())
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [True, False])
def test_from_the_meta_device(kind, assign):
    source = _captured(kind)
    with torch.device("meta"):
        layer = kind(3)
    layer(torch.empty(2, 3, 4, 4, device="meta"))
    assert "reference=" in repr(layer)
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert not any(b.is_meta for b in layer.buffers())
    _assert_holds(layer, source)


def test_a_batch_norm_checkpoint_onto_the_meta_device():
    with torch.device("meta"):
        layer = RefBatchNorm2d(3)
    layer.load_state_dict(nn.BatchNorm2d(3).state_dict(), assign=True)
    assert not any(b.is_meta for b in layer.buffers()) and not layer.has_reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_of_version_0_1(kind, assign):
    source, target = _captured(kind), kind(3)
    state = copy.deepcopy(source.state_dict())
    state["ref_captured"] = torch.tensor(True)
    if kind is VirtualBatchNorm2d:
        state["ref_size"] = torch.tensor(5)
    else:
        del state["ref_size"]
    target.load_state_dict(state, strict=True, assign=assign)
    assert target.ref_captured.is_floating_point()
    _assert_holds(target, source)
    state["ref_captured"] = torch.tensor(False)
    target.load_state_dict(state, strict=True, assign=assign)
    assert not target.has_reference


class TestPartialLoad:
    """Only a state dict with this layer's own BatchNorm entries says that it has no reference."""

    def _net(self):
        return nn.Sequential(_captured(), nn.Flatten(), nn.Linear(48, 2))

    @pytest.mark.parametrize("keys", [["2.weight", "2.bias"], ["0.weight", "0.bias"], []])
    def test_of_other_things_keeps_the_reference(self, keys):
        net = self._net()
        before = net[0].ref_mean.clone()
        state = {k: torch.zeros_like(net.state_dict()[k]) for k in keys}
        missing = net.load_state_dict(state, strict=False).missing_keys
        assert net[0].has_reference and torch.equal(net[0].ref_mean, before)
        assert "0.ref_mean" in missing
        _assert_holds(net[0], copy.deepcopy(net[0]))

    def test_of_a_batch_norm_drops_it(self):
        net = self._net()
        state = {f"0.{k}": v for k, v in nn.BatchNorm2d(3).state_dict().items()}
        missing = net.load_state_dict(state, strict=False).missing_keys
        assert not net[0].has_reference and set(missing) == {"2.weight", "2.bias"}

    def test_a_layer_without_any_state_of_batch_norm_loads_it_strictly(self):
        options = {"affine": False, "track_running_stats": False}
        layer = RefBatchNorm2d(3, **options)
        layer.set_reference(torch.ones(3), torch.ones(3))
        layer.load_state_dict(nn.BatchNorm2d(3, **options).state_dict(), strict=True)
        assert layer.has_reference


class _Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_do_not_wait_for_the_device(kind):
    layer = kind(3)
    layer(_x())
    with _Reads() as reads:
        for _ in range(3):
            layer(_x())
        for _ in range(3):  # as DistributedDataParallel's broadcast of buffers
            _write_in_place(layer, copy.deepcopy(layer))
            layer(_x())
    assert reads.count == 0


def test_a_rewritten_buffer_without_a_reference_takes_the_next_batch():
    layer = RefBatchNorm2d(3)
    layer(_x())
    layer.ref_captured.zero_()
    x = _x() + 5
    with _Reads() as reads:
        layer(x)
    assert reads.count == 0 and layer.has_reference
    assert torch.allclose(layer.ref_mean, x.mean((0, 2, 3)), atol=1e-5) and layer.ref_size == 4


def test_one_value_per_channel_after_a_rewrite_is_refused_without_a_reference():
    layer = _captured()
    layer(_x())
    layer.ref_captured.zero_()
    with pytest.raises(ValueError, match="only 1 value per channel"):
        layer(torch.randn(1, 3, 1, 1))
    layer.ref_captured.fill_(1)
    assert layer(torch.randn(1, 3, 1, 1)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_a_reference_it_takes_the_first_batch(kind):
    plain, compiled, x = kind(3), kind(3), _x()
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    assert torch.allclose(graph(x), plain(x), atol=1e-5)
    assert torch.allclose(compiled.ref_mean, plain.ref_mean, atol=1e-6)
    assert compiled.has_reference and torch.allclose(graph.eval()(x), plain.eval()(x), atol=1e-5)


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 1), RefBatchNorm2d(4), nn.ReLU(), RefBatchNorm2d(4))


def _check_agreement(rank, world_size):
    # First the second process has no samples, like a head without RoIs; then no process has any.
    torch.manual_seed(1 + rank)
    for sizes in ([3, 2], [3, 0], [0, 2]):
        model = _model()
        ddp = DistributedDataParallel(model, broadcast_buffers=False)
        ddp(torch.randn(0, 3, 4, 4)).sum().backward()
        assert not model[1].has_reference
        x = torch.randn(sizes[rank], 3, 4, 4)
        ddp(x).sum().backward()
        parts = [None] * world_size
        dist.all_gather_object(parts, x)
        # One process with the whole batch takes the same.
        whole = _model()
        whole[1](whole[0](torch.cat(parts)))
        assert torch.allclose(model[1].ref_mean, whole[1].ref_mean, rtol=1e-4, atol=1e-5)
        assert torch.allclose(model[1].ref_var, whole[1].ref_var, rtol=1e-4)
        assert model[1].ref_size == sum(sizes)
        for buffer in (model[3].ref_mean, model[3].ref_var):
            values = [torch.empty_like(buffer) for _ in range(world_size)]
            dist.all_gather(values, buffer)
            assert torch.equal(*values)
        # Later steps exchange nothing: what one process does alone cannot hang.
        if rank == 0:
            model(torch.randn(2, 3, 4, 4))


def _check_apart(rank, world_size):
    warnings = []
    from refbn_d2.norms import processes as module

    module.logger.warning = warnings.append
    # A process that leaves the layers out does not make the other one wait.
    model = _model()
    if rank == 0:
        model(torch.randn(2, 3, 4, 4))
    assert len(warnings) == (1 if rank == 0 else 0)
    assert all("capture_reference" in w for w in warnings)
    model = _model()
    ddp = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    ddp.require_backward_grad_sync = False
    if rank == 0:
        ddp(torch.randn(2, 3, 4, 4))
        assert model[1].has_reference


def _check_broadcast(rank, world_size):
    model = _model()
    ddp = DistributedDataParallel(model, broadcast_buffers=True)
    torch.manual_seed(rank)
    for _ in range(2):
        ddp(torch.randn(2, 3, 4, 4)).sum().backward()
    values = [torch.empty(4) for _ in range(world_size)]
    dist.all_gather(values, model[1].ref_mean)
    assert torch.equal(*values)


@pytest.mark.parametrize("check", [_check_agreement, _check_apart, _check_broadcast])
def test_references_of_two_processes(check):
    processes.run_group(2, check)


def test_the_class_attribute_of_ddp_exists():
    assert DistributedDataParallel._active_ddp_module is None
    assert torch._C._current_graph_task_id() == -1
    assert issubclass(RefBatchNorm2d, ReferenceNorm2d)
