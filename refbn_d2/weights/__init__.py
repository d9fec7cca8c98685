"""Reads weights files without executing code in them; converts backbones of other libraries."""

from .. import upstream  # noqa: F401  (raises a clear error if detectron2 is missing)
