"""Training a classifier on the engine of the detectors."""

from detectron2.data import MetadataCatalog

from ..engine import Trainer
from . import crops
from .evaluator import ClassificationEvaluator

__all__ = ["ClassificationTrainer"]

crops.register()


class ClassificationTrainer(Trainer):
    """Trainer whose data sets are classified: dicts with "label" instead of "annotations"."""

    @classmethod
    def build_mapper(cls, cfg, is_train: bool):
        names = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST
        return MetadataCatalog.get(names[0]).mapper(is_train)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str):
        return ClassificationEvaluator()
