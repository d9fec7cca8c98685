"""Any convolutional network of timm as a detector's backbone.

MODEL:
  BACKBONE: {NAME: build_timm_fpn_backbone}
  TIMM: {NAME: tf_efficientnet_lite0}
  RESNETS: {NORM: RefBN}
"""

import difflib
import math
from typing import TYPE_CHECKING, Any, Dict, List, Set, cast

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from ..errors import UserError
from ..extras import needs_extra
from ..log import get_logger
from ..norms import convert_norm
from .exchange import exchange_norms

if TYPE_CHECKING:
    from timm.models import FeatureInfo

__all__ = ["TimmBackbone", "build_timm_backbone", "build_timm_fpn_backbone"]

logger = get_logger(__name__)


class TimmBackbone(Backbone):
    """Feature extractor from a network of timm (its ``features_only``), with random weights.

    Features are named by their stride, as in detectron2's ResNet: res1 has stride 2, res2 4, res3
    8, res4 16, res5 32.

    Args:
        name: name of a network of timm, with its tag if there is one ("resnet50.a1_in1k").
        out_features: names of the features, such as ["res2", "res5"].
        norm: norm that replaces each BatchNorm; eps, momentum and activation are kept. A network
            without BatchNorm keeps its norms.
        freeze_at: number as in MODEL.BACKBONE.FREEZE_AT: all layers from which the feature
            ``res{freeze_at}`` is computed are frozen, and their norms become FrozenBN; 1 freezes
            the stem, 0 nothing.
        channels: number of channels of the images.

    Attributes:
        name: name of the network.
        features: timm's module, which maps images (N, C, H, W) to a list of features.
        pixels: pixel normalization with which the network was trained according to timm: the keys
            PIXEL_MEAN and PIXEL_STD of MODEL, in the order red, green, blue.

    Raises:
        UserError: if timm has no such network or is not installed, or if the network lacks one of
            the features, does not accept images of arbitrary size, or has a BatchNorm that cannot
            be replaced.
    """

    def __init__(
        self, name: str, out_features: List[str], norm: str, freeze_at: int = 0, channels: int = 3
    ):
        super().__init__()
        self.name = name
        network = _features_of(name, channels)
        strides = _strides(name, network)
        unknown = [f for f in out_features if f not in strides]
        if unknown:
            raise UserError(
                f"MODEL.TIMM.NAME {name} has no feature {unknown[0]!r} (MODEL.FPN.IN_FEATURES, "
                f"MODEL.RESNETS.OUT_FEATURES): use some of {', '.join(strides)}"
            )
        channels_of = dict(zip(strides, _info(network).channels()))
        kept = 1 + max(list(strides).index(f) for f in out_features)
        if kept < len(strides):  # lets timm omit the later layers, if it can for this network
            network = _features_of(name, channels, out_indices=tuple(range(kept)))
        self.features = network
        self._names = list(strides)[:kept]
        frozen = self._parameters_behind([f for f in self._names if int(f[3:]) <= freeze_at])
        # The other parameters get no gradients, and DDP would wait for these.
        for p in set(network.parameters()) - self._parameters_behind(out_features):
            p.requires_grad_(False)
        try:
            exchange_norms(network, norm)
        except ValueError as e:
            if "no BatchNorm" not in str(e):
                raise UserError(f"MODEL.TIMM.NAME {name} with norm {norm}: {e}") from None
            logger.warning("%s has no BatchNorm: MODEL.RESNETS.NORM %s changes nothing", name, norm)
        _freeze(network, frozen)
        self._out_features = list(out_features)
        self._out_feature_strides = {f: strides[f] for f in out_features}
        self._out_feature_channels = {f: channels_of[f] for f in out_features}
        trained_with = cast(Dict[str, Any], network.default_cfg)
        self.pixels = {
            f"PIXEL_{key}": [round(255 * v, 3) for v in trained_with[key.lower()]]
            for key in ("MEAN", "STD")
        }

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Computes the features of images (N, C, H, W).

        Returns:
            Each feature by its name, (N, channels, H / stride, W / stride).
        """
        found = dict(zip(self._names, self.features(x)))
        return {name: found[name] for name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def _parameters_behind(self, names: List[str]) -> Set[nn.Parameter]:
        """Returns the parameters on which the given features depend."""
        if not names:
            return set()
        parameters = list(self.features.parameters())
        found = dict(zip(self._names, _dry_run(self.name, self.features)))
        totals = [found[name].sum() for name in names]
        gradients = torch.autograd.grad(totals, parameters, allow_unused=True)
        return {p for p, gradient in zip(parameters, gradients) if gradient is not None}


def _features_of(name: str, channels: int, **kwargs: Any) -> nn.Module:
    with needs_extra():
        import timm
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; the closest are {', '.join(close)}" if close else ""
        raise UserError(f"MODEL.TIMM.NAME: timm has no network {name!r}{hint}")
    try:
        return timm.create_model(name, features_only=True, in_chans=channels, **kwargs)
    except Exception as e:  # the type depends on the network; nothing is downloaded here
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(
            f"MODEL.TIMM.NAME {name} has no features for a detector: {reason}"
        ) from None


def _info(network: nn.Module) -> "FeatureInfo":
    return cast("FeatureInfo", network.feature_info)


def _dry_run(name: str, network: nn.Module) -> List[Tensor]:
    """Computes the features of a black image with the network in evaluation mode."""
    image = torch.zeros(1, next(network.parameters()).shape[1], 64, 96)
    training = network.training
    try:
        return network.eval()(image)
    except Exception as e:  # the type depends on the network
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(
            f"MODEL.TIMM.NAME {name} does not accept images of arbitrary size, which a detector "
            f"needs: {reason}"
        ) from None
    finally:
        network.train(training)


def _strides(name: str, network: nn.Module) -> Dict[str, int]:
    """Returns the stride of each feature, after checking that timm describes the features right."""
    strides = _info(network).reduction()
    shapes = [tuple(f.shape[1:]) for f in _dry_run(name, network)]
    expected = [
        (c, 64 // s, 96 // s) for c, s in zip(_info(network).channels(), strides)
    ]  # 64 and 96 are multiples of every stride up to 32
    names = [f"res{math.log2(s):g}" for s in strides]
    if shapes != expected or len(set(names)) < len(names):
        raise UserError(
            f"MODEL.TIMM.NAME {name}: its features, of strides {strides}, are not maps (channels, "
            "height, width) of one stride each: use a convolutional network"
        )
    return dict(zip(names, strides))


def _freeze(module: nn.Module, frozen: Set[nn.Parameter]) -> nn.Module:
    """Freezes the parameters ``frozen`` in a module and its children.

    Returns:
        The module, or the FrozenBN that replaces it.
    """
    own = set(module.parameters())
    if own and own <= frozen:
        for p in own:
            p.requires_grad_(False)
        return convert_norm(module, "FrozenBN")
    for name, child in list(module.named_children()):
        if not own.isdisjoint(frozen):
            setattr(module, name, _freeze(child, frozen))
    return module


def _build(cfg: CfgNode, input_shape: ShapeSpec, out_features: List[str]) -> TimmBackbone:
    backbone = TimmBackbone(
        cfg.MODEL.TIMM.NAME,
        out_features,
        cfg.MODEL.RESNETS.NORM,
        cfg.MODEL.BACKBONE.FREEZE_AT,
        input_shape.channels,
    )
    wanted = {**backbone.pixels, "FORMAT": "RGB"}
    given = {k: [round(v, 3) for v in cfg.MODEL[k]] for k in backbone.pixels}
    given["FORMAT"] = cfg.INPUT.FORMAT
    if given == wanted:
        logger.info("Pixels are normalized as in the training of %s", backbone.name)
    else:
        logger.warning(
            "%s was trained with INPUT.FORMAT RGB, MODEL.PIXEL_MEAN %s and MODEL.PIXEL_STD %s; the "
            "config has %s, %s and %s",
            *(backbone.name, *backbone.pixels.values(), given["FORMAT"]),
            *(given[k] for k in backbone.pixels),
        )
    return backbone


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Builds the network MODEL.TIMM.NAME with the features MODEL.RESNETS.OUT_FEATURES."""
    return _build(cfg, input_shape, cfg.MODEL.RESNETS.OUT_FEATURES)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a feature pyramid (MODEL.FPN) on the network's features MODEL.FPN.IN_FEATURES."""
    return FPN(
        bottom_up=_build(cfg, input_shape, cfg.MODEL.FPN.IN_FEATURES),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
