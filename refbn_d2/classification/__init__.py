"""The classification track: pretraining a backbone with the norm that the detector will have."""

from .classifier import ImageClassifier
from .trainer import ClassificationTrainer

__all__ = ["ClassificationTrainer", "ImageClassifier"]
