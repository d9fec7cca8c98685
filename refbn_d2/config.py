"""Config keys of this package, safe loading of config files, and configuring a model's norms."""

import difflib
import itertools
import math
import os
import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from fvcore.common.config import BASE_KEY
from torch import nn

from .config_ranges import UPSTREAM_RANGES, Range, between, check_upstream_keys, one_of
from .errors import UserError
from .io import yaml as plain_yaml
from .norms.table import configure
from .upstream import exchanged

__all__ = [
    "KEYS",
    "Key",
    "add_refbn_config",
    "apply_norm_config",
    "keys_table",
    "load_config",
    "register_datasets",
    "write_docs",
]

# Limit for a chain of _BASE_ files, which would be endless if it were circular.
_MAX_FILES = 50


_COUNT = between(0, math.inf, "a whole number >= 0")
_SEED = between(0, 2**32 - 1, "a whole number >= 0 and below 2^32")
_ANY_TEXT = Range("text", lambda value: True)
_TRUTH = Range("True or False", lambda value: True)


@dataclass(frozen=True)
class Key:
    """One config key.

    Attributes:
        name: path of the key in the config, with dots.
        default: default value, which also determines the type.
        range: values that the key may have.
        doc: description in one or more sentences of Markdown.
    """

    name: str
    default: Any
    range: Range
    doc: str


KEYS: List[Key] = [
    Key(
        "MODEL.REFBN.PSEUDO_COUNT",
        1.0,
        between(0, math.inf, "a finite number >= 0"),
        "Weight k of the reference as a number of samples: lambda1 = k / (N + k) in a batch of N "
        "samples. The paper uses 1; 0 is BatchNorm.",
    ),
    Key(
        "MODEL.REFBN.REFERENCE.SEED",
        0,
        _SEED,
        "Seed that selects the training images of the reference batch and their augmentation. It "
        "is separate from `SEED`, so that runs with different seeds can have the same reference, "
        "and runs with the same seed different references.",
    ),
    Key(
        "MODEL.REFBN.REFERENCE.NUM_IMAGES",
        0,
        _COUNT,
        "Number of images in the reference batch, over all processes; 0 means "
        "`SOLVER.IMS_PER_BATCH`.",
    ),
    Key(
        "MODEL.REFBN.REFERENCE.REFRESH_PERIOD",
        0,
        _COUNT,
        "Number of iterations between recomputations of the reference statistics, from the same "
        "images with the current weights. 0: never, as in the paper's text; 1: in every iteration, "
        "the literal reading of its Algorithm 2.",
    ),
    Key(
        "MODEL.TIMM.NAME",
        "resnet50",
        _ANY_TEXT,
        "Name of the timm network in the backbones `build_timm_backbone` and "
        "`build_timm_fpn_backbone`. Its features are named `res1` (stride 2) to `res5` (stride "
        "32).",
    ),
    Key(
        "SOLVER.CHECKPOINT_MAX_TO_KEEP",
        3,
        _COUNT,
        "Number of newest checkpoints to keep, besides the final one; 0 keeps all.",
    ),
    Key(
        "DATALOADER.GROUPING_STRENGTH",
        0.0,
        between(0, 1, "0 to 1"),
        "With `SAMPLER_TRAIN: GroupedTrainingSampler`: the share of a batch that comes from one "
        "group of images, 0 (i.i.d.) to 1.",
    ),
    Key(
        "DATALOADER.GROUP_FIELD",
        "",
        _ANY_TEXT,
        "With `SAMPLER_TRAIN: GroupedTrainingSampler`: the field of a COCO image (or of a dataset "
        "dict) that contains its group, e.g. `camera`, `site` or `video`. By default the field "
        "`group` (or `style`) if an image has it, else the category with the most objects in the "
        "image.",
    ),
    Key(
        "TEST.COCO_BACKEND",
        "hotcoco",
        one_of("hotcoco", "pycocotools"),
        "Package that computes AP: `hotcoco` (seconds) or `pycocotools` (minutes on COCO val); "
        "both give the same numbers.",
    ),
    Key(
        "MODEL.CLASSIFIER.NUM_CLASSES",
        1000,
        between(1, math.inf, "a whole number > 0"),
        "Number of classes of `ImageClassifier` and `TorchvisionClassifier`.",
    ),
    Key(
        "MODEL.CLASSIFIER.LABEL_SMOOTHING",
        0.0,
        Range("0 to less than 1", lambda value: 0 <= value < 1),
        "The share of each label that the loss distributes evenly over all classes.",
    ),
    Key(
        "MODEL.CLASSIFIER.NETWORK",
        "resnet50",
        _ANY_TEXT,
        "Network of `TorchvisionClassifier`: `lenet5`, `vgg16_32x32`, the name of a torchvision "
        "classifier, or `timm/` followed by the name of a timm classifier.",
    ),
    Key(
        "MODEL.CLASSIFIER.NORM",
        "BN",
        _ANY_TEXT,
        "Norm that replaces each BatchNorm of the network; an empty string removes the norms.",
    ),
    Key(
        "MODEL.CLASSIFIER.CHANNELS_LAST",
        False,
        _TRUTH,
        "Whether to use the channels-last memory format, which is faster with "
        "`SOLVER.AMP.ENABLED` on a GPU.",
    ),
]


def add_refbn_config(cfg: CN) -> None:
    """Adds the keys of this package (KEYS) to a detectron2 config. NORM "RefBN" turns RefBN on.

    detectron2 builds norms without the config, so MODEL.REFBN has to be passed to them afterwards:
    ``refbn_d2.engine.Trainer`` does this; in your own trainer call :func:`apply_norm_config`.
    """
    for key in KEYS:
        node, (*parents, name) = cfg, key.name.split(".")
        for parent in parents:
            if parent not in node:
                node[parent] = CN()
            node = node[parent]
        node[name] = key.default
    # Name -> files of a data set, see register_datasets.
    cfg.DATASETS.REGISTER = CN(new_allowed=True)


def keys_table() -> str:
    """Returns the documentation of KEYS as a Markdown table."""
    rows = ["| key | default | values | |", "|---|---|---|---|"]
    for key in KEYS:
        default = f'"{key.default}"' if isinstance(key.default, str) else key.default
        rows.append(f"| `{key.name}` | `{default}` | {key.range.text} | {key.doc} |")
    return "\n".join(rows)


def write_docs(path: str) -> None:
    """Writes :func:`keys_table` between the two comments that mark its place in docs/config.md."""
    with open(path, encoding="utf-8") as f:
        head, rest = f.read().split("<!-- keys -->\n")
    tail = rest.split("<!-- end of keys -->")[1]
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"{head}<!-- keys -->\n{keys_table()}\n<!-- end of keys -->{tail}")


def load_config(path: str, opts: Optional[List[str]] = None) -> CN:
    """Reads a YAML file and ``KEY VALUE`` overrides into a detectron2 config with RefBN's keys.

    Unlike in detectron2, Python object tags in the YAML (or its ``_BASE_``) are refused, because
    they would execute code. The data sets of DATASETS.REGISTER are registered.

    Args:
        path: path of the file; "" for the defaults.
        opts: keys and values in turn.

    Raises:
        UserError: if the file is missing or not plain YAML, a key is unknown, or a value is
            invalid.
    """
    cfg = get_cfg()
    add_refbn_config(cfg)
    if path:
        content = _read_with_bases(path, path, itertools.count(1))
        _check_form(content, cfg, path)
        # merge_from_file also converts configs of older versions. Its own reader would execute
        # code.
        with exchanged("detectron2.config:CfgNode.load_yaml_with_base", lambda *_, **__: content):
            _merge(cfg, path, lambda: cfg.merge_from_file(path))
    _merge(cfg, "on the command line", lambda: cfg.merge_from_list(opts or []))
    check_upstream_keys(cfg)
    register_datasets(cfg)
    return cfg


_LONGEST = 10_000  # maximum number of characters of a string in a config


def _check_form(content: Dict[Any, Any], cfg: CN, where: str, prefix: str = "") -> None:
    """Raises a UserError that names the first key where the structure differs from ``cfg``.

    Keys that ``cfg`` lacks are checked later, by yacs: they may be valid keys of an older version
    of detectron2.
    """
    for key, value in content.items():
        if not isinstance(key, str):
            inside = f" in {prefix[:-1]}" if prefix else ""
            raise UserError(f"{where}: {key!r}{inside} is no key: the keys of a config are text")
        name = prefix + key
        if isinstance(value, str) and len(value) > _LONGEST:
            raise UserError(f"{where}: {name} is a text of more than {_LONGEST} characters")
        if key not in cfg:
            continue
        if isinstance(cfg[key], CN):
            if not isinstance(value, dict):
                kind = "empty" if value is None else f"{value!r:.80}"
                raise UserError(f"{where}: {name} is {kind}: it is a section, with keys below it")
            _check_form(value, cfg[key], where, f"{name}.")
        elif isinstance(value, dict):
            raise UserError(
                f"{where}: {name} is a section: it takes a value such as {cfg[key]!r:.80}"
            )
        elif name == "VERSION" and not isinstance(value, int):
            raise UserError(f"{where}: VERSION is {value!r}: use {cfg.VERSION}")


def _merge(cfg: CN, where: str, merge: Callable[[], None]) -> None:
    """Calls ``merge``, and raises a UserError that begins with ``where`` if a value is invalid."""
    try:
        merge()
        _check(cfg)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    except (RecursionError, MemoryError):  # from Python's parser, to which yacs passes every string
        raise UserError(f"{where}: a value is nested too deeply") from None
    except (AttributeError, TypeError) as e:  # a section where a value belongs, or the reverse
        raise UserError(f"{where}: not of the form of a detectron2 config ({e})") from None
    except (KeyError, AssertionError, ValueError, OSError) as e:
        message = str(e.args[0]) if isinstance(e, KeyError) else str(e)
        raise UserError(f"{where}: {_explained(cfg, message)}") from None


def _read_with_bases(path: str, first: str, count: Iterator[int]) -> Dict[str, Any]:
    """Reads a config file and merges it into its ``_BASE_``. Each file is read once.

    Args:
        path: path of the file.
        first: path of the file that the user named, for error messages.
        count: counter of the files that were read.
    """
    try:
        if "://" in path:
            raise UserError(f"{path}: is not on this machine: download it, and use its path")
        if next(count) > _MAX_FILES:
            raise UserError(f"{BASE_KEY} leads back to itself, or to too many files")
        content = plain_yaml.read(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: is no config, but a {type(content).__name__}")
        named = content.pop(BASE_KEY, [])
        bases = named if isinstance(named, list) else [named]
        if not all(isinstance(b, str) for b in bases):
            raise UserError(f"{path}: {BASE_KEY} is {named!r}: use the path of a config")
        _make_paths_absolute(content, path)
    except UserError as e:
        raise UserError(f"{first}: {e}" if first not in str(e) else str(e)) from None
    merged: Dict[str, Any] = {}
    for base in bases:
        # Relative to the file that names it; join keeps an absolute path as it is.
        inner = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        _put_over(_read_with_bases(base if "://" in base else inner, first, count), merged, first)
    _put_over(content, merged, first)
    return merged


def _put_over(content: Dict[str, Any], base: Dict[str, Any], where: str) -> None:
    """Overwrites the values of a base, in place, with those of the config."""
    for key, value in content.items():
        if isinstance(value, dict) and key in base:
            if not isinstance(base[key], dict):
                raise UserError(f"{where}: {key} is a section, and a value in its {BASE_KEY}")
            _put_over(value, base[key], where)
        else:
            base[key] = value


def _explained(cfg: CN, message: str) -> str:
    """Rewrites a message of yacs: an unknown key is reported with the most similar known key."""
    if "<class 'float'> vs. <class 'int'>" in message:
        return f"{message}; write the number with a decimal point"
    found = re.search(r"Non-existent (?:config )?key: ([\w.]+)", message)
    if not found:
        return message
    keys = list(_flat_keys(cfg))
    close = difflib.get_close_matches(found[1], keys, n=1)
    return f"unknown config key {found[1]}" + (f"; did you mean {close[0]}?" if close else "")


def _flat_keys(node: CN, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CN):
            yield from _flat_keys(value, f"{prefix}{key}.")


def _check(cfg: CN) -> None:
    for name, allowed in {**{key.name: key.range for key in KEYS}, **UPSTREAM_RANGES}.items():
        value = cfg
        for part in name.split("."):
            value = value[part]
        if not allowed.holds(value):
            shown = repr(value) if isinstance(value, str) else value
            raise UserError(f"{name} is {shown}: use {allowed.text}")
    # detectron2's AMPTrainer uses torch.cuda.amp.
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError(
            f"SOLVER.AMP.ENABLED is True with MODEL.DEVICE {cfg.MODEL.DEVICE}: it needs a GPU of "
            "CUDA; set it to False"
        )
    for name, entry in cfg.DATASETS.REGISTER.items():
        if not isinstance(entry, dict) or sorted(entry) != sorted(_ENTRY):
            raise UserError(
                f"DATASETS.REGISTER.{name} is {entry!r}: use {{JSON: annotations in COCO format, "
                "IMAGES: the folder that its file names are in}}"
            )
        for key in _ENTRY:
            if not isinstance(entry[key], str) or not entry[key]:
                raise UserError(f"DATASETS.REGISTER.{name}.{key} is {entry[key]!r}: use a path")


_ENTRY = ("JSON", "IMAGES")


def _make_paths_absolute(content: Dict[str, Any], path: str) -> None:
    """Resolves the paths of DATASETS.REGISTER, which are relative to their file, as _BASE_ is."""
    datasets = content.get("DATASETS")
    entries = datasets.get("REGISTER") if isinstance(datasets, dict) else None
    for entry in entries.values() if isinstance(entries, dict) else ():
        for key in _ENTRY if isinstance(entry, dict) else ():
            if isinstance(entry.get(key), str) and entry[key]:
                inner = os.path.expanduser(os.path.expandvars(entry[key]))
                entry[key] = os.path.abspath(os.path.join(os.path.dirname(path), inner))


def register_datasets(cfg: CN) -> None:
    """Registers the data sets of DATASETS.REGISTER with detectron2.

    Each process of a run has to call this. If an earlier config registered a name with other
    files, the name now refers to the files of ``cfg``.

    Raises:
        UserError: if a name belongs to a data set that was not registered by a config.
    """
    for name, entry in cfg.DATASETS.REGISTER.items():
        paths = tuple(entry[key] for key in _ENTRY)
        if name in DatasetCatalog.list():
            before = _REGISTERED.get(name)
            if before is None or before[1] is not DatasetCatalog[name]:
                raise UserError(
                    f"DATASETS.REGISTER.{name}: a data set of this name exists already; choose "
                    "another name"
                )
            if before[0] == paths:
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_coco_instances(name, {}, *paths)
        _REGISTERED[name] = paths, DatasetCatalog[name]


# What register_datasets has registered: name -> (paths, the function in the catalog).
_REGISTERED: Dict[str, Any] = {}


def apply_norm_config(model: nn.Module, cfg: CN) -> nn.Module:
    """Passes the config to the norms of ``model``, because get_norm builds them without it."""
    configure(model, cfg)
    return model
