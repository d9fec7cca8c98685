"""Replaces the norms of a model by another norm type."""

import weakref
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from ..log import get_logger
from .activated import activated_source, with_activation
from .reference_norm import ReferenceNorm2d
from .table import NORM_TYPES, NormType

__all__ = ["NormLayer", "by_type", "convert_norm", "recognized"]

logger = get_logger(__name__)

# Class names in detectron2, torchvision and timm, which this package must not import.
_FROZEN = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
_LIBRARIES = ("detectron2.", "torchvision.", "timm.")
_AFFINE = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_OPTIONS = ("eps", "momentum", "affine", "track_running_stats", "pseudo_count")


class NormLayer(NamedTuple):
    """Properties of a layer whose norm is in the table or is a frozen norm of another library.

    Attributes:
        kind: Class of the norm, without an activation.
        type: Entry of the norm in the table; None for frozen norms of other libraries.
        activated: Whether the layer also applies its ``drop`` and ``act`` modules.
    """

    kind: type
    type: Optional[NormType]
    activated: bool

    @property
    def convertible(self) -> bool:
        """Whether the norm has BatchNorm's parameters and running statistics."""
        return self.type is None or self.type.convertible

    @property
    def affine_in_eval(self) -> bool:
        """Whether the norm in evaluation is one affine map per channel."""
        return self.type is None or self.type.affine_in_eval


def recognized(module: nn.Module) -> Optional[NormLayer]:
    """Returns the properties of a norm layer, or None if ``module`` is not a known norm.

    Only exact classes are recognized, because a subclass may compute something else.
    """
    kind = parametrize.type_before_parametrizations(module)
    inner = activated_source(kind)
    activated, kind = inner is not None, inner or kind
    if "forward" in vars(module):  # this instance has its own forward function
        return None
    for norm_type in NORM_TYPES.values():
        if norm_type.kind is kind:
            return NormLayer(kind, norm_type, activated)
    if kind.__name__ in _FROZEN and kind.__module__.startswith(_LIBRARIES):
        return NormLayer(kind, None, activated)
    return None


def convert_norm(module: nn.Module, norm: str) -> nn.Module:
    """Replaces every BatchNorm-like layer of ``module`` by the norm type ``norm``.

    Affine parameters, running statistics, hooks and parametrizations are kept, and the reference if
    both norms have one. So are eps and momentum: BRN then has BatchNorm's 0.1, not the 0.01 of its
    paper, which a detectron2 backbone with the norm BRN has. In evaluation the converted model
    gives exactly the same outputs, except for conversions from or to VBN with a reference, and from
    a trained EvalRefBN: these normalize each sample differently. Parameters stay the same objects,
    as in ``nn.SyncBatchNorm.convert_sync_batchnorm``: an existing optimizer continues to train
    them, and shared parameters stay shared. A layer that is used in two places stays one layer.
    timm's BatchNormAct2d (and its synchronized and frozen forms) keeps its activation and drop
    layer.

    A BatchNorm-like layer that cannot be converted without changing its function is left unchanged:
    a subclass with its own behaviour, a lazy, 1-d or 3-d norm, or an ``nn.SyncBatchNorm`` that
    follows a linear, 1-d or 3-d layer. The log states how many layers were converted (INFO) and
    which ones were left (WARNING). GN, LN and other norms that do not evaluate like BatchNorm are
    left without a log message.

    Args:
        module: Module to convert in place. If it is itself a norm, use the returned replacement.
        norm: Name of the norm type: "BN", "RefBN", "EvalRefBN", "SyncRefBN", "VBN", "BRN",
            "SyncBN", or a convertible norm type of your own; with detectron2 also "FrozenBN" and
            "naiveSyncBN".

    Returns:
        ``module``, or its replacement.

    Raises:
        ValueError: If the name is unknown (the message lists the known names), or if a layer has no
            running statistics and the new norm requires them. Nothing is changed then.
    """
    known = [name for name, t in NORM_TYPES.items() if t.convertible]
    if norm not in known:
        hint = "; FrozenBN is detectron2's: import refbn_d2 first" if norm == "FrozenBN" else ""
        raise ValueError(f"cannot convert to norm {norm!r}: known are {', '.join(known)}{hint}")
    target = NORM_TYPES[norm]
    layers, left = _find(module)
    for layer in layers.values():
        _check(layer, target)
    tensors = (*module.parameters(), *module.buffers())
    replacements = {layer: _replacement(layer, target, tensors) for layer in layers.values()}
    for parent in list(module.modules()):
        # named_children() would omit the second name of a child that has two names.
        for name, child in parent._modules.items():
            if child in replacements:
                setattr(parent, name, replacements[child])
    _report(norm, [(n, m) for n, m in layers.items() if replacements[m] is not m], left)
    return replacements.get(module, module)


def _find(module: nn.Module) -> Tuple[Dict[str, nn.Module], List[Tuple[str, nn.Module]]]:
    """Returns the convertible layers by name, and the other BatchNorm-like layers."""
    layers: Dict[str, nn.Module] = {}
    left: List[Tuple[str, nn.Module]] = []
    before: Optional[nn.Module] = None
    for name, m in module.named_modules():
        found = recognized(m)
        if isinstance(m, nn.SyncBatchNorm) and _dimension(before) != 2:
            left.append((name, m))
        elif found is not None and found.convertible and _is_plain(m, found):
            layers[name] = m
        elif isinstance(m, _NormBase) and not isinstance(m, nn.modules.instancenorm._InstanceNorm):
            left.append((name, m))
        elif type(m).__name__ in _FROZEN:
            left.append((name, m))
        elif isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)):
            before = m
    return layers, left


def _dimension(before: Optional[nn.Module]) -> int:
    """Number of spatial dimensions of the output of ``before``, the layer before a SyncBatchNorm.

    Without information (None, or another layer) it is 2. For a linear layer it is 1.
    """
    if isinstance(before, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)):
        return 1
    return 3 if isinstance(before, (nn.Conv3d, nn.ConvTranspose3d)) else 2


def _is_plain(module: nn.Module, found: NormLayer) -> bool:
    """Whether the layer has no parameters, buffers or children besides those of its class."""
    # Pruning and torch.nn.utils.weight_norm add some. Parametrizations are allowed, because
    # _replacement transfers them.
    expected = {*_AFFINE, *_STATISTICS, "parametrizations"}
    if found.activated:
        expected |= {"drop", "act"}
    if found.type is not None:
        fresh = found.type.build(1)
        expected |= {*fresh._parameters, *fresh._buffers, *fresh._modules}
    return {*module._parameters, *module._buffers, *module._modules} <= expected


def _check(old: nn.Module, target: NormType) -> None:
    if old.running_mean is None and target.needs_running_stats:
        raise ValueError(
            f"cannot convert {old!r} to {target.kind.__name__}, which needs running statistics: "
            "build the layer with track_running_stats=True"
        )


@torch.no_grad()
def _replacement(old: nn.Module, target: NormType, around: Sequence[Tensor]) -> nn.Module:
    found = recognized(old)
    if found.kind is target.kind:
        return old
    # A drop layer or a parametrization may be in another mode than the norm.
    modes = {name: m.training for name, m in old.named_modules()}
    num_features = getattr(old, "num_features", None) or old.running_mean.numel()
    new = target.build(num_features)
    assert new is not None  # a convertible norm type builds a layer
    if found.activated:
        new.__class__ = with_activation(target.kind)
        new.drop, new.act = old.drop, old.act
    for name in _OPTIONS:
        if hasattr(old, name) and hasattr(new, name):
            setattr(new, name, getattr(old, name))
    # A layer may have no tensors of its own. Its device is then that of the tensors around it.
    for example in (*old.parameters(), *old.buffers(), *around):
        if example.is_floating_point():
            new.to(device=example.device, dtype=example.dtype)
            break
    for name in (*_AFFINE, *_STATISTICS):
        _take_over(old, new, name)
    parametrize.transfer_parametrizations_and_params(old, new)
    if isinstance(old, ReferenceNorm2d) and isinstance(new, ReferenceNorm2d) and old.has_reference:
        new.set_reference(old.ref_mean, old.ref_var, size=int(old.ref_size))
    _take_over_hooks(old, new)
    for name, training in modes.items():
        new.get_submodule(name).training = training
    return new


def _take_over(old: nn.Module, new: nn.Module, name: str) -> None:
    """Gives ``new`` the parameter or buffer ``name`` of ``old``, the same object if possible."""
    if not hasattr(old, name):
        return  # for example num_batches_tracked of a frozen norm
    value: Optional[Tensor] = getattr(old, name)
    if value is None and name == "num_batches_tracked" and old.running_mean is not None:
        return  # the same, in some versions
    if name in new._parameters:
        if value is not None and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach().clone())
        new._parameters[name] = value
    elif name in new._buffers:
        if isinstance(value, nn.Parameter):
            value = value.detach().clone()
        # A frozen norm needs every buffer. If the value is None, keep the scale 1 or the shift 0.
        if value is not None or isinstance(new, _NormBase):
            new._buffers[name] = value
    new._non_persistent_buffers_set.update(old._non_persistent_buffers_set & {name})


def _take_over_hooks(old: nn.Module, new: nn.Module) -> None:
    for name, value in vars(old).items():
        if "_hook" in name:  # torch.nn.Module's dicts of hooks
            setattr(new, name, value)  # keep the same dict, so that hook handles still work
    hooks: Iterable[Any] = new._load_state_dict_pre_hooks.values()
    for hook in hooks:
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)


def by_type(layers: List[Tuple[str, nn.Module]]) -> str:
    """Formats the number and the names of layers, grouped by class."""
    groups: Dict[str, List[str]] = {}
    for name, m in layers:
        groups.setdefault(type(m).__name__, []).append(name or "the module itself")
    return "; ".join(f"{len(names)} {kind} ({', '.join(names)})" for kind, names in groups.items())


def _report(norm: str, converted: list, left: List[Tuple[str, nn.Module]]) -> None:
    counts: Dict[str, int] = {}
    for _, m in converted:
        counts[type(m).__name__] = counts.get(type(m).__name__, 0) + 1
    text = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no layer"
    logger.info("Converted %s to %s", text, norm)
    if left:
        logger.warning("%d norms were not converted: %s", len(left), by_type(left))
