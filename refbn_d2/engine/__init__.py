"""The training loop: the only place that knows detectron2's engine."""

from .. import upstream  # noqa: F401  (raises a clear error if detectron2 is missing)
from ..weights import safe_pickle  # its place in version 0.1
from .command import train_command
from .trainer import Trainer, setup

__all__ = ["Trainer", "safe_pickle", "setup", "train_command"]
