"""The training loop: the only place that knows detectron2's engine."""

from .. import upstream  # noqa: F401  (says so if detectron2 is missing)
from ..weights import safe_pickle  # where version 0.1 had it
from .command import train_command
from .trainer import Trainer, setup

__all__ = ["Trainer", "safe_pickle", "setup", "train_command"]
