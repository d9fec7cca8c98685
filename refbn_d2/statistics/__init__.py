"""Running a model over batches to set statistics: the reference, the inference statistics."""

from .. import upstream  # noqa: F401  (says so if detectron2 is missing)
