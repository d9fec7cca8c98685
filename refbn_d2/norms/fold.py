"""Folds norms into the preceding convolutions, for inference."""

import inspect
from collections import Counter
from contextlib import contextmanager
from typing import Dict, Iterator, List, Optional, Set, Tuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..log import get_logger
from .batch_norm_like import BatchNormLike2d
from .convert import by_type, recognized

__all__ = ["fold_norms"]

logger = get_logger(__name__)

Pair = Tuple[nn.Conv2d, nn.Module]


def _is_affine_map(norm: Optional[nn.Module]) -> bool:
    """Whether ``norm`` in evaluation is one affine map per channel, or that and an activation."""
    found = None if norm is None else recognized(norm)
    if found is None or norm.running_mean is None or _is_observed(norm):
        return False
    # Some layers of VBN and EvalRefBN are affine maps, and others of the same type are not.
    if isinstance(norm, BatchNormLike2d):
        return norm._by_running_stats()
    return found.affine_in_eval


def _is_observed(module: nn.Module) -> bool:
    """Whether the module has forward hooks or parametrizations, which may change its function."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "parametrizations" in module._modules


def _is_detectron2_conv(module: nn.Module) -> bool:
    """Whether the module is a convolution that applies its own ``norm`` and ``activation``."""
    return type(module).__module__.startswith("detectron2.") and type(module).__name__ == "Conv2d"


def _is_foldable_into(conv: nn.Module) -> bool:
    """Whether ``conv`` computes only a convolution with its ``weight`` and ``bias``."""
    if _is_observed(conv) or "forward" in vars(conv):  # this instance has its own forward function
        return False
    if _is_detectron2_conv(conv):
        return conv.norm is None and conv.activation is None
    # Other subclasses may standardize their weights or apply an activation. timm's Conv2dSame only
    # pads like TensorFlow.
    kind = type(conv)
    return kind is nn.Conv2d or (
        kind.__name__ == "Conv2dSame" and kind.__module__.startswith("timm.")
    )


class _Tracer(fx.Tracer):
    # So that the graph shows who uses the statistics of a norm that would be gone.
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        if isinstance(m, nn.Conv2d) or recognized(m) is not None:
            return True
        # detectron2's CycleBatchNormList calls a different norm for each feature level. A trace
        # would show only one of these calls, so none of its norms may be folded.
        is_cycle = any(c.__name__ == "CycleBatchNormList" for c in type(m).__mro__)
        return is_cycle or super().is_leaf_module(m, name)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[Set[fx.Node]]:
    """Restores the attributes of all modules, which a traced forward pass may change.

    Yields:
        An empty set. At the end of the block it is filled with the nodes whose values the forward
        pass has left in attributes, where others may read them.
    """
    before = [(m, dict(vars(m))) for m in model.modules()]
    lists = [(v, v.copy()) for _, attributes in before for v in attributes.values() if _grows(v)]
    left: Set[fx.Node] = set()
    try:
        yield left
    finally:
        for m, attributes in before:
            left.update(v.node for v in vars(m).values() if isinstance(v, fx.Proxy))
            vars(m).clear()
            vars(m).update(attributes)
        for now, then in lists:
            values = now.values() if isinstance(now, dict) else now
            left.update(v.node for v in values if isinstance(v, fx.Proxy))
            now.clear()
            now.update(then) if isinstance(now, dict) else now.extend(then)


def _grows(value: object) -> bool:
    return type(value) in (list, dict)


def _graphs(model: nn.Module) -> List[fx.Graph]:
    """Traces the model with all arguments, and also with those that have a default left out.

    A trace shows one path only, and a forward pass may take another one if an argument is None.
    """
    parameters = inspect.signature(type(model).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    graphs = [_Tracer().trace(model)]
    if defaults:
        graphs.append(_Tracer().trace(model, concrete_args=defaults))
    return graphs


def _traced_pairs(model: nn.Module) -> List[Pair]:
    """Pairs of a convolution and a norm where each is called once and only the norm uses the
    convolution's output."""
    if "forward" in vars(model):
        raise ValueError("the forward function is an instance's own, which fx passes over")
    with _attributes_kept(model) as left:
        graphs = _graphs(model)
    first, *others = (_pairs_of(model, graph, left) for graph in graphs)
    return [pair for pair in first if all(pair in pairs for pairs in others)]


def _pairs_of(model: nn.Module, graph: fx.Graph, left: Set[fx.Node]) -> List[Pair]:
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [n for n in graph.nodes if n.op == "call_module"]
    uses = Counter(modules[n.target] for n in calls)
    # Weights, biases and statistics that are used in another way than by calling the module.
    for node in graph.nodes:
        if node.op == "get_attr" and node.users:
            uses[modules.get(node.target.rpartition(".")[0])] += 1
    pairs = []
    for node in calls:
        norm, source = modules[node.target], node.args[0] if node.args else None
        if not (_is_affine_map(norm) and isinstance(source, fx.Node)):
            continue
        if source.op != "call_module" or len(source.users) > 1 or source in left:
            continue
        # What surrounds only one of the two sees the convolution's output if it has hooks.
        between = _around(source.target) ^ _around(node.target)
        conv = modules[source.target]
        if any(_is_observed(modules[name]) for name in between):
            continue
        if _is_foldable_into(conv) and uses[conv] == uses[norm] == 1:
            pairs.append((conv, norm))
    return pairs


def _around(name: str) -> Set[str]:
    """The names of the modules that contain the module ``name``, without the model itself."""
    parts = name.split(".")
    return {".".join(parts[:k]) for k in range(1, len(parts))}


def _find_pairs(model: nn.Module) -> Tuple[List[Pair], Optional[Exception]]:
    """Finds the pairs of ``model`` by tracing it, or its children if it cannot be traced.

    Returns:
        The pairs, and the exception that tracing ``model`` raised, or None.
    """
    if not any(_is_affine_map(m) for m in model.modules()):
        return [], None
    try:
        return _traced_pairs(model), None
    except Exception as e:  # a forward pass may raise any exception when it is called with proxies
        pairs = [pair for child in model.children() for pair in _find_pairs(child)[0]]
        return pairs, e


def _used_once(model: nn.Module) -> Set[nn.Module]:
    """The modules that have exactly one parent in ``model``.

    For these, a trace of the part that contains them shows all calls.
    """
    parents = model.modules()
    places = Counter(m for p in parents for m in p._modules.values() if m is not None)
    return {m for m, count in places.items() if count == 1}


@torch.no_grad()
def fold_norms(model: nn.Module) -> nn.Module:
    """Folds norms that are affine maps in evaluation into the preceding convolutions.

    These are BN, SyncBN, RefBN, SyncRefBN, BRN, MABN and FrozenBN, by their running statistics, and
    those layers of EvalRefBN that give an image's own statistics no weight. RefBN then costs
    nothing in inference; the convolution gets a bias. The drop layer and the activation of timm's
    BatchNormAct2d stay. detectron2's convolutions contain their ``norm``. For all other
    convolutions :mod:`torch.fx` traces the model to find the norm that follows. If the model cannot
    be traced, its largest traceable parts are; the model must call them as a whole.

    A norm is not folded if it does not follow a convolution, if the convolution's output has other
    uses, if the norm or the convolution is called more than once or has hooks, if their weights are
    used elsewhere, or if it is in a part that cannot be traced. Only the forward pass counts, not
    other methods of the model. The log states how many norms were folded (INFO) and which
    BatchNorm-like norms were not (WARNING).

    Args:
        model: Model in evaluation mode, changed in place. The change is irreversible: the model
            cannot be trained as before.

    Returns:
        ``model``, with the same outputs up to rounding.

    Raises:
        ValueError: If ``model`` is in training mode, or if it cannot be traced and no norm could be
            folded. The model is unchanged then.
    """
    if any(m.training for m in model.modules()):
        raise ValueError("fold_norms folds running statistics: call model.eval() first")
    holders = [m for m in model.modules() if _is_detectron2_conv(m) and _is_affine_map(m.norm)]
    held = Counter(m.norm for m in holders)
    holders = [m for m in holders if held[m.norm] == 1 and not _is_observed(m)]
    pairs, reason = _find_pairs(model)
    if reason is not None:
        once = _used_once(model)
        pairs = [(conv, norm) for conv, norm in pairs if conv in once and norm in once]
    pairs = [(conv, norm) for conv, norm in pairs if norm not in held]
    folded = {norm for _, norm in pairs} | {conv.norm for conv in holders}
    left = [
        (name, m)
        for name, m in model.named_modules()
        if m not in folded and (isinstance(m, _BatchNorm) or _is_affine_map(m))
    ]
    if left and reason is not None and not folded:
        names = ", ".join(name for name, _ in left)
        raise ValueError(
            f"cannot tell which convolutions precede {names}: torch.fx cannot trace "
            f"{type(model).__name__} ({' '.join(str(reason).split())}); call fold_norms on the "
            "submodules that it can trace"
        ) from reason
    for conv in holders:
        _fold(conv, conv.norm)
        conv.norm = _rest(conv.norm, None)
    for conv, norm in pairs:
        _fold(conv, norm)
    _replace(model, {norm: _rest(norm, nn.Identity()) for _, norm in pairs})
    logger.info("Folded %d norms into convolutions", len(folded))
    if left:
        logger.warning("%d norms were not folded: %s", len(left), by_type(left))
    return model


def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    stats = norm.running_mean, norm.running_var, norm.eps
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, *stats, norm.weight, norm.bias
    )


def _rest(norm: nn.Module, nothing: Optional[nn.Module]) -> Optional[nn.Module]:
    """The replacement of a folded norm: its drop layer and activation, or ``nothing``."""
    if not recognized(norm).activated:
        return nothing
    return nn.Sequential(norm.drop, norm.act).eval()


def _replace(model: nn.Module, replacements: Dict[nn.Module, Optional[nn.Module]]) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                setattr(parent, name, replacements[child])
