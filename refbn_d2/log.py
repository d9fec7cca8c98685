"""The loggers of this package."""

import logging

__all__ = ["get_logger"]


def get_logger(name: str) -> logging.Logger:
    """Returns a logger whose parent is detectron2's logger, so that both have the same handlers.

    detectron2's ``setup_logger`` adds handlers only to the logger "detectron2". Through them our
    messages appear on the terminal and in log.txt, without another call. If ``setup_logger`` was
    not called, for example without detectron2, warnings go to standard error, Python's default.

    Args:
        name: ``__name__`` of the module that logs.
    """
    return logging.getLogger(f"detectron2.{name}")
