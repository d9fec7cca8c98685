"""The keys of MODEL.REFBN, loading a config file safely, and giving a model what it says."""

import difflib
import itertools
import math
import re
from typing import Callable, List, Optional

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY
from torch import nn

from .errors import UserError
from .io import yaml as plain_yaml
from .norms.table import configure

__all__ = ["add_refbn_config", "apply_norm_config", "load_config"]

# A chain of _BASE_ is a few files long; one that leads back to itself has no end.
_MAX_FILES = 50


def add_refbn_config(cfg: CN) -> None:
    """Adds the keys of this package to a detectron2 config. NORM "RefBN" turns RefBN on.

    A norm is built without seeing the config: MODEL.REFBN reaches it through
    ``refbn_d2.engine.Trainer``, or :func:`apply_norm_config` in a trainer of your own.
    """
    _C = cfg
    _C.MODEL.REFBN = CN()
    # Weight of the reference in samples: lambda1 = k / (N + k). The paper's is 1; 0 is BatchNorm.
    _C.MODEL.REFBN.PSEUDO_COUNT = 1.0

    _C.MODEL.REFBN.REFERENCE = CN()
    # Which training images (and augmentations) are the reference batch. A seed of its own, so that
    # runs with different SEED can share a reference and runs with one SEED can differ in it.
    _C.MODEL.REFBN.REFERENCE.SEED = 0
    # Size of the reference batch in images, over all processes; 0 is SOLVER.IMS_PER_BATCH.
    _C.MODEL.REFBN.REFERENCE.NUM_IMAGES = 0
    # Take the reference again from the same images every so many iterations, as the network learns;
    # 0 never does (the paper's text), 1 is the literal reading of its Algorithm 2.
    _C.MODEL.REFBN.REFERENCE.REFRESH_PERIOD = 0

    # How many of the newest checkpoints stay on the disk, besides the final one; 0 keeps all.
    _C.SOLVER.CHECKPOINT_MAX_TO_KEEP = 3

    # For SAMPLER_TRAIN "GroupedTrainingSampler": the share of a batch that comes from one group
    # (style or main category), 0 (i.i.d.) to 1.
    _C.DATALOADER.GROUPING_STRENGTH = 0.0

    # What computes AP: "hotcoco" (seconds) or "pycocotools" (minutes on COCO val), same numbers.
    _C.TEST.COCO_BACKEND = "hotcoco"

    # Of the meta-architectures ImageClassifier and TorchvisionClassifier.
    _C.MODEL.CLASSIFIER = CN()
    _C.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    # The share of each label that the loss spreads over all classes, in [0, 1).
    _C.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0
    # Of TorchvisionClassifier: "lenet5", "vgg16_32x32", or the name of one of torchvision's
    # classifiers, or "timm/" and that of one of timm.
    _C.MODEL.CLASSIFIER.NETWORK = "resnet50"
    # Takes the place of each BatchNorm of the network; "" leaves none.
    _C.MODEL.CLASSIFIER.NORM = "BN"
    # Pixels before channels in memory: faster with SOLVER.AMP.ENABLED on a GPU.
    _C.MODEL.CLASSIFIER.CHANNELS_LAST = False


def load_config(path: str, opts: Optional[List[str]] = None) -> CN:
    """Reads a YAML file and ``KEY VALUE`` overrides into a detectron2 config with RefBN's keys.

    Unlike detectron2's default, Python object tags in the YAML (or its ``_BASE_``) are refused:
    they would run code.

    Raises:
        UserError: the file is missing or not plain YAML, a key is unknown, a value is bad.
    """
    cfg = get_cfg()
    add_refbn_config(cfg)
    if path:
        _check_files(path)
        _merge(cfg, path, lambda: cfg.merge_from_file(path, allow_unsafe=False))
    _merge(cfg, "on the command line", lambda: cfg.merge_from_list(opts or []))
    return cfg


def _merge(cfg: CN, where: str, merge: Callable[[], None]) -> None:
    """Raises a UserError that begins with ``where`` if ``merge`` gives ``cfg`` a bad value."""
    try:
        merge()
        _check(cfg)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    except (RecursionError, MemoryError):  # of Python's parser, which yacs gives every text
        raise UserError(f"{where}: a value is nested too deeply") from None
    except (AttributeError, TypeError) as e:  # a section where a value belongs, or the reverse
        raise UserError(f"{where}: not of the form of a detectron2 config ({e})") from None
    except (KeyError, AssertionError, ValueError, OSError) as e:
        message = str(e.args[0]) if isinstance(e, KeyError) else str(e)
        raise UserError(f"{where}: {_explained(cfg, message)}") from None


def _check_files(path: str) -> None:
    """Raises a UserError unless ``path`` and all that its ``_BASE_`` leads to are plain YAML."""
    count = itertools.count(1)

    class Reader(CN):
        @classmethod
        def _open_cfg(cls, filename: str):
            if next(count) > _MAX_FILES:
                raise UserError(f"{path}: its _BASE_ leads back to itself, or to too many files")
            try:
                _check_file(filename)
            except UserError as e:
                raise UserError(f"{path}: {e}" if filename != path else str(e)) from None
            return super()._open_cfg(filename)

    Reader.load_yaml_with_base(path)


def _check_file(path: str) -> None:
    content = plain_yaml.read(PathManager.get_local_path(path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no config, but a {type(content).__name__}")
    bases = content.get(BASE_KEY, "")
    if not all(isinstance(b, str) for b in (bases if isinstance(bases, list) else [bases])):
        raise UserError(f"{path}: {BASE_KEY} is {bases!r}: use the path of a config")


def _explained(cfg: CN, message: str) -> str:
    """The message of yacs, with the likeliest key in place of an unknown one."""
    if "<class 'float'> vs. <class 'int'>" in message:
        return f"{message}; write the number with a decimal point"
    found = re.search(r"Non-existent (?:config )?key: ([\w.]+)", message)
    if not found:
        return message
    keys = list(_flat_keys(cfg))
    close = difflib.get_close_matches(found[1], keys, n=1)
    return f"unknown config key {found[1]}" + (f"; did you mean {close[0]}?" if close else "")


def _flat_keys(node: CN, prefix: str = ""):
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CN):
            yield from _flat_keys(value, f"{prefix}{key}.")


def _check(cfg: CN) -> None:
    refbn, reference = cfg.MODEL.REFBN, cfg.MODEL.REFBN.REFERENCE
    if not (math.isfinite(refbn.PSEUDO_COUNT) and refbn.PSEUDO_COUNT >= 0):
        raise UserError(
            f"MODEL.REFBN.PSEUDO_COUNT is {refbn.PSEUDO_COUNT}: use a finite number >= 0"
        )
    if not -1 <= cfg.SEED < 2**31:
        raise UserError(f"SEED is {cfg.SEED}: use a whole number >= 0, or -1 for a random one")
    if not 0 <= cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING < 1:
        raise UserError(
            f"MODEL.CLASSIFIER.LABEL_SMOOTHING is {cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING}: "
            "use 0 to less than 1"
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        raise UserError("SOLVER.AMP.ENABLED is True: it needs a GPU; without, set it to False")
    if not 0 <= cfg.DATALOADER.GROUPING_STRENGTH <= 1:
        raise UserError(
            f"DATALOADER.GROUPING_STRENGTH is {cfg.DATALOADER.GROUPING_STRENGTH}: use 0 to 1"
        )
    if cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP < 0:
        raise UserError(
            f"SOLVER.CHECKPOINT_MAX_TO_KEEP is {cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP}: use a whole "
            "number >= 0"
        )
    for key in ("SEED", "NUM_IMAGES", "REFRESH_PERIOD"):
        if not 0 <= reference[key] < 2**32:
            raise UserError(
                f"MODEL.REFBN.REFERENCE.{key} is {reference[key]}: use a whole number >= 0"
            )


def apply_norm_config(model: nn.Module, cfg: CN) -> nn.Module:
    """Gives the norms of ``model`` what the config says about them; get_norm does not see it."""
    configure(model, cfg)
    return model
