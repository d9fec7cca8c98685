"""Hooks of the training loop."""

from .evaluation import EvalHook
from .progress import ProgressBar
from .reference import ReferenceHook
from .resume import ExactResume
from .statistics import StatisticsHook
from .weight_centralization import WeightCentralization, center_weights

__all__ = [
    "EvalHook",
    "ExactResume",
    "ProgressBar",
    "ReferenceHook",
    "StatisticsHook",
    "WeightCentralization",
    "center_weights",
]
