"""The training loop: the only place that knows detectron2's engine."""

from .trainer import Trainer, setup

__all__ = ["Trainer", "setup"]
