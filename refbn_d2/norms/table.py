"""The table of norm types: their names, and what each of them can do."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, Optional

from torch import nn

from .batch_renorm import BatchRenorm2d
from .instance_norm import InstanceNorm2d
from .ref_batch_norm import RefBatchNorm2d
from .reference_norm import ReferenceNorm2d
from .switchable_norm import SwitchableNorm2d
from .sync_ref_batch_norm import SyncRefBatchNorm2d
from .virtual_batch_norm import VirtualBatchNorm2d

__all__ = ["NORM_TYPES", "NormType", "configure", "register_norm", "unregister_norm"]


@dataclass(frozen=True)
class NormType:
    """One norm type.

    Attributes:
        build: constructor that takes the number of channels.
        kind: exact class of the layers that ``build`` makes, or None if it has no class of its own.
            :func:`convert_norm` and :func:`fold_norms` recognize the layers by it.
        convertible: whether a layer holds BatchNorm's parameters and running statistics, under
            BatchNorm's names: :func:`convert_norm` makes and takes such layers.
        affine_in_eval: whether evaluation is one affine map per channel by the running statistics,
            so that :func:`fold_norms` can put it into a convolution.
        needs_running_stats: whether a layer cannot be without running statistics.
        configure: sets options of a layer from a detectron2 config: ``configure(layer, cfg)``.
    """

    build: Callable[[int], Optional[nn.Module]]
    kind: Optional[type] = None
    convertible: bool = False
    affine_in_eval: bool = False
    needs_running_stats: bool = False
    configure: Optional[Callable[[nn.Module, Any], None]] = None

    @property
    def holds_reference(self) -> bool:
        """Whether a layer holds the statistics of a reference batch."""
        return self.kind is not None and issubclass(self.kind, ReferenceNorm2d)


def _set_pseudo_count(layer: nn.Module, cfg: Any) -> None:
    layer.pseudo_count = float(cfg.MODEL.REFBN.PSEUDO_COUNT)


def _set_schedule(layer: nn.Module, cfg: Any) -> None:
    # r and d reach their bounds where they do in the paper: after a third of its training.
    layer.schedule_steps = max(1, cfg.SOLVER.MAX_ITER // 3)


# What evaluates by BatchNorm's running statistics and nothing else.
_BATCH_NORM = {"convertible": True, "affine_in_eval": True}

NORM_TYPES: Dict[str, NormType] = {
    "BN": NormType(nn.BatchNorm2d, nn.BatchNorm2d, **_BATCH_NORM),
    "RefBN": NormType(RefBatchNorm2d, RefBatchNorm2d, **_BATCH_NORM, configure=_set_pseudo_count),
    "SyncRefBN": NormType(
        SyncRefBatchNorm2d, SyncRefBatchNorm2d, **_BATCH_NORM, configure=_set_pseudo_count
    ),
    # Evaluation differs between samples once a reference is held.
    "VBN": NormType(VirtualBatchNorm2d, VirtualBatchNorm2d, convertible=True),
    "BRN": NormType(
        BatchRenorm2d,
        BatchRenorm2d,
        **_BATCH_NORM,
        needs_running_stats=True,
        configure=_set_schedule,
    ),
    "SyncBN": NormType(nn.SyncBatchNorm, nn.SyncBatchNorm, **_BATCH_NORM),
    "SN": NormType(SwitchableNorm2d, SwitchableNorm2d),
    "IN": NormType(InstanceNorm2d, InstanceNorm2d),
    # GN's 32 groups do not divide the channels of a ResNet of a quarter the width; 8 are its match.
    "GN8": NormType(partial(nn.GroupNorm, 8)),
    # Layer normalization as in the papers: over channels, height and width.
    "GN1": NormType(partial(nn.GroupNorm, 1)),
}
"""Name -> norm type. With detectron2, ``refbn_d2.registry`` adds detectron2's norms."""

_registered = set()


def register_norm(
    name: str,
    build: Callable[[int], nn.Module],
    *,
    kind: Optional[type] = None,
    convertible: bool = False,
    affine_in_eval: bool = False,
    needs_running_stats: bool = False,
    configure: Optional[Callable[[nn.Module, Any], None]] = None,
) -> None:
    """Adds a norm type of your own: ``NORM: name`` in a config then builds it, as any other.

    Args:
        name: the norm type; names are case-sensitive.
        build: constructor that takes the number of channels.
        kind: class of its layers; by default ``build``, if that is a class.
        convertible: whether layers hold BatchNorm's parameters and running statistics under
            BatchNorm's names. :func:`convert_norm` then converts to and from them.
        affine_in_eval: whether evaluation is one affine map per channel, that of BatchNorm by these
            parameters and statistics. Implies ``convertible``; :func:`fold_norms` then folds them.
        needs_running_stats: whether a layer cannot be without running statistics.
        configure: sets options of a layer from a detectron2 config: ``configure(layer, cfg)``.

    Raises:
        ValueError: the name is taken or empty, or a norm without a class is to be converted.

    Example::

        refbn_d2.register_norm("GN4", lambda channels: nn.GroupNorm(4, channels))
    """
    if not name or name in NORM_TYPES:
        raise ValueError(f"norm type {name!r} {'is taken' if name else 'needs a name'}")
    if kind is None and isinstance(build, type):
        kind = build
    convertible = convertible or affine_in_eval
    if convertible and kind is None:
        raise ValueError(f"norm type {name!r} is to be converted: say the class of its layers")
    NORM_TYPES[name] = NormType(
        build, kind, convertible, affine_in_eval, needs_running_stats, configure
    )
    _registered.add(name)


def unregister_norm(name: str) -> None:
    """Takes a norm type out that :func:`register_norm` added.

    Raises:
        ValueError: it did not.
    """
    if name not in _registered:
        raise ValueError(f"norm type {name!r} was not added by register_norm")
    _registered.remove(name)
    del NORM_TYPES[name]


def configure(model: nn.Module, cfg: Any) -> None:
    """Sets the options of all norms below ``model`` from a detectron2 config.

    A layer whose class is not in the table is configured as its nearest base class that is.
    """
    by_kind = {t.kind: t for t in NORM_TYPES.values() if t.kind is not None}
    for m in model.modules():
        found = next((by_kind[c] for c in type(m).__mro__ if c in by_kind), None)
        if found is not None and found.configure is not None:
            found.configure(m, cfg)
