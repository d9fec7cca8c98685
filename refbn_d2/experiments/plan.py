"""Plans a matrix: its trainings, their estimated time, and a check of the data that they need."""

from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import load_config
from ..data.errors import dataset_errors
from ..errors import UserError
from .matrix import RunSpec
from .runner import is_finished, is_pretrained

__all__ = ["PlannedTraining", "check_data", "planned_trainings"]

# Training images per second of one V100, from published numbers for eight. detectron2's model zoo,
# Mask R-CNN R50-C4 1x with FrozenBN: 0.584 s for 16 images. NVIDIA's DeepLearningExamples, PyTorch
# ResNet-50 in large batches: 2,855 images a second in float32, 8,322 in mixed precision.
_DETECTOR_RATE = 16 / 0.584 / 8
_CLASSIFIER_RATE = {False: 2855 / 8, True: 8322 / 8}


@dataclass(frozen=True)
class PlannedTraining:
    """One training of a matrix.

    Attributes:
        what: Description of the training.
        folder: Folder of the run.
        images: Number of training images, counted once for each use (iterations x batch size).
        v100_hours: Estimated GPU hours of a full-size network on V100s, by published throughputs.
        finished: Whether the output folder contains its result.
    """

    what: str
    folder: Path
    images: int
    v100_hours: float
    finished: bool


def planned_trainings(specs: List[RunSpec], output: Path) -> List[PlannedTraining]:
    """Returns the trainings of ``run_matrix``, in the order in which they run.

    Args:
        specs: Runs of the matrix.
        output: Output folder of the matrix.
    """
    found = []
    stages: Dict[Path, RunSpec] = {c.classifier_folder: c for c in specs if c.classifier}
    for folder, spec in stages.items():
        cfg = load_config(spec.classifier, spec.classifier_opts())
        what = f"pretrain {spec.pretrained}, seed {spec.classifier_seed}, and convert"
        done = is_pretrained(spec, output)
        rate = _CLASSIFIER_RATE[cfg.SOLVER.AMP.ENABLED]
        found.append(_planned(what, output / folder, cfg, rate, done))
    for spec in specs:
        cfg = load_config(spec.config, spec.detector_opts())
        protocol = f" ({spec.protocol})" if spec.protocol else ""
        what = f"train detector {spec.name}{protocol}, seed {spec.seed}"
        found.append(
            _planned(what, output / spec.folder, cfg, _DETECTOR_RATE, is_finished(spec, output))
        )
    return found


def _planned(what: str, folder: Path, cfg: CfgNode, rate: float, finished: bool) -> PlannedTraining:
    images = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
    return PlannedTraining(what, folder, images, images / rate / 3600, finished)


def check_data(specs: List[RunSpec]) -> None:
    """Checks before any training that all data sets and weights exist.

    Weights at a URL are downloaded to detectron2's cache.

    Args:
        specs: Runs of the matrix.

    Raises:
        UserError: If a data set or a weights file is missing; the message names the first.
    """
    configs = {(c.config, *c.detector_opts()): not c.classifier for c in specs}
    configs.update({(c.classifier, *c.classifier_opts()): True for c in specs if c.classifier})
    names: Dict[str, None] = {}
    weights: Dict[str, None] = {}
    for (file, *opts), reads_weights in configs.items():
        cfg = load_config(file, opts)
        names.update(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))
        if reads_weights and cfg.MODEL.WEIGHTS:
            weights[cfg.MODEL.WEIGHTS] = None
    for name in names:
        _check_data_set(name)
    for path in weights:
        try:
            found = Path(PathManager.get_local_path(path)).is_file()
        except Exception as e:  # a download may raise any exception
            raise UserError(f"weights {path} cannot be read: {e} (MODEL.WEIGHTS)") from None
        if not found:
            raise UserError(f"weights {path}: no such file (MODEL.WEIGHTS)")


def _check_data_set(name: str) -> None:
    with dataset_errors([name]):
        metadata = MetadataCatalog.get(name)
        json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
        if not json_file or not Path(json_file).exists():
            DatasetCatalog.get(name)  # raises an error that names the file, or generates it
        if image_root and not Path(image_root).exists():
            raise FileNotFoundError(None, None, image_root)
