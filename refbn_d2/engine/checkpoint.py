"""Checkpoints that are written atomically, and errors for weights that do not fit the model."""

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
from ..io.coco import is_int
from ..modeling.timm_weights import with_detector_names
from ..upstream import exchanged
from ..weights import safe_pickle
from ..weights.files import atomic_save, find_state_dict, first_sentence, read_weights
from ..weights.folded import FOLDED_VAR

__all__ = ["Checkpointer"]

# Buffers that evaluation does not need. BatchNorm weights have no reference; RefBN then evaluates
# by its running statistics.
_NO_PART_OF_EVALUATION = re.compile(r"\.(ref_\w+|num_batches_tracked)$")

_CHECKPOINT = re.compile(r"model_(\d{7,}|final)\.pth")
_RESNET_WEIGHT = re.compile(r"res\d\.\d+\.(conv\d|shortcut)(\.norm)?\.weight$")
# If running_var is missing, BatchNorm was fused into the weights, and a norm that trains cannot
# start from them. If ref_mean or ref_var is missing, the reference is incomplete. (If the file has
# no reference at all, these keys are not reported as missing.)
_RESNET_STATISTICS = re.compile(
    r"res\d\.\d+\.(conv\d|shortcut)\.norm\.(running_var|ref_mean|ref_var)$"
)


def _dict_of(load: Callable[..., Any]) -> Callable[..., Dict[str, Any]]:
    """Wraps ``load`` so that it raises an error if the content of the file is not a dict."""

    def loaded(*args: Any, **kwargs: Any) -> Dict[str, Any]:
        content = load(*args, **kwargs)
        if not isinstance(content, dict):
            raise ValueError("it holds no weights by name")
        return content

    return loaded


class Checkpointer(DetectionCheckpointer):
    """DetectionCheckpointer that writes files atomically and skips damaged checkpoints.

    It raises an error for weights of another architecture. Upstream loads the weights that fit and
    logs the others, so that a typing error leads to training from random weights. The heads may
    differ (other classes), the backbone may not.

    Attributes:
        resumed_from: Path of the checkpoint from which training resumed, or ''.
        classes: Names of the data's classes by kind ("thing_classes", "stuff_classes"), in their
            order. They are saved with the weights, and compared with those of loaded weights.
    """

    resumed_from = ""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.classes: Dict[str, List[str]] = {}

    # Descriptions of the weights of the model that the last loaded file lacks or has in another
    # shape; None if no file was loaded.
    _unfit: Optional[List[str]] = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes a checkpoint atomically. Older checkpoints are kept if that fails.

        Raises:
            UserError: If a weight is not finite, or if the file cannot be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        for weight, value in self.model.named_parameters():
            if not value.isfinite().all():
                raise UserError(
                    f"training diverged: {weight} is not finite, checkpoint {name} is not written"
                    f"; {self.last_good()}"
                )
        if self.classes:
            kwargs["classes"] = self.classes
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
                f"{'Make room' if full else 'Check OUTPUT_DIR'} and start again with --resume"
            ) from e

    def last_good(self) -> str:
        """Describes the last good checkpoint, for an error message."""
        path = self.get_checkpoint_file()
        return f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"

    def get_checkpoint_file(self) -> str:
        try:
            return super().get_checkpoint_file()
        except UnicodeDecodeError:  # a damaged file names no checkpoint, as one that is missing
            return ""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        # Upstream truncates the file first; a run that is killed at that moment could not resume.
        if "://" in self.save_dir:  # remote storage
            return super().tag_last_checkpoint(last_filename_basename)
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as f:
            f.write(last_filename_basename)

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """Same as upstream, but resumes from the newest checkpoint that is intact.

        That is the one named in ``last_checkpoint``, or the most recent other one if it is damaged.

        Raises:
            UserError: If there are checkpoints but all are damaged, or if the classes of the
                resumed run are in another order than those of the data.
        """
        content = self._load_newest(path, resume)
        self._compare_classes(content, refuse=bool(self.resumed_from))
        return content

    def _load_newest(self, path: str, resume: bool) -> Dict[str, Any]:
        self.resumed_from = self._newest_intact() if resume else ""
        if self.resumed_from:
            return self.load(self.resumed_from)
        return self.load(path, checkpointables=[])

    def _compare_classes(self, content: Dict[str, Any], refuse: bool) -> None:
        """Compares the names of the classes that were saved with the weights with the data's.

        Without this check, weights for other classes of the same number would be loaded, and the
        predictions would get wrong names.

        Args:
            content: Content of the weights file.
            refuse: Whether the weights are used for these classes without training them first.

        Raises:
            UserError: If ``refuse`` is True and the classes are the same in another order. For
                other names, which may be synonyms, there is only a warning.
        """
        saved = content.get("classes")
        for kind, names in self.classes.items():
            there = saved.get(kind) if isinstance(saved, dict) else None
            if not isinstance(there, list) or there == names or len(there) != len(names):
                continue  # heads for another number of classes are reported with their shapes
            n, (a, b) = next((n, p) for n, p in enumerate(zip(there, names)) if p[0] != p[1])
            where = f"class {n} of weights {self._path!r} is {a!r}, that of the data {b!r}"
            if sorted(map(str, there)) != sorted(names):
                self.logger.warning("%s: are these the classes they were trained for?", where)
            elif refuse:
                raise UserError(
                    f"{where}: the same classes in another order; give the categories of the data "
                    "the order of ids that they had in training"
                )
            else:
                self.logger.warning("%s: their heads start from those of other classes", where)

    def earlier_checkpoints(self, iteration: int) -> List[str]:
        """Paths of the checkpoints before ``iteration``, without model_final, oldest first."""
        files = {p.stem: str(p) for p in self._files() if p.stem != "model_final"}
        iterations = sorted(int(name[len("model_") :]) for name in files)
        return [files[f"model_{i:07d}"] for i in iterations if i < iteration]

    def _files(self) -> List[Path]:
        found = Path(self.save_dir).glob("model_*.pth")
        return [p for p in found if _CHECKPOINT.fullmatch(p.name)]

    def _newest_intact(self) -> str:
        """Returns the path of the checkpoint to resume from, the same on every process, or ''."""
        if "://" in self.save_dir:
            return self.get_checkpoint_file() if self.has_checkpoint() else ""
        searched = self._search() if comm.is_main_process() else ("", [])
        found, skipped = comm.all_gather(searched)[0]
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
        """Returns the path of the newest intact checkpoint or '', and why others were skipped."""
        tagged = self.get_checkpoint_file()
        if self.checkpointables:  # in training; an evaluation may read the folder of a running run
            for leftover in Path(self.save_dir).glob("*" + PARTIAL):
                leftover.unlink()
        files = sorted(map(str, self._files()), key=os.path.getmtime, reverse=True)
        skipped: List[str] = []
        for path in dict.fromkeys([tagged, *files] if tagged else files):
            damage = self._damage(path)
            if not damage:
                return path, skipped
            self.logger.warning("Skipped checkpoint %s: %s", path, damage)
            skipped.append(f"{path}: {damage}")
        return "", skipped

    def _damage(self, path: str) -> str:
        """Returns why training cannot resume from a checkpoint, or '' if it can."""
        try:
            content = safe_pickle.load_torch(path)
            missing = [k for k in ("model", *self.checkpointables) if k not in content]
            if missing:
                return f"it has no {missing[0]!r}"
            # A trainer's state includes its iteration.
            for state in (content, *(content[k] for k in self.checkpointables)):
                iteration = state.get("iteration", 0) if isinstance(state, dict) else 0
                if not is_int(iteration) or iteration < 0:
                    return f"its iteration is {iteration!r}, not a whole number >= 0"
            return ""
        except OSError as e:
            return e.strerror or first_sentence(e)
        except Exception as e:  # a damaged file may raise any exception
            return first_sentence(e)

    def load(self, path: str, checkpointables=None) -> Dict[str, Any]:
        # Upstream accepts options after a question mark.
        if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise UserError(f"weights {path!r}: no such file (MODEL.WEIGHTS)")
        if "://" in (path or "") and ".." in path:
            # The address determines the path of the downloaded file below the cache folder.
            raise UserError(f"weights {path!r}: an address must not contain '..' (MODEL.WEIGHTS)")
        self._path = path
        try:
            return super().load(path, checkpointables)
        except UserError:
            raise
        except Exception as e:  # a damaged file may raise any exception
            raise UserError(f"weights {path!r} cannot be read: {first_sentence(e)}") from e
        finally:
            # Newer versions of detectron2 reset this only if a file could be read, and otherwise
            # refuse to load another one.
            self._parsed_url_during_load = None

    def load_to_evaluate(self, path: str, *, resume: bool = False) -> None:
        """Same as :meth:`resume_or_load`, but the file must contain every weight of the model.

        Raises:
            UserError: If there is no file, or if it lacks a weight or has one of another shape, for
                example in a head for other classes, or has the data's classes in another order.
        """
        self._unfit = None
        content = self._load_newest(path, resume)
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
        self._compare_classes(content, refuse=True)

    def _load_file(self, filename: str):
        if filename.endswith(".safetensors"):
            content = {"model": read_weights(filename)}
        else:
            # Python's own unpickler can execute code from the file.
            pickle = SimpleNamespace(load=_dict_of(safe_pickle.load))
            with exchanged("detectron2.checkpoint.detection_checkpoint:pickle", pickle):
                with exchanged("torch:load", _dict_of(safe_pickle.load_torch)):
                    content = super()._load_file(filename)
        # Upstream reads the key "model", or the whole content if there is no such key.
        try:
            inner = find_state_dict(content["model"])
            found = inner if inner.key else find_state_dict(content)
        except UserError as e:
            raise UserError(f"weights {filename!r}: {e} (MODEL.WEIGHTS)") from None
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
