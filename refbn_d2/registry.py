"""Makes detectron2's get_norm build the norms of this package's table of norm types."""

import functools
import types
from functools import partial
from typing import Callable, List, Optional, Union

import torch
from detectron2.config import configurable
from detectron2.layers import (
    CycleBatchNormList,
    FrozenBatchNorm2d,
    NaiveSyncBatchNorm,
    batch_norm,
)
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.convnext import LayerNorm2d

from .errors import UserError
from .log import get_logger
from .norms.table import NORM_TYPES, NormType, register_norm, unregister_norm

logger = get_logger(__name__)

__all__ = ["UnknownNormError", "known_norms", "register", "register_norm", "unregister_norm"]

# Names that get_norm knows in at least one version of detectron2. Its table is a local variable, so
# the names of the installed version cannot be listed. detectron2 builds these norms itself; our
# table is used only if the installed version lacks the name (LN in 0.6).
_UPSTREAM = ("BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")

_batch_norm_type = partial(
    NormType, convertible=True, affine_in_eval=True, needs_running_stats=True
)

# Those of them that norms.table cannot contain, because it must not need detectron2 or torchvision.
_UPSTREAM_TYPES = {
    "FrozenBN": _batch_norm_type(FrozenBatchNorm2d, FrozenBatchNorm2d),
    "GN": NormType(partial(nn.GroupNorm, 32)),
    # Normalizes over the channels of each pixel, unlike GN1.
    "LN": NormType(partial(LayerNorm2d, eps=1e-6)),
    "nnSyncBN": NormType(nn.SyncBatchNorm),
    "naiveSyncBN": _batch_norm_type(NaiveSyncBatchNorm, NaiveSyncBatchNorm),
    "naiveSyncBN_N": NormType(partial(NaiveSyncBatchNorm, stats_mode="N")),
}


class UnknownNormError(UserError, KeyError):
    """Unknown norm type. It is also a KeyError because upstream raises one."""

    __str__ = Exception.__str__


def register() -> None:
    """Makes detectron2's ``get_norm(name, channels)`` also build the norms of the table.

    Many modules import ``get_norm`` by name, and its table is a local variable. So the function
    object stays the same and only its code is replaced, by code that calls :func:`_get_norm` below.
    This also affects modules that imported ``get_norm`` before. Repeated calls have no effect.
    """
    get_norm = batch_norm.get_norm
    if hasattr(get_norm, "refbn_upstream"):
        return
    upstream = types.FunctionType(
        get_norm.__code__,
        get_norm.__globals__,
        get_norm.__name__,
        get_norm.__defaults__,
        get_norm.__closure__,
    )

    def patched(norm, out_channels):
        # Runs with the globals of detectron2.layers.batch_norm, hence the import.
        from refbn_d2.registry import _get_norm

        return _get_norm(norm, out_channels)

    get_norm.__code__ = patched.__code__.replace(co_name=get_norm.__name__)
    get_norm.refbn_upstream = upstream
    NORM_TYPES.update(_UPSTREAM_TYPES)
    _teach_retinanet()


class _PerLevelNorms(CycleBatchNormList):
    """Upstream's list of one norm per feature level, with the references of all levels."""

    @property
    def has_reference(self) -> bool:
        """Whether the norm of every level has a reference."""
        return all(m.has_reference for m in self)

    @property
    def ref_mean(self) -> Tensor:
        """(levels, channels), mean of the reference batch at each level."""
        return torch.stack([m.ref_mean for m in self])

    @property
    def ref_var(self) -> Tensor:
        """(levels, channels), biased variance of the reference batch at each level."""
        return torch.stack([m.ref_var for m in self])


def _teach_retinanet() -> None:
    """Makes RetinaNet's head, which all feature levels share, use one norm per level.

    Upstream does this only for the names "BN" and "SyncBN" (with CycleBatchNormList). For every
    other BatchNorm it is meant to log a warning, but it recognizes one by "BN" in the name of its
    class. FCOS's head inherits from this head.
    """
    # The constructor without the decorator that reads its arguments from a config.
    build = RetinaNetHead.__init__.__wrapped__

    @functools.wraps(build)
    def build_per_level(self, *, input_shape, norm="", **kwargs):
        norm = _per_level(norm, len(input_shape))
        build(self, input_shape=input_shape, norm=norm, **kwargs)

    RetinaNetHead.__init__ = configurable(build_per_level)


def _per_level(norm: Union[str, Callable, None], num_levels: int) -> Union[str, Callable, None]:
    """Returns what RetinaNet's head has to use as its norm if its config contains ``norm``."""
    if not isinstance(norm, str) or norm not in NORM_TYPES or norm in _UPSTREAM:
        return norm
    kind = NORM_TYPES[norm].kind
    if kind is not None and issubclass(kind, _BatchNorm):
        logger.info("Using %s per level in RetinaNetHead, for %d levels.", norm, num_levels)
        build = partial(_without_affine, NORM_TYPES[norm].build)
        return lambda channels: _PerLevelNorms(num_levels, build, num_features=channels)
    if getattr(_get_norm(norm, 8), "running_mean", None) is not None:
        logger.warning("Shared BatchNorm (type=%s) may not work well in RetinaNetHead.", norm)
    return norm


def _without_affine(build: Callable, num_features: int, affine: bool = False) -> nn.Module:
    """What ``build`` makes, with its options, for a list whose levels share weight and bias."""
    norm = build(num_features)
    norm.affine, norm.weight, norm.bias = affine, None, None
    return norm


def _get_norm(norm: Union[str, Callable, None], out_channels: int) -> Optional[nn.Module]:
    """Implements get_norm: upstream builds the norms that it knows, the table all others."""
    if isinstance(norm, str) and norm in NORM_TYPES and norm not in _UPSTREAM:
        return NORM_TYPES[norm].build(out_channels)
    try:
        return batch_norm.get_norm.refbn_upstream(norm, out_channels)
    except KeyError:
        if not isinstance(norm, str):
            raise
        if norm in NORM_TYPES:
            return NORM_TYPES[norm].build(out_channels)
        raise UnknownNormError(
            f"unknown norm {norm!r}: known are {', '.join(known_norms())} and '' for none"
        ) from None


def known_norms() -> List[str]:
    """Returns all norm types that get_norm knows, upstream's first."""
    return [*_UPSTREAM, *(name for name in NORM_TYPES if name not in _UPSTREAM)]
