"""Matrices of experiments: what to run, what it takes, running it."""

from .. import upstream  # noqa: F401  (says so if detectron2 is missing)
