"""EvalRefBN: BatchNorm in training, and in evaluation the equations of its docstring."""

import copy

import oracle
import pytest
import torch
from fvcore.nn import update_bn_stats
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, replace_all_batch_norm_modules_, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from refbn_d2.norms import EvalRefBatchNorm2d, convert_norm, fold_norms

FORMATS = [torch.contiguous_format, torch.channels_last]


def grouped(rho: float, n: int = 4, channels: int = 64, seed: int = 0):
    """Endless batches (n, channels, 3, 5) whose images have means that correlate by ``rho``."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    while True:
        means = rho**0.5 * normal(1, channels) + (1 - rho) ** 0.5 * normal(n, channels)
        yield normal(n, channels, 3, 5) * 0.01 + 3 * means[:, :, None, None] + 7


def trained(rho: float, steps: int = 1600, n: int = 4, **kwargs) -> EvalRefBatchNorm2d:
    norm = EvalRefBatchNorm2d(64, **kwargs)
    # Nearly the true mean from the start, so that only the deviations are learned here.
    norm.momentum = 1e-3
    norm.running_mean.fill_(7)
    norm.running_var.fill_(9)
    batches = grouped(rho, n)
    for _ in range(steps):
        norm(next(batches))
    return norm


def evaluated(norm: nn.Module, x: torch.Tensor, w: float) -> torch.Tensor:
    """The equations, one image at a time, in float64."""
    out = []
    for image in x.double():
        flat = image.flatten(1)
        mean = w * flat.mean(1) + (1 - w) * norm.running_mean.double()
        var = w * flat.var(1, correction=0) + (1 - w) * norm.running_var.double()
        y = (flat - mean[:, None]) / (var[:, None] + norm.eps).sqrt()
        out.append((y * norm.weight.double()[:, None] + norm.bias.double()[:, None]).view_as(image))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", FORMATS)
def test_training_is_batch_norms_bit_for_bit(layout, dtype):
    ours, theirs = EvalRefBatchNorm2d(64).to(dtype), nn.BatchNorm2d(64).to(dtype)
    for batch, _ in zip(grouped(0.5), range(20)):
        inputs = [batch.to(dtype, memory_format=layout).requires_grad_() for _ in range(2)]
        outputs = [norm(x) for norm, x in zip((ours, theirs), inputs)]
        assert torch.equal(*outputs) and outputs[0].is_contiguous(memory_format=layout)
        for y in outputs:
            y.square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
def test_the_weight_is_the_regression_of_the_batch_mean_on_the_images_mean(rho):
    """By an independent least-squares fit to other batches of the same kind, and by its formula."""
    images, batches = [], []
    for batch, _ in zip(grouped(rho, seed=1), range(400)):
        mean = batch.mean((2, 3)) - 7
        images.append(mean)
        batches.append(mean.mean(0, keepdim=True).expand_as(mean))
    x, y = torch.cat(images).flatten(), torch.cat(batches).flatten()
    slope = torch.linalg.lstsq(x[:, None], y[:, None]).solution.item()
    assert slope == pytest.approx((1 + 3 * rho) / 4, abs=0.02)
    assert float(trained(rho).own_weight) == pytest.approx(slope, abs=0.05)


def test_a_batch_of_one_image_has_weight_one_and_evaluates_as_it_trains():
    norm = trained(0.0, steps=17, n=1)
    assert float(norm.own_weight) == 1
    x = next(grouped(0.0, n=1))
    y = norm(x)
    assert torch.allclose(norm.eval()(x), y, atol=1e-4)


def test_behind_a_batch_norm_images_of_a_batch_say_nothing_about_it():
    before, norm = nn.BatchNorm2d(64), EvalRefBatchNorm2d(64)
    for batch, _ in zip(grouped(0.9), range(200)):
        norm(before(batch))
    assert float(norm.own_weight) == 0


@pytest.mark.parametrize("layout", FORMATS)
def test_evaluation_is_the_equation(layout):
    norm = trained(0.3, steps=33)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    w = float(norm.own_weight)
    assert 0.3 < w < 0.7
    x = next(grouped(0.3, n=3, seed=5)).to(memory_format=layout)
    y = norm.eval()(x)
    assert y.is_contiguous(memory_format=layout)
    assert torch.allclose(y.double(), evaluated(norm, x, w), atol=1e-4)
    alone = torch.cat([norm(image[None]) for image in x])
    assert torch.allclose(alone, y, atol=1e-6)  # whatever else is in the batch
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), y, atol=0.1)


@pytest.mark.parametrize("weight, counts", [(0.099, False), (0.101, True)])
def test_a_weight_below_a_tenth_counts_as_zero(weight, counts):
    norm = EvalRefBatchNorm2d(64).eval()
    norm.set_own_weight(torch.tensor(weight * 3), torch.tensor(3.0))
    x = next(grouped(0.5))
    assert float(norm.own_weight) == pytest.approx(weight if counts else 0)
    assert oracle.relative_error(norm(x), evaluated(norm, x, weight if counts else 0)) < 1e-5


def test_untrained_it_evaluates_like_batch_norm_and_is_empty_safe():
    norm, theirs = EvalRefBatchNorm2d(64).eval(), nn.BatchNorm2d(64).eval()
    x = next(grouped(0.9))
    assert torch.equal(norm(x), theirs(x))
    for mode in (True, False):
        empty = torch.zeros(0, 64, 3, 5, requires_grad=True)
        y = trained(0.9, steps=1).train(mode)(empty)
        y.sum().backward()
        assert y.shape == empty.shape and empty.grad is not None


def test_it_has_no_evaluation_without_running_statistics():
    with pytest.raises(ValueError, match="track_running_stats"):
        EvalRefBatchNorm2d(4, track_running_stats=False)


def test_a_resumed_training_measures_at_the_same_steps():
    batches = list(zip(grouped(0.5), range(40)))
    whole = EvalRefBatchNorm2d(64)
    for batch, _ in batches:
        whole(batch)
    first = EvalRefBatchNorm2d(64)
    for batch, _ in batches[:21]:
        first(batch)
    second = EvalRefBatchNorm2d(64)
    second(batches[7][0])  # a step of another life
    second.load_state_dict(first.state_dict())
    for batch, _ in batches[21:]:
        second(batch)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_activation_checkpointing_measures_once():
    plain, repeated = EvalRefBatchNorm2d(64), EvalRefBatchNorm2d(64)
    x = next(grouped(0.5)).requires_grad_()
    plain(x).sum().backward()
    checkpoint(repeated, x, use_reentrant=False).sum().backward()
    assert (
        torch.equal(plain.batch_deviation, repeated.batch_deviation) and plain.batch_deviation > 0
    )


@pytest.mark.parametrize("first", [0, 1])
def test_activation_checkpointing_does_not_skip_every_measurement(first):
    """If it doubles the count of steps, every 16th may be a repeated pass."""
    norm = EvalRefBatchNorm2d(64)
    norm.num_batches_tracked.fill_(first)
    measured = []
    for batch, _ in zip(grouped(0.5), range(17)):
        before = norm.image_deviation.clone()
        checkpoint(norm, batch.requires_grad_(), use_reentrant=False).sum().backward()
        measured.append(not torch.equal(before, norm.image_deviation))
    assert sum(measured) == (3 if first == 0 else 2)


def test_replicas_of_data_parallel_count_as_the_layer_does():
    whole, norm = EvalRefBatchNorm2d(64), EvalRefBatchNorm2d(64)
    for k, (batch, _) in enumerate(zip(grouped(0.5), range(20))):
        whole(batch)
        replica = norm if k == 0 else norm._replicate_for_data_parallel()
        replica._buffers, replica._parameters = norm._buffers, norm._parameters
        replica(batch)
    for name, value in whole.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value), name


@pytest.mark.parametrize("recompute", [update_bn_stats, lambda m, x, n: update_bn(x[:n], m)])
@pytest.mark.parametrize("steps", [12, 50])
def test_the_weight_survives_when_others_recompute_the_running_statistics(recompute, steps):
    norm, w = trained(0.3, steps=0), (1 + 3 * 0.3) / 4
    norm.set_own_weight(torch.tensor(w), torch.tensor(1.0))
    recompute(nn.Sequential(norm), [b for b, _ in zip(grouped(0.3, seed=7), range(steps))], steps)
    assert float(norm.own_weight) == pytest.approx(w, abs=0.1)
    assert norm.running_mean.mean() == pytest.approx(7, abs=0.5)


def test_reset_parameters_forgets_the_weight():
    norm = trained(0.9, steps=1)
    norm.reset_parameters()
    assert float(norm.own_weight) == 0
    x, new = next(grouped(0.9)), EvalRefBatchNorm2d(64)
    assert torch.equal(norm(x), new(x)) and torch.equal(norm.batch_deviation, new.batch_deviation)


def test_what_a_state_dict_says_about_the_weight():
    norm = trained(0.9, steps=1)
    w = float(norm.own_weight)
    norm.load_state_dict({}, strict=False)  # nothing about this layer
    assert float(norm.own_weight) == w
    other = copy.deepcopy(norm)
    other.load_state_dict(nn.BatchNorm2d(64).state_dict())  # of BatchNorm, which has no weight
    assert float(other.own_weight) == 0
    other.load_state_dict(norm.state_dict())
    assert float(other.own_weight) == w
    with torch.device("meta"):
        empty = EvalRefBatchNorm2d(64)
    assert "own_weight=unknown" in repr(empty)
    empty.load_state_dict(nn.BatchNorm2d(64).state_dict(), assign=True)
    assert float(empty.own_weight) == 0 and not any(b.is_meta for b in empty.buffers())


def test_conversion_keeps_the_function_of_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64)).eval()
    x = torch.randn(2, 3, 4, 4)
    y = model(x)
    convert_norm(model, "EvalRefBN")
    assert type(model[1]) is EvalRefBatchNorm2d and torch.equal(model(x), y)
    assert type(convert_norm(model, "BN")[1]) is nn.BatchNorm2d


def test_converted_back_it_is_the_batch_norm_of_its_running_statistics():
    norm = trained(0.9, steps=1).eval()
    x = next(grouped(0.9))
    expected = evaluated(norm, x, 0.0)
    assert not torch.allclose(norm(x).double(), expected)
    back = convert_norm(nn.Sequential(norm), "BN")
    assert torch.allclose(back(x).double(), expected, atol=1e-4)


@pytest.mark.parametrize("folded", [True, False])
def test_only_layers_without_a_weight_are_folded(folded):
    model = nn.Sequential(nn.BatchNorm2d(64), nn.Conv2d(64, 64, 1), trained(0.9, steps=1)).eval()
    if folded:
        model[2].set_own_weight(torch.tensor(0.0), torch.tensor(1.0))
    x = next(grouped(0.9))
    y = model(x)
    fold_norms(model)
    assert isinstance(model[2], nn.Identity) == folded
    assert torch.allclose(model(x), y, atol=1e-4)


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_scripted_exported_and_compiled_evaluation(rho):
    norm = trained(rho, steps=17).eval()
    x = next(grouped(rho, n=2))
    y = norm(x)
    made = [
        torch.jit.script(norm),
        torch.jit.trace(norm, x),
        torch.export.export(norm, (x,)).module(),
        torch.compile(norm, backend="eager"),
    ]
    for evaluate in made:
        assert torch.allclose(evaluate(x), y, atol=1e-5)


def test_a_changed_weight_is_noticed():
    norm = trained(0.9, steps=1).eval()
    x = next(grouped(0.9))
    y = norm(x)
    norm.set_own_weight(torch.tensor(0.0), torch.tensor(1.0))
    assert not torch.allclose(norm(x), y)
    norm.batch_deviation.fill_(1.0)
    assert torch.allclose(norm(x).double(), evaluated(norm, x, 1.0), atol=1e-3)
    norm.image_deviation.fill_(4.0)
    assert torch.allclose(norm(x).double(), evaluated(norm, x, 0.25), atol=1e-3)


@pytest.mark.parametrize("gains", [True, False])
def test_averages_of_models_by_hand_may_write_through_data(gains):
    norm, other = EvalRefBatchNorm2d(64).eval(), trained(0.9, steps=1).eval()
    if not gains:
        norm, other = other, norm
    x = next(grouped(0.9))
    norm(x)
    for ours, theirs in zip(norm.buffers(), other.buffers()):
        ours.data.copy_(theirs.data)
    assert torch.equal(norm(x), other(x))


class TestWithoutValues:
    """Tools under which no value of a buffer can be read."""

    def _models(self):
        models = [EvalRefBatchNorm2d(64).eval() for _ in range(3)]
        for k, model in enumerate(models):
            nn.init.normal_(model.running_mean)
            model.set_own_weight(torch.tensor(0.4 * k), torch.tensor(1.0))
        return models

    @pytest.mark.parametrize("training", [True, False])
    def test_an_ensemble_by_vmap(self, training):
        models = [m.train(training) for m in self._models()]
        state, x = stack_module_state(models), next(grouped(0.5))
        base = copy.deepcopy(models[0]).to("meta")
        y = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(*state)
        assert torch.allclose(y, torch.stack([m(x) for m in models]), atol=1e-5)

    @pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
    def test_a_graph_by_make_fx_serves_every_weight(self, mode):
        models, x = self._models(), next(grouped(0.5))
        states = [dict(m.state_dict()) for m in models]
        trace = make_fx(lambda s, x: functional_call(models[0], s, (x,)), tracing_mode=mode)
        graph = trace(states[0], x)
        for model, state in zip(models, states):
            assert torch.allclose(graph(state, x), model(x), atol=1e-5)

    @pytest.mark.parametrize("training", [True, False])
    def test_fake_tensors(self, training):
        with FakeTensorMode():
            norm = EvalRefBatchNorm2d(4).train(training)
            assert norm(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3) and "unknown" in repr(norm)


@pytest.mark.parametrize("training", [True, False])
def test_without_its_running_statistics_it_is_batch_norm(training):
    norm, theirs = trained(0.9, steps=1), nn.BatchNorm2d(64)
    for m in (norm.train(training), theirs.train(training)):
        replace_all_batch_norm_modules_(m)
    x = next(grouped(0.9))
    assert torch.equal(norm(x), theirs(x))


def test_a_model_in_half_precision():
    norm = trained(0.9, steps=1).eval()
    x = next(grouped(0.9))
    y = norm(x)
    assert torch.allclose(norm.half()(x.half()).float(), y, atol=0.05)
    untrained = EvalRefBatchNorm2d(64).half().eval()
    assert untrained(x.half()).isfinite().all()


def test_half_precision_far_from_zero():
    """Deviations from the initial statistics whose squares float16 does not hold."""
    norm, theirs = EvalRefBatchNorm2d(64).half(), nn.BatchNorm2d(64).half()
    for batch, _ in zip(grouped(0.0, n=1), range(40)):
        for m in (norm, theirs):
            m((batch + 300).half())
    assert float(norm.own_weight) == 1
    x = (next(grouped(0.0)) + 300).half()
    assert theirs.eval()(x).isfinite().all() and norm.eval()(x).isfinite().all()


def test_nan_in_one_channel_stays_there():
    norm, x = EvalRefBatchNorm2d(64), next(grouped(0.9))
    x[:, 1] = float("nan")
    norm(x)
    y = norm.eval()(next(grouped(0.9)))
    assert y.isfinite().all(dim=0).all(dim=(1, 2)).sum() == 63 and y[:, 1].isnan().all()
