"""Matrices of experiments: their specification, the estimated time, and running them."""

from .. import upstream  # noqa: F401  (raises a clear error if detectron2 is missing)
