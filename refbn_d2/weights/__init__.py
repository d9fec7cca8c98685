"""Files of weights: reading them without running code, and backbones of other libraries."""

from .. import upstream  # noqa: F401  (says so if detectron2 is missing)
