"""Converts a ResNet's weights to a file from which a detector can start, and back.

A file for detectron2 contains ``stem.*``, ``res2.*`` to ``res5.*`` and the linear layer, if there
is one, like detectron2's own files of pretrained weights. detectron2's checkpointer matches names
by their suffixes, so conv5 becomes ``roi_heads.res5`` in a C4 detector and
``backbone.bottom_up.res5`` in a detector with an FPN.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..config import load_config
from ..errors import UserError
from ..io.atomic import write_errors
from .files import StateDict, atomic_save, find_state_dict, first_sentence, read_weights
from .folded import EPS, FOLDED_VAR
from .resnet_names import detectron2_names, torchvision_names

__all__ = ["FORMATS", "NORMS", "Conversion", "convert", "freeze", "norm_of"]

FORMATS = ("detectron2", "torchvision")
NORMS = ("BN", "RefBN", "EvalRefBN", "FrozenBN")

_AFFINE = ("weight", "bias", "running_mean", "running_var")
_BATCH_NORM = {*_AFFINE, "num_batches_tracked"}
# Buffers that a norm has besides those of BatchNorm. SyncRefBN and VBN have those of RefBN.
_OWN = {
    "RefBN": {"ref_mean", "ref_var", "ref_captured", "ref_size"},
    "EvalRefBN": {"batch_deviation", "image_deviation"},
}

# (blocks of each stage, whether bottlenecks) -> MODEL.RESNETS.DEPTH
_DEPTHS: Dict[Tuple[Tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
# Settings with which the weights of torchvision and timm were trained. detectron2's defaults
# differ.
_TORCHVISION_CONFIG = {
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "INPUT.FORMAT": "RGB",
}


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        names: name of each converted tensor in the source -> its name in the target.
        left_out: names of the tensors of the source that are not in the target.
        taken: description of the state dict of the source that was converted.
        norm: one of NORMS, or '' if it cannot be determined from the weights.
        config: config keys that a detector needs to start from the file -> their values. Lacks
            STRIDE_IN_1X1, PIXEL_MEAN, PIXEL_STD and FORMAT if they are unknown for the source.
    """

    names: Dict[str, str]
    left_out: List[str]
    taken: str
    norm: str
    config: Dict[str, Any]


def convert(
    source: str,
    target: str,
    norm: Optional[str] = None,
    to: str = "detectron2",
    key: str = "",
) -> Conversion:
    """Converts the ResNet in a weights file for detectron2, or for torchvision and timm.

    Args:
        source: path of a .pth, .pkl or .safetensors file; code in it is not executed.
        target: path of the .pth file to write; an existing file is replaced only if the conversion
            succeeds.
        norm: one of NORMS, to which the norms are converted; None to keep them unchanged.
        to: one of FORMATS: a detectron2 backbone file, or a state dict for torchvision and timm.
        key: key of the state dict if the file contains several ("model_ema"); '' for the most
            likely one.

    Raises:
        UserError: if ``source`` cannot be read or contains no ResNet that detectron2 can build, if
            its norms cannot be converted to ``norm``, or if ``target`` cannot be written.
    """
    content, found = _read(source, key)
    try:
        names = detectron2_names(content)
        weights = {new: content[old] for old, new in names.items()}
        resnet = _resnet_config(weights)
        if norm:
            weights = _with_norm(weights, norm)
    except UserError as e:
        raise UserError(f"{source}: {e}") from None
    renamed = torchvision_names(weights) if to == "torchvision" else {n: n for n in weights}
    result: Dict[str, Any] = {renamed[n]: value for n, value in weights.items()}
    if to == "detectron2":
        # With this key detectron2's checkpointer matches names by their suffixes.
        result = {"model": result, "matching_heuristics": True}
    _write(target, result)
    matched = {old: renamed[new] for old, new in names.items() if new in renamed}
    from_torchvision = any(old.endswith("layer1.0.conv1.weight") for old in names)
    norm = norm or norm_of(weights)
    config = {"MODEL.WEIGHTS": target, **resnet}
    if norm:
        config["MODEL.RESNETS.NORM"] = norm
    if norm not in ("", "FrozenBN"):
        config["MODEL.BACKBONE.FREEZE_AT"] = 0  # frozen stages have FrozenBN regardless of NORM
    if from_torchvision:
        config.update(_TORCHVISION_CONFIG)
    # A state dict with torchvision's plain names is a download: a config beside it is unrelated.
    if "layer1.0.conv1.weight" not in names:
        config.update(_training_config(source, from_torchvision))
    return Conversion(
        names=matched,
        left_out=[name for name in content if name not in matched],
        taken=str(found),
        norm=norm,
        config=config,
    )


def _read(path: str, key: str) -> Tuple[Dict[str, Tensor], StateDict]:
    """Reads the tensors in a file; Caffe2's names are converted to detectron2's.

    Returns:
        The tensors by name, and the state dict of the file that contains them.
    """
    try:
        content = read_weights(PathManager.get_local_path(path))
    except UserError:
        raise
    except Exception as e:  # a damaged file may raise any exception
        raise UserError(f"{path}: cannot be read as weights: {first_sentence(e)}") from None
    try:
        found = find_state_dict(content, key)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    caffe2 = path.endswith(".pkl") and content.get("__author__", "Caffe2") == "Caffe2"
    weights = {k: torch.as_tensor(v) for k, v in found.weights.items() if _is_tensor(v)}
    for name, weight in weights.items():
        if weight.is_meta:
            raise UserError(f"{path}: {name} has a shape but no values (it was on the meta device)")
    return (convert_c2_detectron_names(weights)[0] if caffe2 else weights), found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray, np.generic))


def _write(path: str, content: Dict[str, Any]) -> None:
    with write_errors(path, "name another output file"):
        atomic_save(content, path)


def _norm_layers(weights: Dict[str, Tensor]) -> Dict[str, Set[str]]:
    """Returns the keys of each norm layer ("weight", "running_var", ...) by the layer's name."""
    layers: Dict[str, Set[str]] = {}
    for name in weights:
        layer, _, key = name.rpartition(".")
        if layer.endswith(".norm"):
            layers.setdefault(layer, set()).add(key)
    return layers


def norm_of(weights: Dict[str, Tensor]) -> str:
    """Returns which of NORMS a state dict with detectron2's names has.

    SyncRefBN and VBN have the same tensors as RefBN, and count as it. Returns '' if the norm cannot
    be determined: GN, LN, IN and Detectron's AffineChannel all have only a weight and a bias.
    """
    layers = _norm_layers(weights)
    keys = set().union(*layers.values())
    if keys - _BATCH_NORM.union(*_OWN.values()) or not all(
        k.issuperset(_AFFINE) for k in layers.values()
    ):
        return ""
    for norm, own in _OWN.items():
        if keys & own:
            return norm
    frozen = all((weights[f"{n}.running_var"] == FOLDED_VAR).all() for n in layers)
    return "FrozenBN" if frozen else "BN"


def freeze(weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Folds the computation of each norm in evaluation mode into one affine map.

    ::

        weight' = weight / sqrt(running_var + eps),  bias' = bias - running_mean weight'

    This also holds for RefBN, whose running statistics are averages of its mixed statistics; its
    reference is dropped. EvalRefBN loses the weight of an image's own statistics, and evaluates
    like BN then. The running mean becomes 0 and the running variance 1 - eps, which
    FrozenBN applies as the identity. Without a variance in the file detectron2 would use 1, with a
    relative error of eps / 2 in every layer.

    Args:
        weights: weights of a network with BN, RefBN or EvalRefBN, with detectron2's names.
    """
    layers = _norm_layers(weights)
    frozen = {n: v for n, v in weights.items() if n.rpartition(".")[0] not in layers}
    for layer in layers:
        weight, bias, mean, var = (weights[f"{layer}.{k}"] for k in _AFFINE)
        # Rounded as F.batch_norm rounds: from float64, outputs after 50 layers differ by over 1e-6.
        scale = weight * (var + EPS).rsqrt()
        shift = torch.addcmul(bias, mean, scale, value=-1)
        identity = torch.zeros_like(mean), FOLDED_VAR.to(var.dtype).expand_as(var).clone()
        for key, value in zip(_AFFINE, (scale, shift, *identity)):
            frozen[f"{layer}.{key}"] = value
    return frozen


def _with_norm(weights: Dict[str, Tensor], norm: str) -> Dict[str, Tensor]:
    source = norm_of(weights)
    if not source:
        raise UserError(
            f"its norms cannot become {norm}: not all of them are BatchNorm with running "
            "statistics; leave out --norm and --frozen to keep them unchanged"
        )
    if source == norm:
        return weights
    if source == "FrozenBN":
        raise UserError(f"its norms are folded into affine maps and cannot become {norm} again")
    if norm == "FrozenBN":
        return freeze(weights)
    # What the new norm has besides, a reference or a weight, is measured in training.
    dropped = set().union(*_OWN.values()) - _OWN.get(norm, set())
    return {n: v for n, v in weights.items() if n.rpartition(".")[2] not in dropped}


def _resnet_config(weights: Dict[str, Tensor]) -> Dict[str, int]:
    """Returns the keys of MODEL.RESNETS for the weights' network; only DEPTH and non-defaults.

    Raises:
        UserError: if detectron2 cannot build the network, or if weights are missing or left over.
    """
    blocks = [
        1 + max((int(n.split(".")[1]) for n in weights if n.startswith(f"res{s}.")), default=-1)
        for s in range(2, 6)
    ]
    bottleneck = "res2.0.conv3.weight" in weights
    depth = _DEPTHS.get((tuple(blocks), bottleneck))
    if depth is None:
        raise UserError(f"detectron2 builds no ResNet of {blocks} blocks")
    try:
        stem = weights["stem.conv1.weight"]
        inner = weights["res2.0.conv2.weight"]
        outer = weights["res2.0.conv3.weight"] if bottleneck else inner
    except KeyError as e:
        raise UserError(f"it has no {e.args[0]}") from None
    for name in ("stem.conv1", "res2.0.conv2", *(["res2.0.conv3"] if bottleneck else [])):
        shape = tuple(weights[f"{name}.weight"].shape)
        if len(shape) != 4 or 0 in shape:
            raise UserError(f"{name}.weight is of shape {shape}, no convolution's")
    resnet = {"DEPTH": depth, "STEM_OUT_CHANNELS": len(stem), "RES2_OUT_CHANNELS": len(outer)}
    if bottleneck:
        resnet.update(NUM_GROUPS=len(inner) // inner.shape[1], WIDTH_PER_GROUP=inner.shape[1])
    opts = [str(x) for k, v in resnet.items() for x in (f"MODEL.RESNETS.{k}", v)]
    opts += ["MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.OUT_FEATURES", "['res5']"]
    opts += ["MODEL.BACKBONE.FREEZE_AT", "0"]
    try:
        with torch.device("meta"):
            model = build_resnet_backbone(load_config("", opts), ShapeSpec(channels=stem.shape[1]))
    except (AssertionError, UserError) as e:  # UserError: a number is out of the key's range
        raise UserError(f"detectron2 builds no such ResNet: {e}") from None
    _check_fit(weights, model.state_dict())
    defaults = load_config("").MODEL.RESNETS
    return {f"MODEL.RESNETS.{k}": v for k, v in resnet.items() if k == "DEPTH" or v != defaults[k]}


def _check_fit(weights: Dict[str, Tensor], model: Dict[str, Tensor]) -> None:
    layers = {name.rpartition(".")[0] for name in model} | {"linear"}
    for name, value in model.items():
        if name.endswith((".weight", ".bias")) and name not in weights:
            raise UserError(f"it has no {name}")
        if name in weights and weights[name].shape != value.shape:
            shapes = tuple(weights[name].shape), tuple(value.shape)
            raise UserError(f"{name} is of shape {shapes[0]}, detectron2 expects {shapes[1]}")
    for name, value in weights.items():
        layer, _, key = name.rpartition(".")
        left_over = key == "bias" and layer != "linear" and name not in model and value.any()
        if layer not in layers or left_over:  # a convolution's bias of 0 changes nothing
            raise UserError(f"a ResNet that detectron2 does not build: it has no place for {name}")


def _training_config(source: str, from_torchvision: bool) -> Dict[str, Any]:
    """Reads the keys for pixels and strides from the config beside a checkpoint of this package."""
    try:
        cfg = load_config(str(Path(source).parent / "config.yaml"))
    except UserError:  # there is no config, or it belongs to another program
        return {}
    config = {
        "MODEL.PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN),
        "MODEL.PIXEL_STD": list(cfg.MODEL.PIXEL_STD),
    }
    if not from_torchvision:  # for torchvision's ResNet they are already known
        config["INPUT.FORMAT"] = cfg.INPUT.FORMAT
        config["MODEL.RESNETS.STRIDE_IN_1X1"] = cfg.MODEL.RESNETS.STRIDE_IN_1X1
    return config
