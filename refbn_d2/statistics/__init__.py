"""Runs a model over batches to set the reference or the inference statistics."""

from .. import upstream  # noqa: F401  (raises a clear error if detectron2 is missing)
