"""The training loop, based on detectron2's engine."""

from .. import upstream  # noqa: F401  (raises a clear error if detectron2 is missing)
from ..weights import safe_pickle  # in version 0.1 it was a module of this package
from .command import train_command
from .trainer import Trainer, setup

__all__ = ["Trainer", "safe_pickle", "setup", "train_command"]
