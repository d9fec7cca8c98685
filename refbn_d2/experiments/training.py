"""The trainings of a matrix: the detectors of its runs, and the pretrainings they start from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from detectron2.data import MetadataCatalog

from ..config import load_config
from ..errors import UserError
from .matrix import RunSpec
from .records import BACKBONE, PRETRAINING, RUN, read_record

__all__ = ["Training", "trainings_of"]


@dataclass(frozen=True)
class Training:
    """One training of a matrix, which runs in its own process.

    Attributes:
        spec: Run of the matrix; for a pretraining, one of the runs that start from it.
        is_pretraining: Whether this is the run's pretraining; otherwise it is its detector.
    """

    spec: RunSpec
    is_pretraining: bool = False

    @property
    def folder(self) -> Path:
        """Path of its folder, relative to the output folder of the matrix."""
        return self.spec.classifier_folder if self.is_pretraining else self.spec.folder

    @property
    def record_file(self) -> Path:
        """Path of its record, relative to the output folder of the matrix."""
        return self.folder / (PRETRAINING if self.is_pretraining else RUN)

    @property
    def config(self) -> str:
        """Path of its config."""
        if not self.is_pretraining:
            return self.spec.config
        assert self.spec.classifier is not None  # only runs that have one have a pretraining
        return self.spec.classifier

    @property
    def pretraining(self) -> Optional["Training"]:
        """The pretraining whose backbone it starts from, or None."""
        if self.is_pretraining or not self.spec.classifier:
            return None
        return Training(self.spec, is_pretraining=True)

    @property
    def label(self) -> str:
        """Description in one line."""
        spec = self.spec
        if self.is_pretraining:
            return f"pretraining {spec.pretrained}, seed {spec.classifier_seed}"
        protocol = f"{spec.protocol}, " if spec.protocol else ""
        condition = f"batch {spec.ims_per_batch}, grouping {spec.grouping:g}"
        return f"{protocol}{spec.name}, {condition}, seed {spec.seed}"

    def opts(self) -> List[str]:
        """KEY VALUE pairs for its config, without the weights of its pretraining."""
        return self.spec.classifier_opts() if self.is_pretraining else self.spec.detector_opts()

    def settings(self) -> Dict[str, Optional[str]]:
        """Hashes of the configs that determine its result."""
        settings = self.spec.settings()
        return {"pretraining": settings["pretraining"]} if self.is_pretraining else settings

    def is_finished(self, output: Path) -> bool:
        """Whether it is trained, and its backbone converted or its detector evaluated."""
        if self.is_pretraining:
            return (output / self.folder / BACKBONE).exists()
        file = output / self.record_file
        return file.exists() and read_record(file).get("status") == "finished"

    def record(self) -> Dict[str, Any]:
        """Content of its record, without its status and time.

        Raises:
            UserError: If a detector is not evaluated on exactly one data set.
        """
        cfg = load_config(self.config, self.opts())
        common = {"iterations": cfg.SOLVER.MAX_ITER, "settings": self.settings()}
        if self.is_pretraining:
            return common
        spec = self.spec
        if len(cfg.DATASETS.TEST) != 1:
            raise UserError(
                f"{spec.name}: DATASETS.TEST is {tuple(cfg.DATASETS.TEST)}: name the one data set "
                "that the runs of the matrix are compared on"
            )
        metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        return {
            "name": spec.name,
            "norm": spec.norm,
            "seed": spec.seed,
            "ims_per_batch": spec.ims_per_batch,
            "grouping": spec.grouping,
            **({"protocol": spec.protocol} if spec.protocol else {}),
            **(
                {} if spec.pretraining_seed is None else {"pretraining_seed": spec.pretraining_seed}
            ),
            "gt": metadata.get("json_file"),
            "image_root": metadata.get("image_root"),
            **common,
        }


def trainings_of(specs: Sequence[RunSpec]) -> List[Training]:
    """Returns the trainings of a matrix: each pretraining once, then the detector of each run."""
    detectors = [Training(spec) for spec in specs]
    pretrainings = {t.pretraining.folder: t.pretraining for t in detectors if t.pretraining}
    return [*pretrainings.values(), *detectors]
