"""Checkpoints that survive a crash, and weights that do not fit the model as an error."""

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Tuple

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch.nn.modules.batchnorm import _NormBase

from ..errors import UserError
from ..io.atomic import PARTIAL, atomic_write
from ..modeling.timm_weights import with_detector_names
from ..upstream import exchanged
from ..weights import safe_pickle
from ..weights.files import atomic_save, find_state_dict, first_sentence, read_weights
from ..weights.folded import FOLDED_VAR

__all__ = ["Checkpointer"]

# A file of BatchNorm's has no reference: RefBN evaluates by its running statistics.
_NO_PART_OF_EVALUATION = re.compile(r"\.(ref_\w+|num_batches_tracked)$")

_CHECKPOINT = re.compile(r"model_(\d{7,}|final)\.pth")
_RESNET_WEIGHT = re.compile(r"res\d\.\d+\.(conv\d|shortcut)(\.norm)?\.weight$")
# Where it is missing, BatchNorm was fused into the weights: a live norm cannot start from those. Or
# a reference has lost a part. (A file without any reference is not said to miss one.)
_RESNET_STATISTICS = re.compile(
    r"res\d\.\d+\.(conv\d|shortcut)\.norm\.(running_var|ref_mean|ref_var)$"
)


def _dict_of(load: Callable[..., Any]) -> Callable[..., Dict[str, Any]]:
    """``load``, with an error where a file holds anything but a dict."""

    def loaded(*args: Any, **kwargs: Any) -> Dict[str, Any]:
        content = load(*args, **kwargs)
        if not isinstance(content, dict):
            raise ValueError("it holds no weights by name")
        return content

    return loaded


class Checkpointer(DetectionCheckpointer):
    """DetectionCheckpointer whose files are whole or not there, and that resumes from whole ones.

    It refuses weights of another architecture: upstream loads what fits and logs the rest, which
    trains a network from random weights after a typing error. Heads may differ (other classes); a
    backbone may not.

    Attributes:
        resumed_from: the checkpoint that training goes on from, or ''.
    """

    resumed_from = ""
    # What the model has and the file that was loaded last has not, in words; None: none was loaded.
    _unfit: Optional[List[str]] = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes a checkpoint that takes its name when all of it is on the disk.

        Raises:
            UserError: a weight is not finite, or the disk is full. Older checkpoints stay.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        for weight, value in self.model.named_parameters():
            if not value.isfinite().all():
                raise UserError(
                    f"training diverged: {weight} is not finite, checkpoint {name} is not written"
                    f"; {self.last_good()}"
                )
        if "://" in self.save_dir:  # remote storage
            return super().save(name, **kwargs)
        data = {key: value.state_dict() for key, value in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **data, **kwargs}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            atomic_save(data, path)
            self.tag_last_checkpoint(os.path.basename(path))
        except OSError as e:
            full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise UserError(
                f"checkpoint {path} cannot be written: {e.strerror}; {self.last_good()}. "
                f"{'Make room' if full else 'Look after OUTPUT_DIR'} and start again with --resume"
            ) from e

    def last_good(self) -> str:
        """Which checkpoint there is to go back to, in words."""
        path = self.get_checkpoint_file()
        return f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        # Upstream empties the file first; a run killed in that moment could not resume.
        if "://" in self.save_dir:  # remote storage
            return super().tag_last_checkpoint(last_filename_basename)
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as f:
            f.write(last_filename_basename)

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """As upstream, but resumes from the newest checkpoint that is intact.

        That is the one which ``last_checkpoint`` names, or else the one written last.

        Raises:
            UserError: there are checkpoints, but all are damaged.
        """
        self.resumed_from = self._newest_intact() if resume else ""
        if self.resumed_from:
            return self.load(self.resumed_from)
        return self.load(path, checkpointables=[])

    def earlier_checkpoints(self, iteration: int) -> List[str]:
        """Paths of the checkpoints before that of ``iteration`` but the final one, oldest first."""
        files = {p.stem: str(p) for p in self._files() if p.stem != "model_final"}
        iterations = sorted(int(name[len("model_") :]) for name in files)
        return [files[f"model_{i:07d}"] for i in iterations if i < iteration]

    def _files(self) -> List[Path]:
        found = Path(self.save_dir).glob("model_*.pth")
        return [p for p in found if _CHECKPOINT.fullmatch(p.name)]

    def _newest_intact(self) -> str:
        """The checkpoint to resume from, the same on every process, or ''."""
        if "://" in self.save_dir:
            return self.get_checkpoint_file() if self.has_checkpoint() else ""
        found, skipped = "", []
        if comm.is_main_process():
            found, skipped = self._search()
        found, skipped = comm.all_gather((found, skipped))[0]
        if skipped and not found:
            raise UserError(
                f"no checkpoint in {self.save_dir} is intact: {'; '.join(skipped)}. Start again "
                "without --resume"
            )
        if found and not os.path.isfile(found):
            raise UserError(
                f"checkpoint {found} is not on this machine: OUTPUT_DIR must be one folder that "
                "all machines share"
            )
        return found

    def _search(self) -> Tuple[str, List[str]]:
        """The checkpoint or '', and why others were skipped."""
        tagged = self.get_checkpoint_file()
        if self.checkpointables:  # to train on; an evaluation may look at a run that is going on
            for leftover in Path(self.save_dir).glob("*" + PARTIAL):
                leftover.unlink()
        files = sorted(map(str, self._files()), key=os.path.getmtime, reverse=True)
        skipped = []
        for path in dict.fromkeys([tagged, *files] if tagged else files):
            damage = self._damage(path)
            if not damage:
                return path, skipped
            self.logger.warning("Skipped checkpoint %s: %s", path, damage)
            skipped.append(f"{path}: {damage}")
        return "", skipped

    def _damage(self, path: str) -> str:
        """Why training cannot go on from a checkpoint, or ''."""
        try:
            content = safe_pickle.load_torch(path)
            missing = [k for k in ("model", *self.checkpointables) if k not in content]
            return f"it has no {missing[0]!r}" if missing else ""
        except OSError as e:
            return e.strerror
        except Exception as e:  # whatever reading a damaged file may raise
            return first_sentence(e)

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
            raise UserError(f"weights {path!r} cannot be read: {first_sentence(e)}") from e

    def load_to_evaluate(self, path: str, *, resume: bool = False) -> None:
        """As :meth:`resume_or_load`, for a model of which the file must have every weight.

        Raises:
            UserError: it lacks one, or has one of another shape, as heads of other classes; or
                there is no file.
        """
        self._unfit = None
        self.resume_or_load(path, resume=resume)
        if self._unfit is None:
            raise UserError(
                "evaluation without weights would use random ones (--eval-only): set MODEL.WEIGHTS "
                "to a checkpoint"
            )
        if self._unfit:
            more = f" (and {len(self._unfit) - 1} more)" if len(self._unfit) > 1 else ""
            raise UserError(
                f"weights {self._path!r} do not fit the model, and evaluation would use "
                f"random ones in their place: {self._unfit[0]}{more}; use the config that they "
                "were trained with (MODEL.ROI_HEADS.NUM_CLASSES, MODEL.MASK_ON), or train first"
            )

    def _load_file(self, filename: str):
        if filename.endswith(".safetensors"):
            content = {"model": read_weights(filename)}
        else:
            # A plain unpickler runs whatever a file asks it to.
            pickle = SimpleNamespace(load=_dict_of(safe_pickle.load))
            with exchanged("detectron2.checkpoint.detection_checkpoint:pickle", pickle):
                with exchanged("torch:load", _dict_of(safe_pickle.load_torch)):
                    content = super()._load_file(filename)
        weights = content["model"]
        if not isinstance(weights, dict) or not all(isinstance(k, str) for k in weights):
            raise UserError(f"weights {filename!r}: no names and tensors in it (MODEL.WEIGHTS)")
        # Upstream knows the key "model", and takes the whole content without it.
        inner = find_state_dict(weights)
        found = inner if inner.key else find_state_dict(content)
        if found.key != "model" or found.others:
            self.logger.info("Of %s, %s", self._path, found)
        content["model"] = found.weights
        return content

    def _load_model(self, checkpoint: Any):
        try:
            checkpoint["model"] = with_detector_names(self.model, checkpoint["model"])
        except UserError as e:
            raise UserError(f"weights {self._path!r} {e}") from None
        has_torchvisions_names = any(
            name.endswith("layer1.0.conv1.weight") for name in checkpoint["model"]
        )
        incompatible = super()._load_model(checkpoint)
        if incompatible is None:
            return incompatible
        missing, extra = incompatible.missing_keys, incompatible.unexpected_keys
        self._unfit = [
            f"{name} is of shape {tuple(there)} in the file and {tuple(here)} in the model"
            for name, there, here in incompatible.incorrect_shapes
        ]
        self._unfit += [
            f"the model has {name}, the file has not"
            for name in missing
            if not _NO_PART_OF_EVALUATION.search(name)
        ]
        unmatched = [k for k in [*missing, *extra] if _RESNET_WEIGHT.search(k)]
        unmatched += [k for k in missing if _RESNET_STATISTICS.search(k)]
        if unmatched or all(n in missing for n, _ in self.model.named_parameters()):
            if has_torchvisions_names:
                raise UserError(
                    f"weights {self._path!r} have the names of torchvision's or timm's ResNet: "
                    "turn them into a file for this model with refbn-d2 convert"
                )
            detail = f"{unmatched[0]} has no match" if unmatched else "no parameter matches"
            raise UserError(
                f"weights {self._path!r} are of another architecture: {detail}; set MODEL.WEIGHTS "
                "to a file for this model, or to '' to start from random weights"
            )
        for name, value in self.model.named_parameters():
            if not value.isfinite().all():
                raise UserError(f"weights {self._path!r} are not finite numbers: {name}")
        for name, norm in self.model.named_modules():
            if isinstance(norm, _NormBase) and norm.running_var is not None:
                if (norm.running_var == FOLDED_VAR).all() and not norm.running_mean.any():
                    raise UserError(
                        f"weights {self._path!r} have norms that are folded into affine maps "
                        f"({name}), for MODEL.RESNETS.NORM FrozenBN: a live norm needs the "
                        "statistics that they were folded with"
                    )
        return incompatible
