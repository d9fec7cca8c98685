"""The classification track: the paper's classifiers, and pretraining a backbone with the norm that
the detector will have."""

from .. import upstream  # noqa: F401  (says so if detectron2 is missing)
from .classifier import ImageClassifier, TorchvisionClassifier
from .trainer import ClassificationTrainer

__all__ = ["ClassificationTrainer", "ImageClassifier", "TorchvisionClassifier"]
