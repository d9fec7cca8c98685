"""Plans a matrix: its trainings, their estimated time, and a check of the data that they need."""

from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Optional

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import load_config
from ..data.errors import dataset_errors
from ..errors import UserError
from ..io.coco import is_number
from ..io.json import read_json
from .matrix import RunSpec
from .training import Training, trainings_of

__all__ = ["PlannedTraining", "check_data", "measured_rates", "planned_trainings"]

# Training images per second of one V100, from published numbers for eight. detectron2's model zoo,
# Mask R-CNN R50-C4 1x with FrozenBN: 0.584 s for 16 images. NVIDIA's DeepLearningExamples, PyTorch
# ResNet-50 in large batches: 2,855 images a second in float32, 8,322 in mixed precision.
_DETECTOR_RATE = 16 / 0.584 / 8
_CLASSIFIER_RATE = {False: 2855 / 8, True: 8322 / 8}


@dataclass(frozen=True)
class PlannedTraining:
    """One training of a matrix.

    Attributes:
        training: The training.
        images: Number of training images, counted once for each use (iterations x batch size).
        gpu_hours: Estimated GPU hours of a full-size network, from published throughputs of V100s
            or from the measured throughput of another GPU.
        finished: Whether the output folder contains its result.
    """

    training: Training
    images: int
    gpu_hours: float
    finished: bool


def measured_rates(file: Path) -> Dict[str, float]:
    """Reads how fast a GPU trains R50-C4 from the JSON file of ``make gpu-check``.

    Args:
        file: gpu_check.json.

    Returns:
        Training images per second of one GPU for the norms that were measured, BN among them.

    Raises:
        UserError: If the file is not from ``make gpu-check``, or from a rehearsal without a GPU.
    """
    report = read_json(file)
    if isinstance(report, dict) and report.get("quick"):
        raise UserError(
            f"{file}: a rehearsal, whose times mean nothing; run make gpu-check on a GPU"
        )
    try:
        rows = [r for r in report["parts"]["detectors"]["rows"] if r["detector"] == "R50-C4"]
        found = {r["norm"]: (r.get("images", 2), r["step (s)"]) for r in rows}
    except (KeyError, TypeError, AttributeError):
        found = {}
    numbers = [x for pair in found.values() for x in pair]
    if "BN" not in found or not all(is_number(x) and x > 0 for x in numbers):
        raise UserError(
            f"{file}: has no times of R50-C4; make gpu-check writes a file that has them"
        )
    return {norm: images / seconds for norm, (images, seconds) in found.items()}


def planned_trainings(
    specs: List[RunSpec], output: Path, rates: Optional[Mapping[str, float]] = None
) -> List[PlannedTraining]:
    """Returns the trainings of ``run_matrix``, in the order in which they run.

    Args:
        specs: Runs of the matrix.
        output: Output folder of the matrix.
        rates: Result of :func:`measured_rates`; None for published numbers. Pretraining is not
            measured: its published number is scaled by the ratio of the measured to the published
            number for the detector with BN.
    """
    return [_planned(training, output, rates) for training in trainings_of(specs)]


def _planned(
    training: Training, output: Path, rates: Optional[Mapping[str, float]]
) -> PlannedTraining:
    solver = load_config(training.config, training.opts()).SOLVER
    if training.is_pretraining:
        rate = _CLASSIFIER_RATE[solver.AMP.ENABLED]
        rate *= rates["BN"] / _DETECTOR_RATE if rates else 1.0
    else:
        rate = rates.get(training.spec.norm, rates["BN"]) if rates else _DETECTOR_RATE
    images = solver.MAX_ITER * solver.IMS_PER_BATCH
    return PlannedTraining(training, images, images / rate / 3600, training.is_finished(output))


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
