"""Networks for classification: LeNet-5, VGG-16, and those of torchvision and timm."""

import difflib
from typing import Callable, Dict

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import cfgs as vgg_layers
from torchvision.models.vgg import make_layers

from ..errors import UserError
from ..modeling.exchange import exchange_norms

__all__ = ["LeNet5", "VGG16", "build_network"]


def _init_convolutions(network: nn.Module) -> None:
    """Initializes convolutions by He et al. 2015, as in section 4.2.2 of the paper.

    Linear layers keep torch's initialization: with He's, VGG-16 with its three linear layers starts
    at a loss of 6 and learns nothing at first.
    """
    for m in network.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            nn.init.zeros_(m.bias)


class LeNet5(nn.Module):
    """LeNet-5 with the layers of 1998, C1 to F6 and the output, for images (N, 1, 32, 32).

    A norm follows each convolution. Differences to the original: ReLU (for which He's
    initialization is made), average pooling without weights, C3 connected to all channels of S2,
    and a linear output layer.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        layers = []
        for channels_in, channels in ((1, 6), (6, 16), (16, 120)):
            layers += [nn.Conv2d(channels_in, channels, 5), nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.AvgPool2d(2)] if channels < 120 else []
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes))
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class VGG16(nn.Module):
    """VGG-16 for images (N, 3, 32, 32), with linear layers of width 512.

    The last feature map is 1x1x512. torchvision's VGG-16 would resize it to 7x7, so that the first
    linear layer alone would have 103 million weights.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.features = make_layers(vgg_layers["D"], batch_norm=True)
        self.classifier = nn.Sequential(
            *(nn.Linear(512, 512), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(512, 512), nn.ReLU(), nn.Dropout()),
            nn.Linear(512, num_classes),
        )
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


_OWN: Dict[str, Callable[[int], nn.Module]] = {"lenet5": LeNet5, "vgg16_32x32": VGG16}


def build_network(name: str, norm: str, num_classes: int) -> nn.Module:
    """Builds a classifier with random weights whose BatchNorm layers are replaced by ``norm``.

    Each network initializes its weights itself; LeNet-5, VGG and ResNet use He's initialization.
    The last norm of each residual block of a ResNet starts with gamma = 0 (section 4.2.2 of the
    paper).

    Args:
        name: Name of the network: "lenet5", "vgg16_32x32", a classifier of torchvision such as
            "resnet50", or "timm/" followed by the name of a network of timm.
        norm: Name of the norm type for detectron2's ``get_norm``, or "" to remove the norms.
        num_classes: Number of outputs of the last layer.

    Returns:
        A module that maps images (N, C, H, W) to logits (N, num_classes). Its state dict has
        torchvision's (timm's) names.

    Raises:
        UserError: If the network does not exist, timm is not installed, or the network has no norms
            that can be replaced.
    """
    network = _build(name, num_classes)
    try:
        exchange_norms(network, norm)
    except ValueError as e:
        raise UserError(
            f"MODEL.CLASSIFIER.NETWORK {name} with MODEL.CLASSIFIER.NORM {norm}: {e}; choose "
            "another network (torchvision has several with _bn in their names)"
        ) from None
    for block in network.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            if getattr(last, "weight", None) is not None:
                nn.init.zeros_(last.weight)
    return network


def _build(name: str, num_classes: int) -> nn.Module:
    if name in _OWN:
        return _OWN[name](num_classes)
    if name.startswith("timm/"):
        return _build_timm(name[len("timm/") :], num_classes)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, [*_OWN, *known], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"MODEL.CLASSIFIER.NETWORK: torchvision has no classifier {name!r}{hint}")
    network = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    if getattr(network, "aux_logits", False):
        raise UserError(f"MODEL.CLASSIFIER.NETWORK: {name} has outputs besides its scores")
    return network


def _build_timm(name: str, num_classes: int) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError(f"MODEL.CLASSIFIER.NETWORK timm/{name}: pip install timm") from None
    if name not in timm.list_models():
        raise UserError(f"MODEL.CLASSIFIER.NETWORK: timm has no network {name!r}")
    return timm.create_model(name, num_classes=num_classes)
