"""The table of norm types: their names and properties."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, Optional, Set

from torch import nn

from .batch_renorm import BatchRenorm2d
from .eval_ref_batch_norm import EvalRefBatchNorm2d
from .instance_norm import InstanceNorm2d
from .moving_average_batch_norm import MovingAverageBatchNorm2d
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
        build: Constructor that takes the number of channels.
        kind: Exact class of the layers that ``build`` returns, by which :func:`convert_norm` and
            :func:`fold_norms` recognize them. None if the norm type has no class of its own.
        convertible: Whether a layer has BatchNorm's parameters and running statistics under
            BatchNorm's names, so that :func:`convert_norm` can convert from and to it.
        affine_in_eval: Whether evaluation is one affine map per channel by the running statistics,
            so that :func:`fold_norms` can fold it into a convolution.
        needs_running_stats: Whether a layer requires running statistics.
        configure: Function ``configure(layer, cfg)`` that sets options of a layer from a detectron2
            config; None if there are no options.
    """

    build: Callable[[int], Optional[nn.Module]]
    kind: Optional[type] = None
    convertible: bool = False
    affine_in_eval: bool = False
    needs_running_stats: bool = False
    configure: Optional[Callable[[nn.Module, Any], None]] = None

    @property
    def holds_reference(self) -> bool:
        """Whether layers of this type hold the statistics of a reference batch."""
        return self.kind is not None and issubclass(self.kind, ReferenceNorm2d)


def _set_pseudo_count(layer: nn.Module, cfg: Any) -> None:
    layer.pseudo_count = float(cfg.MODEL.REFBN.PSEUDO_COUNT)


def _set_schedule(layer: nn.Module, cfg: Any) -> None:
    # In the paper the schedule ends after a third of the training.
    layer.schedule_steps = max(1, cfg.SOLVER.MAX_ITER // 3)


# For norms that in evaluation are an affine map by BatchNorm's running statistics.
_BATCH_NORM = {"convertible": True, "affine_in_eval": True}

NORM_TYPES: Dict[str, NormType] = {
    "BN": NormType(nn.BatchNorm2d, nn.BatchNorm2d, **_BATCH_NORM),
    "RefBN": NormType(RefBatchNorm2d, RefBatchNorm2d, **_BATCH_NORM, configure=_set_pseudo_count),
    "SyncRefBN": NormType(
        SyncRefBatchNorm2d, SyncRefBatchNorm2d, **_BATCH_NORM, configure=_set_pseudo_count
    ),
    # Not affine_in_eval: evaluation normalizes each sample differently.
    "EvalRefBN": NormType(
        EvalRefBatchNorm2d, EvalRefBatchNorm2d, convertible=True, needs_running_stats=True
    ),
    # Likewise: with a reference, evaluation normalizes each sample differently.
    "VBN": NormType(VirtualBatchNorm2d, VirtualBatchNorm2d, convertible=True),
    "BRN": NormType(
        BatchRenorm2d,
        BatchRenorm2d,
        **_BATCH_NORM,
        needs_running_stats=True,
        configure=_set_schedule,
    ),
    # Not convertible: it subtracts no mean, so it cannot continue from BatchNorm's statistics.
    "MABN": NormType(
        MovingAverageBatchNorm2d,
        MovingAverageBatchNorm2d,
        affine_in_eval=True,
        needs_running_stats=True,
    ),
    "SyncBN": NormType(nn.SyncBatchNorm, nn.SyncBatchNorm, **_BATCH_NORM),
    "SN": NormType(SwitchableNorm2d, SwitchableNorm2d),
    "IN": NormType(InstanceNorm2d, InstanceNorm2d),
    # detectron2's GN has 32 groups, too many for a ResNet with a quarter of the usual channels.
    # GN8 has the same number of channels per group there.
    "GN8": NormType(partial(nn.GroupNorm, 8)),
    # Layer normalization as in the papers: over channels, height and width.
    "GN1": NormType(partial(nn.GroupNorm, 1)),
}
"""Maps names to norm types. With detectron2, ``refbn_d2.registry`` adds detectron2's norms."""

_registered: Set[str] = set()


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
    """Adds your own norm type, so that ``NORM: name`` in a config builds it.

    Args:
        name: Name of the norm type, case-sensitive.
        build: Constructor that takes the number of channels.
        kind: Class of its layers; by default ``build``, if that is a class.
        convertible: Whether a layer has BatchNorm's parameters and running statistics under
            BatchNorm's names, so that :func:`convert_norm` can convert from and to it.
        affine_in_eval: Whether a layer in evaluation computes what BatchNorm computes from these
            parameters and running statistics, so that :func:`fold_norms` can fold it into a
            convolution. Implies ``convertible``.
        needs_running_stats: Whether a layer requires running statistics.
        configure: Function ``configure(layer, cfg)`` that sets options of a layer from a detectron2
            config.

    Raises:
        ValueError: If the name is empty or already used, or if the norm type is convertible but has
            no class.

    Example::

        refbn_d2.register_norm("GN4", lambda channels: nn.GroupNorm(4, channels))
    """
    if not name:
        raise ValueError("a norm type needs a name that is not empty")
    if name in NORM_TYPES:
        raise ValueError(f"norm type {name!r} exists already; choose another name")
    if kind is None and isinstance(build, type):
        kind = build
    convertible = convertible or affine_in_eval
    if convertible and kind is None:
        raise ValueError(
            f"norm type {name!r} is convertible, but the class of its layers is unknown: pass kind="
        )
    NORM_TYPES[name] = NormType(
        build, kind, convertible, affine_in_eval, needs_running_stats, configure
    )
    _registered.add(name)


def unregister_norm(name: str) -> None:
    """Removes a norm type that :func:`register_norm` added.

    Raises:
        ValueError: If :func:`register_norm` did not add it.
    """
    if name not in _registered:
        raise ValueError(f"norm type {name!r} was not added by register_norm")
    _registered.remove(name)
    del NORM_TYPES[name]


def configure(model: nn.Module, cfg: Any) -> None:
    """Sets the options of all norms in ``model`` from a detectron2 config.

    A layer whose class is not in the table is configured like its nearest base class in the table.
    """
    by_kind = {t.kind: t for t in NORM_TYPES.values() if t.kind is not None}
    for m in model.modules():
        found = next((by_kind[c] for c in type(m).__mro__ if c in by_kind), None)
        if found is not None and found.configure is not None:
            found.configure(m, cfg)
