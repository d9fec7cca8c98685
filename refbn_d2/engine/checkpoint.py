"""Reading weights: a file that does not fit the model is an error, not a warning in a long log."""

import os
import re
from typing import Any, Dict
from unittest import mock

import torch
from detectron2.checkpoint import DetectionCheckpointer, detection_checkpoint

from ..errors import UserError
from . import safe_pickle

__all__ = ["Checkpointer"]

_RESNET_WEIGHT = re.compile(r"res\d\.\d+\.(conv\d|shortcut)(\.norm)?\.weight$")
# Where it is missing, BatchNorm was fused into the weights: a live norm cannot start from those. Or
# a reference has lost a part. (A file without any reference is not said to miss one.)
_RESNET_STATISTICS = re.compile(
    r"res\d\.\d+\.(conv\d|shortcut)\.norm\.(running_var|ref_mean|ref_var)$"
)


class Checkpointer(DetectionCheckpointer):
    """DetectionCheckpointer that refuses weights of another architecture.

    Upstream loads what fits and logs the rest, which trains a network from random weights after a
    typing error. Heads may differ (other classes); a backbone may not.
    """

    def load(self, path: str, checkpointables=None) -> Dict[str, Any]:
        # Upstream takes options behind a question mark.
        if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise UserError(f"weights {path!r}: no such file (MODEL.WEIGHTS)")
        if "://" in (path or "") and ".." in path:
            # Downloads are kept below a cache folder under the path that the address has.
            raise UserError(f"weights {path!r}: an address must not contain '..' (MODEL.WEIGHTS)")
        self._path = path
        try:
            return super().load(path, checkpointables)
        except UserError:
            raise
        except Exception as e:  # whatever reading and using a damaged file may raise
            reason = (str(e).split(". ")[0].splitlines() or [type(e).__name__])[0]
            raise UserError(f"weights {path!r} cannot be read: {reason}") from e

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        # Upstream empties the file first; a run killed in that moment could not resume.
        path = os.path.join(self.save_dir, "last_checkpoint")
        if not os.path.isdir(self.save_dir):  # remote storage
            return super().tag_last_checkpoint(last_filename_basename)
        with open(path + ".partial", "w") as f:
            f.write(last_filename_basename)
        os.replace(path + ".partial", path)

    def _load_file(self, filename: str):
        # A plain unpickler runs whatever a file asks it to.
        with mock.patch.object(detection_checkpoint, "pickle", safe_pickle):
            with mock.patch.object(torch, "load", safe_pickle.load_torch):
                content = super()._load_file(filename)
        weights = content["model"]
        if not isinstance(weights, dict) or not all(isinstance(k, str) for k in weights):
            raise UserError(f"weights {filename!r}: no names and tensors in it (MODEL.WEIGHTS)")
        return content

    def _load_model(self, checkpoint: Any):
        incompatible = super()._load_model(checkpoint)
        if incompatible is None:
            return incompatible
        missing, extra = incompatible.missing_keys, incompatible.unexpected_keys
        # R-50 weights in an R-101, or the reverse, fit block by block as far as they go.
        unmatched = [k for k in [*missing, *extra] if _RESNET_WEIGHT.search(k)]
        unmatched += [k for k in missing if _RESNET_STATISTICS.search(k)]
        if unmatched or all(n in missing for n, _ in self.model.named_parameters()):
            detail = f"{unmatched[0]} has no match" if unmatched else "no parameter matches"
            raise UserError(
                f"weights {self._path!r} are of another architecture: {detail}; set MODEL.WEIGHTS "
                "to a file for this model, or to '' to start from random weights"
            )
        for name, value in self.model.named_parameters():
            if not value.isfinite().all():
                raise UserError(f"weights {self._path!r} are not finite numbers: {name}")
        return incompatible
