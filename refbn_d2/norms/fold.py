"""Folding norms into the convolutions before them, for inference."""

from collections import Counter
from typing import Dict, List, Tuple

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .convert import CONVERTIBLE
from .reference_norm import ReferenceNorm2d

__all__ = ["fold_norms"]


def _is_affine_map(norm: nn.Module) -> bool:
    """Whether ``norm`` in evaluation is one affine map per channel and nothing else."""
    # Exact types: a subclass may do more, as timm's BatchNormAct2d, which holds an activation.
    # FrozenBatchNorm2d is detectron2's and torchvision's, which this package must not import.
    known = type(norm) in (*CONVERTIBLE.values(), nn.SyncBatchNorm)
    if isinstance(norm, ReferenceNorm2d):
        return known and norm._by_running_stats()
    known = known or type(norm).__name__ == "FrozenBatchNorm2d"
    return known and norm.running_mean is not None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, nn.Conv2d) or _is_affine_map(m) or super().is_leaf_module(m, name)


def _traced_pairs(model: nn.Module) -> List[Tuple[nn.Conv2d, nn.Module]]:
    """Convolutions whose only use goes through a norm that is used only there."""
    graph = _Tracer().trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [n for n in graph.nodes if n.op == "call_module"]
    uses = Counter(modules[n.target] for n in calls)
    pairs = []
    for node in calls:
        norm, source = modules[node.target], node.args[0] if node.args else None
        if not (_is_affine_map(norm) and isinstance(source, fx.Node)):
            continue
        if source.op != "call_module" or len(source.users) > 1:
            continue
        conv = modules[source.target]
        if isinstance(conv, nn.Conv2d) and uses[conv] == uses[norm] == 1:
            pairs.append((conv, norm))
    return pairs


@torch.no_grad()
def fold_norms(model: nn.Module) -> nn.Module:
    """Folds norms that are affine maps in evaluation into the convolutions before them.

    That is BN, SyncBN, RefBN, SyncRefBN, BRN and FrozenBN by their running statistics: RefBN then
    costs nothing in inference, and a convolution gains a bias. Which convolution precedes a norm is
    known of a convolution that holds its ``norm``, as detectron2's does; for all others
    :mod:`torch.fx` follows the forward pass. A norm is left alone where the answer is none, where
    the convolution's output has other uses, or where either is called more than once.

    Args:
        model: in evaluation mode; changed in place, for good: it cannot be trained as before.

    Returns:
        ``model``, with the same outputs to rounding.

    Raises:
        ValueError: ``model`` is in training mode, or has norms beside convolutions and cannot be
            traced; it is then as it was.
    """
    if any(m.training for m in model.modules()):
        raise ValueError("fold_norms folds running statistics: call model.eval() first")
    holders = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    holders = [m for m in holders if _is_affine_map(getattr(m, "norm", None))]
    held = {m.norm for m in holders}
    rest = {n: m for n, m in model.named_modules() if _is_affine_map(m) and m not in held}
    pairs = _find_pairs(model, rest) if rest else []
    for conv in holders:
        _fold(conv, conv.norm)
        conv.norm = None
    for conv, norm in pairs:
        _fold(conv, norm)
    _replace_by_identity(model, {norm for _, norm in pairs})
    return model


def _find_pairs(model: nn.Module, norms: Dict[str, nn.Module]) -> list:
    try:
        return _traced_pairs(model)
    except Exception as e:  # whatever the forward pass raises when it is given symbols
        reason = " ".join(str(e).split())
        raise ValueError(
            f"cannot tell which convolutions precede {', '.join(norms)}: torch.fx cannot trace "
            f"{type(model).__name__} ({reason}); fold the parts that it can trace"
        ) from e


def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    stats = norm.running_mean, norm.running_var, norm.eps
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, *stats, norm.weight, norm.bias
    )


def _replace_by_identity(model: nn.Module, norms: set) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in norms:
                setattr(parent, name, nn.Identity())
