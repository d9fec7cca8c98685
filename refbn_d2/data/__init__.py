"""Data sets and samplers. Importing this package registers the quick data set."""

from .. import upstream  # noqa: F401  (raises a clear error if detectron2 is missing)
from . import quick

quick.register()
