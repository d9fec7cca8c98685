"""A matrix of experiments: norms x seeds x images per batch x grouping of batches."""

import hashlib
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from ..config import load_config
from ..config_files import config_names, get_config_file
from ..errors import UserError
from ..io import yaml as plain_yaml
from ..io.coco import is_int, is_number
from ..registry import known_norms

__all__ = ["RunSpec", "check_seeds", "load_matrix"]

_KEYS = {"DETECTOR", "CLASSIFIER", "NORMS", "SEEDS", "IMS_PER_BATCH", "GROUPING_STRENGTH", "OPTS"}
_KEYS |= {"CLASSIFIER_OPTS", "PRETRAINING_SEED", "PROTOCOL"}


@dataclass(frozen=True)
class RunSpec:
    """Specification of one run of a matrix: a detector, and the pretraining that it starts from.

    Attributes:
        name: Name under which its results are reported.
        norm: Norm type of the detector's backbone, as in NORM.
        pretrained: Norm type with which the backbone was pretrained.
        seed: SEED of the training, and of the pretraining unless ``pretraining_seed`` is set.
        config: Path of the detector's config.
        classifier: Path of the pretraining's config, or None to start from MODEL.WEIGHTS.
        ims_per_batch: SOLVER.IMS_PER_BATCH, the number of images per batch on all processes.
        grouping: DATALOADER.GROUPING_STRENGTH, 0 for i.i.d. batches.
        opts: KEY VALUE pairs for the detector, including its norm.
        pretraining_opts: KEY VALUE pairs for the pretraining, including its norm.
        protocol: Name of the protocol of the comparison; only runs of the same protocol are
            compared. May be empty.
        pretraining_seed: SEED of a pretraining that runs of all seeds share, or None.
    """

    name: str
    norm: str
    pretrained: str
    seed: int
    config: str
    classifier: Optional[str]
    ims_per_batch: int
    grouping: float
    opts: Tuple[str, ...]
    pretraining_opts: Tuple[str, ...] = ()
    protocol: str = ""
    pretraining_seed: Optional[int] = None

    @property
    def folder(self) -> Path:
        """Path of the run's folder, relative to the output folder."""
        condition = f"batch{self.ims_per_batch}_grouping{self.grouping:g}"
        return Path(
            _folder_name(self.protocol), _folder_name(self.name), condition, f"seed{self.seed}"
        )

    @property
    def classifier_seed(self) -> int:
        """SEED of the pretraining."""
        return self.seed if self.pretraining_seed is None else self.pretraining_seed

    @property
    def classifier_folder(self) -> Path:
        return Path("pretraining", _folder_name(self.pretrained), f"seed{self.classifier_seed}")

    def detector_opts(self) -> List[str]:
        """KEY VALUE pairs for the detector's config.

        If the batch size differs from the config's, the learning rate is scaled in proportion and
        the schedule inversely, as with SOLVER.REFERENCE_WORLD_SIZE, so that every run trains on the
        same number of images.
        """
        cfg = load_config(self.config, list(self.opts))
        solver = cfg.SOLVER
        scale = self.ims_per_batch / solver.IMS_PER_BATCH
        opts = ["SEED", self.seed, "SOLVER.IMS_PER_BATCH", self.ims_per_batch]
        opts += ["SOLVER.BASE_LR", solver.BASE_LR * scale]
        opts += ["SOLVER.REFERENCE_WORLD_SIZE", 0]  # detectron2 would scale a second time
        for key, steps in (
            ("SOLVER.MAX_ITER", solver.MAX_ITER),
            ("SOLVER.WARMUP_ITERS", solver.WARMUP_ITERS),
            ("SOLVER.CHECKPOINT_PERIOD", solver.CHECKPOINT_PERIOD),
            ("TEST.EVAL_PERIOD", cfg.TEST.EVAL_PERIOD),
        ):
            opts += [key, max(1, round(steps / scale)) if steps else 0]  # 0 switches it off
        opts += ["SOLVER.STEPS", tuple(round(s / scale) for s in solver.STEPS)]
        if self.grouping > 0:
            opts += ["DATALOADER.SAMPLER_TRAIN", "GroupedTrainingSampler"]
        opts += ["DATALOADER.GROUPING_STRENGTH", self.grouping]
        return [*self.opts, *map(str, opts)]

    @property
    def pretraining(self) -> Tuple[Optional[str], ...]:
        return (self.classifier, *self.pretraining_opts)

    def classifier_opts(self) -> List[str]:
        """KEY VALUE pairs for the classifier's config."""
        return [*self.pretraining_opts, "SEED", str(self.classifier_seed)]

    def settings(self) -> Dict[str, Optional[str]]:
        """Hashes of both configs with their bases, which determine the result besides the code."""
        pretraining = self.classifier and _fingerprint(self.classifier, self.classifier_opts())
        return {
            "detector": _fingerprint(self.config, self.detector_opts()),
            "pretraining": pretraining,
        }


def _folder_name(name: str) -> str:
    """Converts a name to a valid folder name, which cannot point outside the parent folder."""
    return re.sub(r"[^\w.=-]+|^\.+", "_", name)


def _fingerprint(config: str, opts: List[str]) -> str:
    return hashlib.sha256(load_config(config, opts).dump().encode()).hexdigest()[:16]


def load_matrix(path: str) -> List[RunSpec]:
    """Reads a matrix file, which contains one product of axes or a list of products.

    The keys of a product are:

    * DETECTOR, CLASSIFIER (optional): config files whose norm is replaced; paths are relative to
      the matrix file.
    * NORMS: list of norm types or of {name, norm, pretrained, opts}.
    * SEEDS, IMS_PER_BATCH, GROUPING_STRENGTH: lists of values; default: 1, and the config's own.
    * OPTS, CLASSIFIER_OPTS: KEY VALUE pairs for all runs and for all pretraining.
    * PRETRAINING_SEED: seed of one pretraining for all seeds.
    * PROTOCOL: name of the product if there are several.

    Args:
        path: Path of the YAML file.

    Raises:
        UserError: If the file is missing or malformed, or names a config or a norm that does not
            exist.
    """
    matrix = plain_yaml.read(path)
    specs = []
    for part in matrix if isinstance(matrix, list) else [matrix]:
        if not isinstance(part, dict) or not {"DETECTOR", "NORMS"} <= set(part) <= _KEYS:
            keys = ", ".join(sorted(_KEYS))
            raise UserError(f"matrix {path}: needs DETECTOR and NORMS, and may have {keys}")
        _check_part(path, part)
        specs += _specs(path, part)
    if not specs:
        raise UserError(f"matrix {path}: has no runs: name at least one norm and one of each axis")
    folders = [c.folder for c in specs]
    if len(set(folders)) < len(folders):
        raise UserError(
            f"matrix {path}: two runs have the same protocol, name, seed, batch and grouping"
        )
    stages: Dict[Path, RunSpec] = {}
    for spec in (c for c in specs if c.classifier):
        first = stages.setdefault(spec.classifier_folder, spec)
        if first.pretraining != spec.pretraining:
            raise UserError(
                f"matrix {path}: {spec.pretrained} is pretrained in two ways; use two matrices"
            )
    return specs


# Condition for the values of each axis, and its description for an error message.
_AXES: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    "SEEDS": (lambda v: is_int(v) and 0 <= v < 2**31, "whole numbers from 0 to 2**31 - 1"),
    "IMS_PER_BATCH": (lambda v: is_int(v) and v > 0, "whole numbers > 0"),
    "GROUPING_STRENGTH": (lambda v: is_number(v) and 0 <= v <= 1, "numbers from 0 to 1"),
}
_MAX_RUNS = 10_000
_TEXTS = ("name", "norm", "pretrained")  # of an item of NORMS
# Names become names of folders.
_LONGEST = 255
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises a UserError if one of the values of --seeds cannot be the seed of a run."""
    is_seed, words = _AXES["SEEDS"]
    for seed in seeds:
        if not is_seed(seed):
            raise UserError(f"--seeds {seed}: use {words}")


def _check_part(path: str, part: Dict[str, Any]) -> None:
    """Raises a UserError that names the first key with an invalid value."""
    for key, (is_right, words) in _AXES.items():
        values = part.get(key, [])
        if not isinstance(values, list) or not all(map(is_right, values)):
            raise UserError(f"matrix {path}: {key} is {values!r}: use a list of {words}")
    is_seed, words = _AXES["SEEDS"]
    if not is_seed(part.get("PRETRAINING_SEED", 0)):
        value = part["PRETRAINING_SEED"]
        raise UserError(f"matrix {path}: PRETRAINING_SEED is {value!r}: use one of the {words}")
    for key in ("DETECTOR", "CLASSIFIER"):
        if not isinstance(part.get(key, ""), str):
            raise UserError(f"matrix {path}: {key} is {part[key]!r}: use the path of a config")
    entries = part["NORMS"]
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise UserError(
            f"matrix {path}: NORMS is {entries!r}: use a list of norm types or of "
            "{name, norm, pretrained, opts}"
        )
    if not isinstance(part.get("PROTOCOL", ""), str):
        raise UserError(f"matrix {path}: PROTOCOL is {part['PROTOCOL']!r}: use a name")
    named = [e["name"] for e in entries if isinstance(e, dict) and "name" in e]
    for name in [part.get("PROTOCOL", ""), *named]:
        if _SURROGATE.search(name) or len(name.encode()) > _LONGEST:
            raise UserError(
                f"matrix {path}: {name!r:.60} is no name: use text of at most {_LONGEST} bytes"
            )
    for opts in [
        part.get("OPTS", []),
        part.get("CLASSIFIER_OPTS", []),
        *(e.get("opts", []) for e in entries if isinstance(e, dict)),
    ]:
        if not isinstance(opts, list):
            raise UserError(f"matrix {path}: options are {opts!r}: use a list [KEY, VALUE, ...]")
        if "OUTPUT_DIR" in opts:
            raise UserError(f"matrix {path}: OUTPUT_DIR is not an option here: use --output")
    runs = math.prod(len(part.get(key, [0])) for key in (*_AXES, "NORMS"))
    if runs > _MAX_RUNS:
        raise UserError(f"matrix {path}: has {runs} runs: use at most {_MAX_RUNS}")


def _is_entry(entry: Any) -> bool:
    """Whether an item of NORMS is a norm type, or {name, norm, pretrained, opts}."""
    if isinstance(entry, str):
        return True
    if not isinstance(entry, dict) or not {"norm"} <= set(entry) <= {"opts", *_TEXTS}:
        return False
    return all(isinstance(entry.get(k, "x"), str) for k in _TEXTS) and entry.get("name") != ""


def _specs(path: str, matrix: Dict[str, Any]) -> List[RunSpec]:
    detector = _config_file(path, "DETECTOR", matrix["DETECTOR"])
    classifier = None
    if "CLASSIFIER" in matrix:
        classifier = _config_file(path, "CLASSIFIER", matrix["CLASSIFIER"])
    variants = []
    for entry in matrix["NORMS"]:
        entry = {"norm": entry} if isinstance(entry, str) else entry
        norm, pretrained = entry["norm"], entry.get("pretrained", entry["norm"])
        options = [*matrix.get("OPTS", []), *entry.get("opts", [])]
        opts = _with_norm(path, detector, options, norm)
        pretraining_opts: Tuple[str, ...] = ()
        if classifier:
            options = matrix.get("CLASSIFIER_OPTS", [])
            pretraining_opts = _with_norm(path, classifier, options, pretrained)
        variant = {
            "name": entry.get("name", norm or "none"),
            "norm": norm,
            "pretrained": pretrained,
            "opts": opts,
            "pretraining_opts": pretraining_opts,
        }
        cfg = load_config(detector, list(opts))
        batch = cfg.SOLVER.IMS_PER_BATCH
        if batch < 1:
            raise UserError(f"matrix {path}: SOLVER.IMS_PER_BATCH is {batch}: use at least 1")
        grouped = cfg.DATALOADER.SAMPLER_TRAIN == "GroupedTrainingSampler"
        variants.append((variant, batch, cfg.DATALOADER.GROUPING_STRENGTH if grouped else 0.0))
    axes = itertools.product(
        matrix.get("SEEDS", [1]),
        matrix.get("GROUPING_STRENGTH", [None]),
        matrix.get("IMS_PER_BATCH", [None]),
        variants,
    )
    return [
        RunSpec(
            seed=int(seed),
            config=detector,
            classifier=classifier,
            ims_per_batch=int(ims_per_batch or own_batch),
            grouping=float(own_grouping if grouping is None else grouping),
            protocol=matrix.get("PROTOCOL", ""),
            pretraining_seed=matrix.get("PRETRAINING_SEED"),
            **variant,
        )
        for seed, grouping, ims_per_batch, (variant, own_batch, own_grouping) in axes
    ]


def _config_file(path: str, key: str, name: str) -> str:
    """The config that a matrix names: a file relative to the matrix, or a shipped config."""
    file = Path(path).parent / name
    if file.is_file():
        return str(file)
    if name in config_names():
        return get_config_file(name)
    hint = "; give one config file, the norm is set in it" if "{" in name else ""
    raise UserError(f"matrix {path}: {key}: {file} does not exist{hint}")


def _with_norm(path: str, config: str, opts: List[Any], norm: str) -> Tuple[str, ...]:
    """Appends the KEY VALUE pair that sets the norm of the config's backbone to ``opts``."""
    if norm and norm not in known_norms():
        raise UserError(
            f"matrix {path}: unknown norm {norm!r}: known are {', '.join(known_norms())}"
        )
    own_network = load_config(config).MODEL.META_ARCHITECTURE == "TorchvisionClassifier"
    key = "MODEL.CLASSIFIER.NORM" if own_network else "MODEL.RESNETS.NORM"
    if key in opts:
        raise UserError(f"matrix {path}: {key} is not an option here: use NORMS")
    return (*map(str, opts), key, norm)
