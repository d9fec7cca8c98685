"""Image classification: the paper's experiments, and pretraining of a detector's backbone."""

from .. import upstream  # noqa: F401  (raises a clear error if detectron2 is missing)
from .classifier import ImageClassifier, TorchvisionClassifier
from .trainer import ClassificationTrainer

__all__ = ["ClassificationTrainer", "ImageClassifier", "TorchvisionClassifier"]
