"""Recomputed inference statistics, compared with averages as in the paper's Algorithm 3."""

import copy

import processes
import pytest
import torch
from fvcore.nn import update_bn_stats
from torch import distributed as dist
from torch import nn

from refbn_d2.norms import (
    BatchRenorm2d,
    EvalRefBatchNorm2d,
    MovingAverageBatchNorm2d,
    RefBatchNorm2d,
)
from refbn_d2.statistics.inference import recompute_statistics


def _network(norm):
    torch.manual_seed(0)
    first = norm(3)
    if isinstance(first, RefBatchNorm2d):
        first.set_reference(torch.tensor([1.0, -1.0, 0.5]), torch.tensor([2.0, 0.5, 1.0]))
    return nn.Sequential(first, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))


def _batches():
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 6, 7, generator=g) * n + 1 for n in (2, 3, 5)]


def _expected(batches, model, plain=False):
    """E_B[mu] and E_B of the Bessel-corrected variance, in float64, of the first layer."""
    layer, means, variances = model[0], [], []
    for x in batches:
        x = x.double()
        n = x.numel() // 3
        mean, var, bessel = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0), n / (n - 1)
        if isinstance(layer, RefBatchNorm2d) and not plain:
            lam = 1 / (len(x) + 1)
            means.append((1 - lam) * mean + lam * layer.ref_mean)
            variances.append((1 - lam) * bessel * var + lam * layer.ref_var)
        else:
            means.append(mean)
            variances.append(bessel * var)
    return sum(means) / len(means), sum(variances) / len(variances)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, RefBatchNorm2d])
@pytest.mark.parametrize("plain", [False, True])
def test_averages_over_batches(norm, plain):
    model = _network(norm)
    assert recompute_statistics(model, _batches(), 3, plain) == 2
    mean, var = _expected(_batches(), model, plain)
    torch.testing.assert_close(model[0].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[0].running_var.double(), var, rtol=1e-5, atol=1e-6)


def test_the_weight_of_an_images_own_statistics_is_measured():
    """It is the slope of the regression of mean_B on mean_x, in units of the running deviation."""
    model = _network(EvalRefBatchNorm2d)
    recompute_statistics(model, _batches(), 3)
    mean, var = _expected(_batches(), model)
    scale = (var + model[0].eps).sqrt()
    batches = [(x.double().mean((2, 3)) - mean) / scale for x in _batches()]
    of_batch = torch.stack([z.mean(0).square().mean() for z in batches]).mean()
    of_image = torch.stack([z.square().mean() for z in batches]).mean()
    assert 0.1 < of_batch / of_image < 1
    assert float(model[0].own_weight) == pytest.approx(float(of_batch / of_image), rel=1e-4)


def test_nothing_else_changes():
    model = _network(RefBatchNorm2d)
    model[2].momentum = None
    model.eval()
    model[0].train()
    before, rng = copy.deepcopy(model), torch.get_rng_state()
    recompute_statistics(model, _batches(), 2)
    assert torch.equal(torch.get_rng_state(), rng)
    for (name, a), (_, b) in zip(model.state_dict().items(), before.state_dict().items()):
        if "running" not in name:
            assert torch.equal(a, b), name
    for a, b in zip(model.modules(), before.modules()):
        assert a.training == b.training and getattr(a, "momentum", 0) == getattr(b, "momentum", 0)


class _ReplacesItsBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("expanded", torch.arange(3).expand(2, 3))

    def forward(self, x):
        self.steps = self.steps + 1
        return x


def test_buffers_that_are_replaced_or_cannot_be_written():
    model = _network(nn.BatchNorm2d)
    model.append(_ReplacesItsBuffer())
    steps = model[4].steps
    assert recompute_statistics(model, _batches(), 2) == 2
    assert model[4].steps is steps and steps == 0


@pytest.mark.parametrize("before", [9, float("inf"), float("nan")])
@pytest.mark.parametrize("norm", [RefBatchNorm2d, EvalRefBatchNorm2d])
def test_it_does_not_depend_on_what_was_there_before(norm, before):
    models = [_network(norm) for _ in range(2)]
    models[1][0].running_mean.fill_(before)
    models[1][2].running_var.fill_(before)
    for model in models:
        recompute_statistics(model, _batches(), 3)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [BatchRenorm2d, MovingAverageBatchNorm2d])
def test_layers_that_are_not_reached_or_train_by_their_statistics_keep_them(kind):
    model = _network(kind)
    model.unused = nn.Sequential(nn.BatchNorm2d(2), RefBatchNorm2d(2))  # it has no reference
    model.forward = lambda x: model[2](model[1](model[0](x)))
    before = copy.deepcopy(model.unused.state_dict())
    steered = copy.deepcopy(model[0].state_dict())
    assert recompute_statistics(model, _batches(), 1) == 1
    for layer, state in ((model.unused, before), (model[0], steered)):
        for a, b in zip(layer.state_dict().values(), state.values()):
            assert torch.equal(a, b)


def test_parts_held_in_evaluation_mode_stay_so():
    model = _network(nn.BatchNorm2d)
    model[2].running_mean.fill_(3)
    model.train()
    model[2].eval()
    seen = []
    handle = model[3].register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    assert recompute_statistics(model, _batches(), 3) == 1
    handle.remove()
    assert not model[2].training and model[3].training
    assert torch.equal(model[2].running_mean, torch.full((4,), 3.0))
    # What came out of the held norm was normalized by its statistics, not by the batch's.
    x = _batches()[0]
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    inner = model[1]((x - mean) / (var + model[0].eps).sqrt())
    torch.testing.assert_close(seen[0], (inner - 3) / (1 + model[2].eps) ** 0.5)


def test_needs_a_batch_and_a_reference():
    with pytest.raises(ValueError, match="num_batches"):
        recompute_statistics(_network(nn.BatchNorm2d), _batches(), 0)
    model = nn.Sequential(nn.BatchNorm2d(3), RefBatchNorm2d(3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="reference"):
        recompute_statistics(model, _batches(), 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def _on_every_rank(model):
    """The running statistics of the first layer, of each process."""
    own = torch.cat([model[0].running_mean, model[0].running_var])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return parts


def _check_processes(rank, world_size):
    batches = _batches() + [x + 2 for x in _batches()]  # of different sizes on each process, too
    own = batches[rank::world_size]
    for norm in (nn.BatchNorm2d, RefBatchNorm2d):
        model = _network(norm)
        recompute_statistics(model, own, len(own))
        parts = _on_every_rank(model)
        assert all(torch.equal(part, parts[0]) for part in parts)
        expected = torch.cat(_expected(batches, model))
        torch.testing.assert_close(parts[0].double(), expected, rtol=1e-5, atol=1e-6)
    model = _network(nn.BatchNorm2d)
    update_bn_stats(model, own, len(own))
    parts = _on_every_rank(model)
    assert not torch.equal(parts[0], parts[1])  # why there is one of our own


def test_the_same_on_every_process_and_of_all_batches():
    processes.run_group(2, _check_processes)
