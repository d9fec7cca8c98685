"""Registering the data sets that come with this package."""

from typing import Any, Callable, Dict, List

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["register_once"]


def register_once(name: str, load: Callable[[], List[Dict[str, Any]]], **metadata: Any) -> None:
    """Registers a data set unless its name is already registered, which upstream does not allow.

    Args:
        name: Name of the data set.
        load: Function that returns its dicts.
        metadata: Its entries in MetadataCatalog.
    """
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)
