"""Reads and checks data sets as detectron2's dicts; each is kept in memory once per process."""

import json
import os
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import coco
from detectron2.utils import comm

from ..errors import UserError
from ..extras import needs_extra
from ..io.atomic import atomic_write
from ..io.coco import is_int
from ..upstream import exchanged
from .annotations import Contents, check_dicts, contents, plain_dicts
from .coco_json import coco_files_read_once, keep_content
from .errors import annotation_files, dataset_errors
from .proposals import checked_proposals

__all__ = [
    "DataSet",
    "class_list",
    "load_dicts",
    "load_test_set",
    "load_train_set",
    "make_coco_file",
]


@dataclass(frozen=True)
class DataSet:
    """The images of one or more data sets.

    Attributes:
        dicts: dicts in detectron2's standard format. They are serialized in one block of memory,
            which a loader's workers share with their parent process. (detectron2 0.6 uses a NumPy
            array, later versions a tensor. The training processes of several GPUs do not share it:
            each has its own copy.)
        contents: content of the annotations.
    """

    dicts: DatasetFromList
    contents: Contents


# Arguments of _load -> (state of the data sets at that time, result).
_KEPT: Dict[Any, Tuple[Any, DataSet]] = {}

_NUMPY = SimpleNamespace(loadtxt=np.loadtxt, str=str)  # what the reader of VOC uses of it


def load_dicts(name: str, cfg: CfgNode, evaluated: bool) -> List[Dict[str, Any]]:
    """Loads the dicts of a registered data set with DatasetCatalog.get, and checks them.

    Args:
        name: name of the data set.
        cfg: config; the field DATALOADER.GROUP_FIELD of a COCO file's images is copied to the
            dicts.
        evaluated: whether the data set will be evaluated, see :func:`coco_json.read_coco`.

    Raises:
        UserError: if the data set is unknown, a file is missing or invalid, or an annotation cannot
            be used. Errors of the data set's own function are not changed.
    """
    with (
        dataset_errors([name]),
        needs_extra(),
        exchanged("detectron2.data.datasets.pascal_voc:np", _NUMPY),
        coco_files_read_once(evaluated) as read,
    ):
        dicts = DatasetCatalog.get(name)
        files = list(read)
    if not hasattr(dicts, "__len__"):
        raise UserError(
            f"data set {name}: its function returns a {type(dicts).__name__}, not a list of dicts"
        )
    if not len(dicts):
        raise UserError(f"data set {name} has no images")
    if not files:  # not from a COCO file: the function may use all types that upstream allows
        classes = class_list(name, "thing_classes")
        dicts = plain_dicts(dicts, f"data set {name}", len(classes) or None)
        check_dicts(dicts, f"data set {name}")
    fields = {"group", "style", cfg.DATALOADER.GROUP_FIELD} - {""}
    for file in files:
        for d in dicts:
            image = file.imgs.get(d["image_id"], {})
            d.update({f: image[f] for f in fields if f in image and f not in d})
    return dicts


def class_list(name: str, field: str) -> List[str]:
    """Returns the names of a loaded data set's classes; [] if it has none.

    Args:
        name: name of the data set.
        field: "thing_classes" or "stuff_classes", which may also be a tuple or an array.
    """
    classes = MetadataCatalog.get(name).get(field)
    return [] if classes is None else list(map(str, classes))


def load_train_set(cfg: CfgNode) -> DataSet:
    """Loads all of DATASETS.TRAIN, without the images that training omits."""
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    files = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    with checked_proposals(cfg):
        return _load(
            cfg,
            cfg.DATASETS.TRAIN,
            cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            keypoints,
            files,
            False,
        )


def load_test_set(cfg: CfgNode, name: str) -> DataSet:
    """Loads one data set of DATASETS.TEST."""
    files = None
    with checked_proposals(cfg):  # checks that there is one file for each data set
        if cfg.MODEL.LOAD_PROPOSALS:
            files = (cfg.DATASETS.PROPOSAL_FILES_TEST[list(cfg.DATASETS.TEST).index(name)],)
        return _load(cfg, (name,), False, 0, files, True)


def _load(
    cfg: CfgNode,
    names: Sequence[str],
    filter_empty: bool,
    min_keypoints: int,
    proposal_files: Optional[Sequence[str]],
    evaluated: bool,
) -> DataSet:
    if not names:
        raise UserError("DATASETS.TRAIN names no data set")
    files = None if proposal_files is None else tuple(proposal_files)
    key = tuple(names), filter_empty, min_keypoints, files, cfg.DATALOADER.GROUP_FIELD
    # A data set is loaded again if another function was registered under its name.
    state: List[Any] = [DatasetCatalog[n] for n in names if n in DatasetCatalog.list()]
    state += [os.stat(f).st_mtime_ns for f in files or () if os.path.exists(f)]
    if key in _KEPT and _KEPT[key][0] == state:
        return _KEPT[key][1]
    loaded = {name: load_dicts(name, cfg, evaluated or name in cfg.DATASETS.TEST) for name in names}
    total = sum(map(len, loaded.values()))
    objects = [
        a
        for dicts in loaded.values()
        for d in dicts
        for a in d.get("annotations", ())
        if a.get("iscrowd", 0) == 0
    ]
    # If only some images are annotated, no image is omitted; upstream would need them all to be.
    if not all("annotations" in d for dicts in loaded.values() for d in dicts):
        filter_empty, min_keypoints = False, 0
    if filter_empty and not objects:
        raise UserError(
            f"{annotation_files(names)}: none of the {total} images has an object that is not a "
            "crowd (DATALOADER.FILTER_EMPTY_ANNOTATIONS False trains on images without objects)"
        )
    if min_keypoints and not any(a.get("keypoints") for a in objects):
        raise UserError(
            f"MODEL.KEYPOINT_ON is True, but no object of {', '.join(names)} has keypoints: add "
            "them, or set MODEL.KEYPOINT_ON False"
        )
    del objects
    with exchanged("detectron2.data.build:DatasetCatalog", loaded):
        dicts = get_detection_dataset_dicts(
            names, filter_empty, min_keypoints, proposal_files, check_consistency=False
        )
    del loaded
    dicts = dicts if isinstance(dicts, list) else list(dicts)
    result = DataSet(_serialized(dicts, ", ".join(names)), contents(dicts))
    _KEPT[key] = state, result
    return result


def _serialized(dicts: List[Dict[str, Any]], names: str) -> DatasetFromList:
    try:
        return DatasetFromList(dicts, copy=False)
    except (pickle.PicklingError, AttributeError, TypeError):
        for d in dicts:
            for key, value in d.items():
                try:
                    pickle.dumps(value)
                except (pickle.PicklingError, AttributeError, TypeError) as e:
                    raise UserError(
                        f"data set {names}: image {d.get('file_name', d['image_id'])}: {key} "
                        f"cannot be pickled for the loader's processes ({e}): leave it out"
                    ) from None
        raise


def make_coco_file(cfg: CfgNode, name: str, folder: str) -> None:
    """Writes a file in COCO format, which evaluation needs, for a data set that has none.

    The main process writes a new file to ``folder`` in each run; every process has its content in
    memory. detectron2 would use a file of an earlier run even if the data have changed since.

    Raises:
        UserError: if the data set cannot be converted to COCO's format.
    """
    metadata = MetadataCatalog.get(name)
    path = os.path.join(folder, f"{name}_coco_format.json")
    if metadata.get("json_file", _MADE.get(name)) != _MADE.get(name):
        return  # it has a file of its own
    classes = class_list(name, "thing_classes")
    if not classes:
        raise UserError(f"data set {name} has no class names: set its metadata's thing_classes")
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    if ids is not None:
        _check_ids(ids, classes, f"data set {name}: thing_dataset_id_to_contiguous_id")
    dicts = list(load_test_set(cfg, name).dicts)
    for d in dicts:
        d.setdefault("file_name", "")  # evaluation needs no image, which may be in memory
        if not is_int(d["image_id"]):
            raise UserError(
                f"data set {name}: image_id {d['image_id']!r} is not a whole number, which its "
                "evaluation needs"
            )
    with exchanged("detectron2.data.datasets.coco:DatasetCatalog", {name: dicts}):
        content = coco.convert_to_coco_dict(name)
    content.setdefault("annotations", [])
    keep_content(path, content)
    if comm.is_main_process():
        os.makedirs(folder, exist_ok=True)
        with atomic_write(path) as f:
            json.dump(content, f)
    _MADE[name] = path
    if metadata.get("json_file") != path:
        vars(metadata).pop("json_file", None)  # detectron2 does not allow changing a value
        metadata.json_file = path


def _check_ids(ids: Any, classes: Sequence[str], where: str) -> None:
    if not isinstance(ids, dict):
        raise UserError(f"{where} is a {type(ids).__name__}, not a dict")
    of_class = {index: key for key, index in ids.items()}
    for n, name in enumerate(classes):
        if not is_int(of_class.get(n)):
            found = f"{of_class[n]!r} is not a whole number" if n in of_class else "it has none"
            raise UserError(
                f"{where} has to give class {n} ({name!r}) an id, but {found}: correct it, or "
                "leave it out"
            )
    if len(ids) != len(classes):
        raise UserError(f"{where} has {len(ids)} ids for {len(classes)} classes: give each one")


# Name of a data set -> the file that make_coco_file wrote for it.
_MADE: Dict[str, str] = {}
