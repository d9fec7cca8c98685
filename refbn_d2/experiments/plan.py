"""What running a matrix takes: its steps, the data they need, and about how long they take."""

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

# Images a second that one V100 trains on, as published for eight of them. detectron2's model zoo,
# Mask R-CNN R50-C4 1x with FrozenBN: 0.584 s for 16 images. NVIDIA's DeepLearningExamples, PyTorch
# ResNet-50 in large batches: 2,855 images a second in float32, 8,322 in mixed precision.
_DETECTOR_RATE = 16 / 0.584 / 8
_CLASSIFIER_RATE = {False: 2855 / 8, True: 8322 / 8}


@dataclass(frozen=True)
class PlannedTraining:
    """One training of a matrix.

    Attributes:
        what: in words.
        folder: of the run.
        images: that it trains on, each time it sees one counted.
        v100_hours: GPU hours of a full-size network on V100s, by published throughputs.
        finished: whether the output folder holds its result.
    """

    what: str
    folder: Path
    images: int
    v100_hours: float
    finished: bool


def planned_trainings(specs: List[RunSpec], output: Path) -> List[PlannedTraining]:
    """The steps of ``run_matrix``, in its order."""
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
    """Makes sure that data sets and weights are there before hours are spent.

    Weights behind a URL are downloaded, to where detectron2 keeps them.

    Raises:
        UserError: naming the first that is not.
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
        except Exception as e:  # whatever a download may raise
            raise UserError(f"weights {path} cannot be had: {e} (MODEL.WEIGHTS)") from None
        if not found:
            raise UserError(f"weights {path}: no such file (MODEL.WEIGHTS)")


def _check_data_set(name: str) -> None:
    with dataset_errors([name]):
        metadata = MetadataCatalog.get(name)
        json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
        if not json_file or not Path(json_file).exists():
            DatasetCatalog.get(name)  # says what is missing, or generates it
        if image_root and not Path(image_root).exists():
            raise FileNotFoundError(None, None, image_root)
