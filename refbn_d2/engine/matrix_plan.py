"""What running a matrix takes: its steps, the data they need, and about how long they take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import load_config
from ..errors import UserError
from .matrix import Cell
from .matrix_runner import is_finished, is_pretrained

__all__ = ["Step", "check_data", "steps"]

# Images a second that one V100 trains on, in float32, as published for eight of them:
# detectron2's MODEL_ZOO.md, Mask R-CNN R50-C4 1x with FrozenBN: 0.584 s for 16 images;
# NVIDIA's DeepLearningExamples, ResNet-50 v1.5 for PyTorch: 2,855 images a second.
_DETECTOR_RATE = 16 / 0.584 / 8
_CLASSIFIER_RATE = 2855 / 8


@dataclass(frozen=True)
class Step:
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


def steps(cells: List[Cell], output: Path) -> List[Step]:
    """The steps of ``run_matrix``, in its order."""
    found = []
    stages: Dict[Path, Cell] = {c.classifier_folder: c for c in cells if c.classifier}
    for folder, cell in stages.items():
        cfg = load_config(cell.classifier, cell.classifier_opts())
        what = f"pretrain {cell.pretrained}, seed {cell.seed}, and convert"
        done = is_pretrained(cell, output)
        found.append(_step(what, output / folder, cfg, _CLASSIFIER_RATE, done))
    for cell in cells:
        cfg = load_config(cell.config, cell.detector_opts())
        protocol = f" ({cell.protocol})" if cell.protocol else ""
        what = f"train detector {cell.name}{protocol}, seed {cell.seed}"
        found.append(
            _step(what, output / cell.folder, cfg, _DETECTOR_RATE, is_finished(cell, output))
        )
    return found


def _step(what: str, folder: Path, cfg: CfgNode, rate: float, finished: bool) -> Step:
    images = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
    return Step(what, folder, images, images / rate / 3600, finished)


def check_data(cells: List[Cell]) -> None:
    """Makes sure that data sets and weights are there before hours are spent.

    Weights behind a URL are downloaded, to where detectron2 keeps them.

    Raises:
        UserError: naming the first that is not.
    """
    configs = {(c.config, *c.detector_opts()): not c.classifier for c in cells}
    configs.update({(c.classifier, *c.classifier_opts()): True for c in cells if c.classifier})
    names: Dict[str, None] = {}
    weights: Dict[str, None] = {}
    for (file, *opts), reads_weights in configs.items():
        cfg = load_config(file, opts)
        names.update(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))
        if reads_weights and cfg.MODEL.WEIGHTS:
            weights[cfg.MODEL.WEIGHTS] = None
    for name in names:
        missing = _missing(name)
        if missing:
            raise UserError(
                f"data set {name}: {missing} does not exist; set DETECTRON2_DATASETS to the folder "
                "that holds coco/ and imagenet/ (docs/reproduce.md)"
            )
    for path in weights:
        try:
            found = Path(PathManager.get_local_path(path)).is_file()
        except Exception as e:  # whatever a download may raise
            raise UserError(f"weights {path} cannot be had: {e}") from None
        if not found:
            raise UserError(f"weights {path}: no such file (MODEL.WEIGHTS)")


def _missing(name: str) -> Optional[str]:
    """The first file or folder of a data set that does not exist; None if all do."""
    if name not in DatasetCatalog.list():
        raise UserError(f"data set {name}: nobody registered it")
    metadata = MetadataCatalog.get(name)
    if metadata.get("generated", False):
        return None
    paths = (metadata.get(key) for key in ("json_file", "image_root"))
    return next((p for p in paths if p and not Path(p).exists()), None)
