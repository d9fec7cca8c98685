"""MovingAverageBatchNorm2d against its paper's equations in NumPy; centered weights."""

import copy
import pickle

import numpy as np
import oracle
import pytest
import tiny
import torch
import torch.nn.functional as F
from detectron2.engine import SimpleTrainer
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from refbn_d2.config import load_config
from refbn_d2.engine import Trainer
from refbn_d2.engine.hooks import WeightCentralization as OurHook
from refbn_d2.hooks import WeightCentralization, center_weights
from refbn_d2.norms import MovingAverageBatchNorm2d, convert_norm, fold_norms

EPS = 1e-5
WINDOW, WARMUP, RENORM = 4, 6, 20
STATE = {"square_window", "gradient_window", "num_gradients_tracked"}


def _layer(channels=3, warm=True, **kwargs):
    steps = {"window": WINDOW, "warmup_steps": WARMUP, "renorm_after": RENORM} if warm else {}
    return MovingAverageBatchNorm2d(channels, **{**steps, **kwargs})


class Oracle:
    """Yan et al. 2020 in NumPy, float64, with lists of all values that the batches had."""

    def __init__(self, channels, window=WINDOW, warmup=WARMUP, renorm_after=RENORM, alpha=0.98):
        self.window, self.plain, self.renorm_after = window, max(window, warmup), renorm_after
        self.alpha, self.ema = alpha, np.ones(channels)
        self.squares, self.psis = [], []

    def moving(self, values):
        last = values[-self.window :] if len(values) > self.plain else values[-1:]
        return np.mean(last, axis=0)

    def forward(self, x, weight, bias):
        self.squares.append((x**2).mean(axis=(0, 2, 3)))
        chi2 = self.moving(self.squares)
        self.chi, ema = np.sqrt(chi2 + EPS), np.sqrt(self.ema + EPS)
        late = len(self.squares) > self.renorm_after
        self.r = np.minimum(np.maximum(self.chi / ema, 0.2), 5.0) if late else np.ones_like(ema)
        self.ema = self.alpha * self.ema + (1 - self.alpha) * chi2
        self.x_hat = x / self.chi[None, :, None, None]
        return (weight * self.r)[None, :, None, None] * self.x_hat + bias[None, :, None, None]

    def backward(self, grad_y, weight):
        g = grad_y * (weight * self.r)[None, :, None, None]
        self.psis.append((g * self.x_hat).mean(axis=(0, 2, 3)))
        psi = self.moving(self.psis)[None, :, None, None]
        dx = (g - self.x_hat * psi) / self.chi[None, :, None, None]
        dweight = (grad_y * self.x_hat).sum(axis=(0, 2, 3)) * self.r
        return dx, dweight, grad_y.sum(axis=(0, 2, 3))

    def inference(self, x, weight, bias):
        scale = weight / np.sqrt(self.ema + EPS)
        return scale[None, :, None, None] * x + bias[None, :, None, None]


def _batches(steps, channels=3, seed=0):
    """Batches whose scale grows tenfold at once and falls back, so that r is clipped."""
    rng = np.random.default_rng(seed)
    for n in range(steps):
        scale = np.array([1.0, 40.0, 0.05]) if 28 <= n < 36 else np.array([1.0, 2.0, 0.5])
        x = rng.normal(size=(2, channels, 3, 4)) * scale[:channels, None, None] + 0.3
        yield x, rng.normal(size=x.shape)


def _train(layer, batches, dtype=torch.float64, channels_last=False):
    """Yields output and gradients of x, weight and bias in each step."""
    for x, g in batches:
        x, g = torch.tensor(x, dtype=dtype), torch.tensor(g, dtype=dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        y = layer(x.requires_grad_())
        assert y.dtype == dtype and y.shape == x.shape
        assert not channels_last or y.is_contiguous(memory_format=torch.channels_last)
        yield (y, *oracle.gradients(y, g, x, layer.weight, layer.bias))


def _affine(layer):
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.7, -1.2, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.0, -3.0]))
    return [p.detach().double().numpy() for p in (layer.weight, layer.bias)]


@pytest.mark.parametrize(
    "dtype, tol, channels_last",
    [
        (torch.float64, 1e-11, False),
        (torch.float32, 1e-5, True),
        (torch.bfloat16, 3e-2, False),
        (torch.float16, 5e-3, False),
    ],
)
def test_equals_the_paper_over_sixty_steps(dtype, tol, channels_last):
    layer = _layer().to(torch.promote_types(dtype, torch.float32))
    weight, bias = _affine(layer)
    wanted, clipped, averaged = Oracle(3), 0, 0
    batches = list(_batches(60))
    # Rounded first, so that both see the same numbers.
    batches = [[torch.tensor(v).to(dtype).double().numpy() for v in pair] for pair in batches]
    for (x, g), actual in zip(batches, _train(layer, batches, dtype, channels_last)):
        expected = (wanted.forward(x, weight, bias), *wanted.backward(g, weight))
        for a, e in zip(actual, expected):
            assert oracle.relative_error(a, torch.tensor(e)) < tol
        clipped += int((wanted.r == 5).any())
        averaged += int(len(wanted.psis) > WARMUP)
        assert actual[1].dtype == dtype
    assert clipped > 3 and averaged == 54  # the test reaches what it is about
    assert not layer.running_mean.any() and layer.num_batches_tracked == 60
    assert oracle.relative_error(layer.running_var, torch.tensor(wanted.ema)) < min(tol, 1e-5)
    x = batches[0][0]
    y = layer.eval()(torch.tensor(x, dtype=dtype))
    assert oracle.relative_error(y, torch.tensor(wanted.inference(x, weight, bias))) < tol


def test_the_defaults():
    layer = MovingAverageBatchNorm2d(3).double()
    weight, bias = _affine(layer)
    wanted = Oracle(3, window=16, warmup=100, renorm_after=1000)
    layer.num_batches_tracked.fill_(984)
    layer.num_gradients_tracked.fill_(984)
    old = torch.rand(16, 3).double() + 0.5
    layer.square_window.copy_(old)
    layer.gradient_window.copy_(-old)
    # Row k has the value of step k + 1 modulo 16, and 984 is 8 modulo 16.
    rows = [*old[8:].numpy(), *old[:8].numpy()]
    wanted.squares, wanted.psis = rows[:1] * 968 + rows, [-v for v in rows[:1] * 968 + rows]
    for (x, g), actual in zip(_batches(24), _train(layer, _batches(24))):
        expected = (wanted.forward(x, weight, bias), *wanted.backward(g, weight))
        for a, e in zip(actual, expected):
            assert oracle.relative_error(a, torch.tensor(e)) < 1e-11
    assert len(wanted.psis) == 1008 and (wanted.r != 1).all()
    assert repr(layer).endswith("window=16, warmup_steps=100, renorm_after=1000)")


def test_in_the_warmup_the_gradient_is_the_derivative():
    layer = _layer(warm=False, momentum=0.0).double()
    x = torch.randn(3, 3, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.weight, layer.bias))


@pytest.mark.parametrize("momentum", [0.5, None])
def test_momentum(momentum):
    layer, squares = _layer(momentum=momentum).double(), []
    expected = np.ones(3)
    for n, (x, _) in enumerate(_batches(5), 1):
        layer(torch.tensor(x))
        squares.append((x**2).mean(axis=(0, 2, 3)))
        factor = 1 / n if momentum is None else momentum
        expected = (1 - factor) * expected + factor * squares[-1]
    assert oracle.relative_error(layer.running_var, torch.tensor(expected)) < 1e-11


@pytest.mark.parametrize("without", ["affine", "bias"])
def test_without_affine_or_bias(without):
    layer, wanted = _layer(**{without: False}).double(), Oracle(3)
    for x, g in _batches(40):
        leaf = torch.tensor(x, requires_grad=True)
        y = layer(leaf)
        (dx,) = oracle.gradients(y, torch.tensor(g), leaf)
        expected = wanted.forward(x, np.ones(3), np.zeros(3)), wanted.backward(g, np.ones(3))[0]
        for a, e in zip((y, dx), expected):
            assert oracle.relative_error(a, torch.tensor(e)) < 1e-11


def test_passes_without_a_gradient_leave_the_gradients_window():
    """A frozen input has no psi; a step without a backward pass does not count as one."""
    layer = _layer()
    layer(torch.randn(2, 3, 4, 4)).sum().backward()
    with torch.no_grad():
        layer(torch.randn(2, 3, 4, 4))
    assert layer.num_batches_tracked == 2 and layer.num_gradients_tracked == 0
    assert not layer.gradient_window.any() and layer.weight.grad.isfinite().all()


def test_a_skipped_step_of_a_gradient_scaler_leaves_no_trace():
    layer = _layer()
    for factor in (1.0, float("inf"), 1.0):
        x = torch.randn(2, 3, 4, 4, requires_grad=True)
        (layer(x).pow(2).sum() * factor).backward()
    assert layer.gradient_window.isfinite().all() and layer.gradient_window[2].all()


def test_the_gradient_cannot_be_differentiated_again():
    layer, x = _layer(), torch.randn(2, 3, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("copied", ["state dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("stop", [3, 9, 27])
def test_resumes_exactly(copied, stop):
    layer, batches = _layer(), list(_batches(40))
    _affine(layer)
    for _ in _train(layer, batches[:stop], torch.float32):
        pass
    if copied == "state dict":
        resumed = _layer()
        resumed.load_state_dict(layer.state_dict(), strict=True)
    else:
        resumed = copy.deepcopy(layer) if copied == "deepcopy" else None
        resumed = resumed or pickle.loads(pickle.dumps(layer))
    rest = batches[stop:]
    pairs = zip(_train(layer, rest, torch.float32), _train(resumed, rest, torch.float32))
    for one, other in pairs:
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in layer.state_dict().items())


def test_statistics_without_windows_begin_the_warmup_again():
    layer = _layer()
    for _ in _train(layer, _batches(30), torch.float32):
        pass
    state = {k: v for k, v in layer.state_dict().items() if k not in STATE}
    assert list(state) == list(nn.BatchNorm2d(3).state_dict())
    layer.load_state_dict(state, strict=True)
    assert layer.num_batches_tracked == layer.num_gradients_tracked == 0
    assert not layer.square_window.any() and not layer.gradient_window.any()
    assert torch.equal(layer.running_var, state["running_var"])


def test_a_state_dict_without_the_layer_keeps_its_state():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), _layer())
    net(torch.randn(2, 3, 4, 4)).sum().backward()
    before = copy.deepcopy(net.state_dict())
    net.load_state_dict({k: v for k, v in before.items() if k.startswith("0")}, strict=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_statistics_with_a_mean_are_refused():
    bn = nn.BatchNorm2d(3)
    bn(torch.randn(4, 3, 4, 4) + 2)
    with pytest.raises(ValueError, match=r"1\.running_mean is not 0: .* subtracts a mean"):
        nn.Sequential(nn.Conv2d(3, 3, 1), _layer()).load_state_dict(
            nn.Sequential(nn.Conv2d(3, 3, 1), bn).state_dict()
        )
    with pytest.raises(ValueError, match="cannot convert to norm 'MABN'"):
        convert_norm(nn.Sequential(bn), "MABN")


def test_conversion_leaves_it_and_the_log_says_so(caplog):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), _layer())
    convert_norm(net, "BN")
    assert type(net[1]) is MovingAverageBatchNorm2d
    assert "1 MovingAverageBatchNorm2d (1)" in caplog.text


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("steps", [0, 8, 24])
def test_activation_checkpointing_changes_nothing(reentrant, calls, steps):
    torch.manual_seed(1)
    base = nn.Sequential(nn.Conv2d(3, 4, 1), _layer(4), nn.SiLU())
    for n in range(steps):
        base(torch.randn(4, 3, 4, 4) * (1 + n % 3)).pow(2).sum().backward()
    base.zero_grad()
    batches = [2 * torch.randn(4, 3, 4, 4) + 1 for _ in range(2)]

    def run(call):
        model, found = copy.deepcopy(base), []
        for x in batches:
            leaf = x.clone().requires_grad_()
            sum(call(model, leaf * (k + 1)).pow(3).sum() for k in range(calls)).backward()
            found.append(leaf.grad)
        return [*found, *(p.grad for p in model.parameters()), *model.state_dict().values()]

    plain = run(lambda model, x: model(x))
    saved = run(lambda model, x: checkpoint(model, x, use_reentrant=reentrant))
    for a, b in zip(plain, saved):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    layer = _layer()
    layer(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    layer.zero_grad()
    layer.train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 4, 4)
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0, 0, 0]
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 5, 3, 3)])
def test_a_wrong_shape_is_refused_and_changes_nothing(shape):
    layer = _layer()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(shape))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_impossible_settings():
    with pytest.raises(ValueError, match="window must be >= 1, got 0"):
        _layer(window=0)
    with pytest.raises(ValueError, match="must be >= 0, got -1 and 20"):
        _layer(warmup_steps=-1)
    with pytest.raises(ValueError, match="needs running statistics"):
        _layer(track_running_stats=False)


def _trained():
    torch.manual_seed(0)
    layer = _layer()
    _affine(layer)
    for _ in _train(layer, _batches(40), torch.float32):
        pass
    return layer.eval()


def test_evaluation_is_one_affine_map_that_folds_freezes_and_scripts():
    layer, x = _trained(), torch.randn(2, 5, 6, 6)
    net = nn.Sequential(nn.Conv2d(5, 3, 3), layer).eval()
    with torch.no_grad():
        wanted = net(x)
        assert oracle.relative_error(torch.jit.script(net)(x), wanted) < 1e-6
        frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(copy.deepcopy(net))
        assert type(frozen[1]) is FrozenBatchNorm2d
        assert oracle.relative_error(frozen(x), wanted) < 1e-5
        folded = fold_norms(net)
        assert type(folded[1]) is nn.Identity
        assert oracle.relative_error(folded(x), wanted) < 1e-5


def test_a_traced_training_step_leaves_the_layer_as_it_was():
    """A trace does not keep torch.no_grad."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), MovingAverageBatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    torch.jit.trace(model, x, check_trace=False)(x)
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_compiled_training_is_not_another_one():
    """Its gradient writes to buffers: the layer stays out of the graphs, and does the same."""
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), _layer(window=2, warmup_steps=2, renorm_after=4))
    inner = copy.deepcopy(plain)
    compiled = torch.compile(inner, backend="aot_eager")
    for _ in range(6):
        x = torch.randn(2, 3, 4, 4)
        for net in (plain, compiled):
            net(x).pow(3).sum().backward()
    for a, b in zip(plain.parameters(), inner.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    for a, b in zip(plain.state_dict().values(), inner.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(inner, backend="aot_eager", fullgraph=True)(x)
    graph = torch.compile(inner.eval(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(graph(x), inner(x))


class _Explicit(Conv2d):
    """The paper's convolution, which centers its weights in each forward pass."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self.norm(F.conv2d(x, weight, None, self.stride, self.padding, 1, self.groups))


class _Loss(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        convs = [kind(3, 6, 3, bias=False, norm=_layer(6)), kind(6, 4, 3, bias=False, groups=2)]
        convs[1].norm = _layer(4)
        self.net = nn.Sequential(convs[0], nn.SiLU(), convs[1])

    def forward(self, batch):
        x, target = batch
        return {"loss": (self.net(x) - target).square().mean()}


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_hook_equals_explicit_centralization_under_sgd(nesterov):
    torch.manual_seed(1)
    batches = [(torch.randn(2, 3, 9, 9).double(), torch.randn(1, 4, 5, 5)) for _ in range(5)]
    models = _Loss(Conv2d).double(), _Loss(_Explicit).double()
    start = models[0].net[0].weight.clone()
    for model in models:
        optimizer = torch.optim.SGD(
            model.parameters(), 0.1, momentum=0.9, weight_decay=0.02, nesterov=nesterov
        )
        trainer = SimpleTrainer(model, batches * 8, optimizer)
        trainer.register_hooks([WeightCentralization()] if model is models[0] else [])
        trainer.train(0, 40)
    center_weights(models[1])
    assert (models[0].net[0].weight - start).abs().max() > 0.05
    for conv in (models[0].net[0], models[0].net[2]):
        assert conv.weight.mean(dim=(1, 2, 3)).abs().max() < 1e-15
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_only_convolutions_in_front_of_the_norm_are_centered(caplog):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "ours": Conv2d(3, 4, 3, bias=False, norm=_layer(4)),
            "bn": Conv2d(3, 4, 3, bias=False, norm=nn.BatchNorm2d(4)),
            "one": Conv2d(4, 4, 1, groups=4, bias=False, norm=_layer(4)),
            "none": nn.Conv2d(3, 4, 3),
            "alone": _layer(4),
        }
    )
    before = copy.deepcopy(model.state_dict())
    assert center_weights(model) == ["ours"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "ours.weight")
    mean = before["ours.weight"].mean((1, 2, 3), keepdim=True)
    assert torch.equal(model["ours"].weight, before["ours.weight"] - mean)

    hook = WeightCentralization()
    hook.trainer = SimpleTrainer(model, [None], torch.optim.SGD(model.parameters(), 0.1))
    hook.trainer.start_iter = 1
    model["ours"].weight.data.add_(1)
    hook.before_train()  # resumed: the checkpoint's weights to the bit
    assert model["ours"].weight.mean() > 0.9
    assert "2 MABN layers" in caplog.text and caplog.text.rstrip().endswith("one.norm, alone")


def _config(tmp_path, **changes):
    return load_config(
        tiny.CONFIG, tiny.opts(MODEL__RESNETS__NORM="MABN", OUTPUT_DIR=tmp_path, **changes)
    )


def test_the_trainer_centers_the_weights_before_it_saves_them(tiny_data, tmp_path):
    """Also those of the checkpoint of the last step, and before evaluation."""
    trainer = Trainer(_config(tmp_path, SOLVER__MAX_ITER=2))
    trainer.resume_or_load(resume=False)
    assert isinstance(trainer._hooks[0], OurHook)
    trainer.train()
    weights = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    convolutions = [n[: -len(".norm.square_window")] for n in weights if "square_window" in n]
    assert len(convolutions) == 53
    for name in convolutions:
        weight = weights[f"{name}.weight"]
        assert weight.mean(dim=(1, 2, 3)).abs().max() < 1e-6 * weight.abs().max()
        assert weights[f"{name}.norm.num_gradients_tracked"] == 2
    resumed = Trainer(_config(tmp_path, SOLVER__MAX_ITER=3))
    resumed.resume_or_load(resume=True)
    resumed._hooks[0].before_train()
    state = resumed.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in weights.items())


def test_without_the_norm_the_trainer_has_no_such_hook(tiny_data, tmp_path):
    cfg = _config(tmp_path)
    cfg.MODEL.RESNETS.NORM = "BN"
    assert not any(isinstance(h, OurHook) for h in Trainer(cfg)._hooks)


def test_weights_of_batch_norm_are_refused_in_one_line(tiny_data, tmp_path):
    cfg = _config(tmp_path)
    cfg.MODEL.RESNETS.NORM = "BN"
    model = build_model(cfg)
    model.backbone.stem.conv1.norm.running_mean.fill_(1)
    torch.save({"model": model.state_dict()}, tmp_path / "bn.pth")
    trainer = Trainer(_config(tmp_path, MODEL__WEIGHTS=tmp_path / "bn.pth"))
    with pytest.raises(Exception, match=r"stem\.conv1\.norm\.running_mean is not 0") as e:
        trainer.resume_or_load(resume=False)
    assert type(e.value).__name__ == "UserError" and "\n" not in str(e.value)
