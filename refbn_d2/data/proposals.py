"""Safe reading of precomputed proposals (MODEL.LOAD_PROPOSALS)."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Union

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import build
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from ..upstream import exchanged
from ..weights import safe_pickle

__all__ = ["checked_proposals"]

# detectron2's keys -> Detectron's keys, which detectron2 renames.
_NAMES = {"ids": "indexes", "objectness_logits": "scores", "boxes": "boxes"}
_upstream = build.load_proposals_into_dataset


@contextmanager
def checked_proposals(cfg: CfgNode) -> Iterator[None]:
    """Context manager in which detectron2 reads proposal files without executing code in them.

    Python's own unpickler executes code from the file.

    Raises:
        UserError: if the number of proposal files differs from the number of data sets; in the
            block, if a file has no proposals or lacks an image.
    """
    for split in ("TRAIN", "TEST") if cfg.MODEL.LOAD_PROPOSALS else ():
        names, files = cfg.DATASETS[split], cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
        if len(names) != len(files):
            raise UserError(
                f"DATASETS.PROPOSAL_FILES_{split} has {len(files)} files for the {len(names)} data "
                f"sets of DATASETS.{split}: MODEL.LOAD_PROPOSALS needs one each"
            )
    with exchanged("detectron2.data.build:load_proposals_into_dataset", _load_proposals):
        yield


def _load_proposals(dicts: List[Dict[str, Any]], path: str) -> List[Dict[str, Any]]:
    try:
        with PathManager.open(path, "rb") as f:
            proposals = safe_pickle.load(f, encoding="latin1")
    except Exception as e:  # a damaged file may raise any exception
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"proposals {path!r} cannot be read: {reason}") from None
    try:
        _check(proposals, dicts)
    except ValueError as e:
        raise UserError(f"proposals {path!r}: {e} (DATASETS.PROPOSAL_FILES_*)") from None
    reader = SimpleNamespace(load=lambda *_, **__: proposals)
    with exchanged("detectron2.data.build:pickle", reader):
        return _upstream(dicts, path)


def _check(proposals: Any, dicts: List[Dict[str, Any]]) -> None:
    """Raises a ValueError unless each image has an array of boxes and one logit for each box."""
    if not isinstance(proposals, dict):
        raise ValueError(f"a {type(proposals).__name__}, not a dict of ids, boxes and logits")
    lists: Dict[str, Union[list, tuple, np.ndarray]] = {}
    for key, other in _NAMES.items():
        found = proposals.get(key, proposals.get(other))
        if not isinstance(found, (list, tuple, np.ndarray)):
            raise ValueError(f"no list of {key!r}")
        lists[key] = found
    if len({len(values) for values in lists.values()}) > 1:
        raise ValueError(f"lists of different lengths: { ({k: len(v) for k, v in lists.items()}) }")
    if "bbox_mode" in proposals:
        BoxMode(proposals["bbox_mode"])  # raises a ValueError that names an unknown value
    wanted = {str(record["image_id"]) for record in dicts}
    for image, boxes, logits in zip(lists["ids"], lists["boxes"], lists["objectness_logits"]):
        if str(image) not in wanted:
            continue
        arrays = boxes, logits
        are_numbers = all(isinstance(a, np.ndarray) and a.dtype.kind in "fiu" for a in arrays)
        if not are_numbers or logits.ndim != 1 or boxes.shape != (len(logits), 4):
            raise ValueError(f"image {image} needs an array of N x 4 boxes and one of N logits")
        if not all(np.isfinite(a).all() for a in arrays):
            raise ValueError(f"image {image} has boxes or logits that are not finite")
    missing = wanted - {str(image) for image in lists["ids"]}
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(wanted)} images are not in it: {min(missing)}"
        )
