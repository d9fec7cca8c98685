"""The networks, compared with known properties, and the exchange of their norms."""

import sys
import types

import pytest
import torch
import torchvision
from torch import nn

from refbn_d2.classification.networks import VGG16, LeNet5, build_network
from refbn_d2.errors import UserError
from refbn_d2.norms import RefBatchNorm2d
from refbn_d2.norms.instance_norm import InstanceNorm2d


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_lenet5_has_the_layers_of_1998():
    """Trainable parameters as LeCun et al. 1998 give them, with C3 connected to all of S2."""
    network = build_network("lenet5", "", 10)
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [_count(m) for m in layers] == [156, 2416, 48120, 10164, 850]
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    sizes = []
    for m in network.features:
        if isinstance(m, (nn.Conv2d, nn.AvgPool2d)):
            m.register_forward_hook(lambda m, x, y: sizes.append(tuple(y.shape[1:])))
    network(torch.zeros(1, 1, 32, 32))
    assert sizes == [(6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5), (120, 1, 1)]


def test_vgg16_has_torchvisions_convolutions_and_three_linear_layers():
    network = build_network("vgg16_32x32", "BN", 10)
    assert (
        _count(nn.ModuleList(m for m in network.features if isinstance(m, nn.Conv2d))) == 14714688
    )
    assert [m.in_features for m in network.classifier if isinstance(m, nn.Linear)] == [512] * 3
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    expected = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], True)
    assert [k for k in network.state_dict() if k.startswith("features")] == [
        f"features.{k}" for k in expected.state_dict()
    ]


@pytest.mark.parametrize("build", [LeNet5, VGG16])
def test_convolutions_start_as_in_he_et_al(build):
    torch.manual_seed(0)
    for m in build().features:
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 2000:
            std = (2 / (m.in_channels * m.kernel_size[0] ** 2)) ** 0.5
            assert m.weight.std().item() == pytest.approx(std, rel=0.05)
            assert m.bias.abs().max() == 0


def test_resnet50_is_torchvisions_with_another_norm():
    ours, theirs = build_network("resnet50", "RefBN", 1000), torchvision.models.resnet50()
    extra = set(ours.state_dict()) - set(theirs.state_dict())
    assert not set(theirs.state_dict()) - set(ours.state_dict())
    assert {k.rpartition(".")[2][:4] for k in extra} == {"ref_"}
    assert _count(ours) == 25_557_032
    zero = {
        n for n, m in ours.named_modules() if isinstance(m, RefBatchNorm2d) and not m.weight.any()
    }
    assert zero == {n for n, m in theirs.named_modules() if n.endswith(".bn3")} and len(zero) == 16
    rest = [m for m in ours.modules() if isinstance(m, RefBatchNorm2d) and m.weight.any()]
    assert len(rest) == 53 - 16 and all((m.weight == 1).all() for m in rest)


@pytest.mark.parametrize(
    "norm, kind",
    [
        ("", nn.Identity),
        ("BN", nn.BatchNorm2d),
        ("RefBN", RefBatchNorm2d),
        ("GN", nn.GroupNorm),
        ("GN1", nn.GroupNorm),
        ("IN", InstanceNorm2d),
    ],
)
def test_every_norm_is_exchanged(norm, kind):
    network = build_network("resnet18", norm, 7)
    layers = [m for m in network.modules() if isinstance(m, kind)]
    assert len(layers) == 20
    assert not any(type(m) is nn.BatchNorm2d for m in network.modules()) or norm == "BN"
    assert network(torch.randn(2, 3, 33, 33)).shape == (2, 7)
    if norm == "GN1":
        out = layers[0](torch.randn(2, 64, 5, 5) * 3 + 1)
        assert torch.allclose(out.mean(dim=(1, 2, 3)), torch.zeros(2), atol=1e-5)
    if norm:
        assert network.layer1[0].bn2.weight.abs().max() == 0
        assert network.layer1[0].bn1.weight.min() == 1


def test_eps_and_momentum_of_the_network_are_kept():
    layers = [
        m for m in build_network("mobilenet_v3_small", "RefBN", 5).modules()
        if isinstance(m, RefBatchNorm2d)
    ]  # fmt: skip
    assert layers and {(m.eps, m.momentum) for m in layers} == {(0.001, 0.01)}


@pytest.mark.parametrize(
    "name, norm, expected",
    [
        ("resnet5O", "BN", "no classifier 'resnet5O'; did you mean 'resnet50'"),
        ("fcn_resnet50", "BN", "no classifier"),
        ("alexnet", "RefBN", "alexnet with .*NORM RefBN: it has no BatchNorm; choose another"),
        ("googlenet", "BN", "googlenet has outputs besides its scores"),
        ("resnet18", "RefBM", "unknown norm 'RefBM'"),
    ],
)
def test_what_cannot_be_built(name, norm, expected):
    with pytest.raises(UserError, match=expected):
        build_network(name, norm, 10)


def test_timm(monkeypatch):
    """Without timm a hint; with it, its networks; but not those whose norms hold activations."""
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build_network("timm/resnet50", "BN", 10)

    class BatchNormAct2d(nn.BatchNorm2d):
        pass

    norms = {"plain": nn.BatchNorm2d, "act": BatchNormAct2d}
    timm = types.SimpleNamespace(
        list_models=lambda: list(norms),
        create_model=lambda name, num_classes: nn.Sequential(
            nn.Conv2d(3, num_classes, 3), norms[name](num_classes)
        ),
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert isinstance(build_network("timm/plain", "RefBN", 4)[1], RefBatchNorm2d)
    with pytest.raises(UserError, match="BatchNormAct2d cannot be exchanged"):
        build_network("timm/act", "RefBN", 4)
    with pytest.raises(UserError, match="timm has no network 'none'"):
        build_network("timm/none", "RefBN", 4)
