"""Building what a config names: its errors take one line, those of your own code a traceback."""

import difflib
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator

import detectron2
import fvcore
import torch
from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator import build as proposal_generator
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
from fvcore.common.registry import Registry

from ..errors import UserError

__all__ = ["check_names", "config_errors"]

_REGISTRIES: Dict[str, Registry] = {
    "META_ARCHITECTURE": modeling.META_ARCH_REGISTRY,
    "BACKBONE.NAME": modeling.BACKBONE_REGISTRY,
    "ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "PROPOSAL_GENERATOR.NAME": proposal_generator.PROPOSAL_GENERATOR_REGISTRY,
    "RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "ROI_HEADS.NAME": modeling.ROI_HEADS_REGISTRY,
    "ROI_BOX_HEAD.NAME": modeling.ROI_BOX_HEAD_REGISTRY,
    "ROI_MASK_HEAD.NAME": modeling.ROI_MASK_HEAD_REGISTRY,
    "ROI_KEYPOINT_HEAD.NAME": modeling.ROI_KEYPOINT_HEAD_REGISTRY,
    "SEM_SEG_HEAD.NAME": modeling.SEM_SEG_HEADS_REGISTRY,
}
# Names that stand for no object.
_NOTHING = ("", "PrecomputedProposals")

_LIBRARIES = [Path(str(m.__file__)).parent for m in (detectron2, fvcore, torch)]
_LIBRARIES.append(Path(__file__).parents[1])  # this package


def check_names(cfg: CfgNode) -> None:
    """Looks up the parts of a model that a config names.

    Raises:
        UserError: If nothing is registered under one of the names. Your own parts are registered
            when their module is imported.
    """
    for key, registry in _REGISTRIES.items():
        node = cfg.MODEL
        for part in key.split("."):
            node = node[part]
        names = [name for name, _ in registry]
        if node in _NOTHING or node in names:
            continue
        close = difflib.get_close_matches(str(node), names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"
        raise UserError(f"MODEL.{key} is {node!r}: nothing of that name is registered; {hint}")


@contextmanager
def config_errors(what: str) -> Iterator[None]:
    """Context manager: what detectron2 raises because of a config becomes a UserError.

    Errors that pass through a file of somebody else, such as a backbone of your own, keep their
    traceback.

    Args:
        what: Thing that is built, for the message.
    """
    try:
        yield
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        frames = traceback.extract_tb(e.__traceback__)
        if not all(any(x in Path(f.filename).parents for x in _LIBRARIES) for f in frames):
            raise
        last = frames[-1]
        reason = " ".join(str(e).split()) or last.line
        raise UserError(
            f"{what} cannot be built from this config: {type(e).__name__}: {reason} "
            f"({Path(last.filename).name}, {last.name})"
        ) from e
