"""Walking a module tree from one norm to another."""

from typing import Callable, Dict

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .batch_renorm import BatchRenorm2d
from .ref_batch_norm import RefBatchNorm2d
from .reference_norm import ReferenceNorm2d
from .sync_ref_batch_norm import SyncRefBatchNorm2d
from .virtual_batch_norm import VirtualBatchNorm2d

__all__ = ["CONVERTIBLE", "convert_norm"]

# Norms with BatchNorm's parameters and running statistics: what one holds, another can take over.
# A constructor takes num_features and eps. refbn_d2.registry adds detectron2's own FrozenBN.
CONVERTIBLE: Dict[str, Callable[..., nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "RefBN": RefBatchNorm2d,
    "SyncRefBN": SyncRefBatchNorm2d,
    "VBN": VirtualBatchNorm2d,
    "BRN": BatchRenorm2d,
}

_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _is_convertible(module: nn.Module) -> bool:
    kinds = tuple(k for k in CONVERTIBLE.values() if isinstance(k, type))
    return isinstance(module, kinds + (nn.SyncBatchNorm,))


def convert_norm(module: nn.Module, norm: str) -> nn.Module:
    """Replaces every BatchNorm-like layer below ``module`` by the norm called ``norm``.

    Affine parameters, running statistics and, where both have one, the reference are carried over:
    evaluation gives the same outputs, exactly; only that of VBN, which differs between samples, is
    no other norm's. A layer used in two places stays one layer. GN, LN and other norms that are not
    BatchNorm in evaluation are left alone.

    Args:
        module: changed in place, unless it is itself a norm.
        norm: a key of ``CONVERTIBLE``: "BN", "RefBN", "SyncRefBN", "VBN", "BRN", and "FrozenBN"
            with detectron2.

    Returns:
        ``module``, or its replacement.

    Raises:
        ValueError: an unknown name (the message lists the known ones), or a layer holds no running
            statistics and the other norm cannot be without.
    """
    if norm not in CONVERTIBLE:
        known = ", ".join(CONVERTIBLE)
        hint = "; FrozenBN is detectron2's: import refbn_d2 first" if norm == "FrozenBN" else ""
        raise ValueError(f"cannot convert to norm {norm!r}: known are {known}{hint}")
    return _convert(module, CONVERTIBLE[norm], {})


def _convert(module: nn.Module, build: Callable[..., nn.Module], done: Dict) -> nn.Module:
    if module in done:
        return done[module]
    result = module
    if _is_convertible(module):
        result = _replacement(module, build)
    else:
        # Not named_children(), which leaves out the second name of a child that has two.
        for name, child in module._modules.items():
            new_child = None if child is None else _convert(child, build, done)
            if new_child is not child:
                setattr(module, name, new_child)
    done[module] = result
    return result


@torch.no_grad()
def _replacement(old: nn.Module, build: Callable[..., nn.Module]) -> nn.Module:
    if type(old) is build:
        return old
    kwargs = {}
    if isinstance(old, _NormBase) and issubclass(build, _NormBase):
        kwargs = {
            "momentum": old.momentum,
            "affine": old.affine,
            "track_running_stats": old.track_running_stats,
        }
    elif old.running_mean is None:
        raise ValueError(
            f"cannot convert {old!r} to {build.__name__}: it has no running statistics"
        )
    if isinstance(old, RefBatchNorm2d) and issubclass(build, RefBatchNorm2d):
        kwargs["pseudo_count"] = old.pseudo_count
    new = build(old.num_features, eps=old.eps, **kwargs)
    floats = [t for t in old.state_dict().values() if t.is_floating_point()]
    if floats:
        new.to(device=floats[0].device, dtype=floats[0].dtype)
    for name in _STATE:
        source, target = getattr(old, name, None), getattr(new, name, None)
        if source is None or target is None:
            continue
        if isinstance(target, nn.Parameter):
            trainable = source.requires_grad if isinstance(source, nn.Parameter) else True
            setattr(new, name, nn.Parameter(source.detach().clone(), requires_grad=trainable))
        else:
            setattr(new, name, source.detach().clone())
    if isinstance(old, ReferenceNorm2d) and isinstance(new, ReferenceNorm2d) and old.has_reference:
        new.set_reference(old.ref_mean, old.ref_var, size=int(old.ref_size))
    return new.train(old.training)
