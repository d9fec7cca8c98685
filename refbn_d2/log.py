"""The loggers of this package."""

import logging

__all__ = ["get_logger"]


def get_logger(name: str) -> logging.Logger:
    """A logger below that of detectron2, whose lines go wherever detectron2's own go.

    detectron2's ``setup_logger`` gives handlers to the logger "detectron2" alone: whoever trains
    has our lines on the terminal and in log.txt then, without another call. Where nobody called it,
    as without detectron2, warnings are on standard error, which is Python's default.

    Args:
        name: ``__name__`` of the module that logs.
    """
    return logging.getLogger(f"detectron2.{name}")
