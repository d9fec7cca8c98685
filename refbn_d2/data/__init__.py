"""Data sets and samplers. Importing this package registers the quick data set."""

from . import quick

quick.register()
