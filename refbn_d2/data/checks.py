"""Checks before the first step that the config, the training data and the test data match."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..errors import UserError
from .errors import annotation_files
from .sets import DataSet, class_list, load_test_set, load_train_set

__all__ = ["check_test_sets", "check_train_set", "class_keys", "class_names", "set_num_classes"]

# Meta-architecture -> pairs of (config key with a number of classes, metadata with their names).
_CLASS_KEYS: Dict[str, Tuple[Tuple[str, str], ...]] = {
    "GeneralizedRCNN": (("MODEL.ROI_HEADS.NUM_CLASSES", "thing_classes"),),
    "PanopticFPN": (
        ("MODEL.ROI_HEADS.NUM_CLASSES", "thing_classes"),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "stuff_classes"),
    ),
    "SemanticSegmentor": (("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "stuff_classes"),),
    "RetinaNet": (("MODEL.RETINANET.NUM_CLASSES", "thing_classes"),),
    "FCOS": (("MODEL.RETINANET.NUM_CLASSES", "thing_classes"),),
}

# Meta-architectures that may have a mask head and a keypoint head.
_RCNNS = ("GeneralizedRCNN", "PanopticFPN")


def class_keys(cfg: CfgNode) -> Tuple[Tuple[str, str], ...]:
    """Returns the config keys with the model's numbers of classes, each with a metadata key.

    The metadata key is that of the class names. Empty for an architecture without classes or one
    that is not detectron2's.
    """
    return _CLASS_KEYS.get(cfg.MODEL.META_ARCHITECTURE, ())


def class_names(cfg: CfgNode, names: Sequence[str]) -> Dict[str, List[str]]:
    """Returns the names of the classes that the model of ``cfg`` predicts, in their order.

    Args:
        cfg: config, whose architecture determines the kinds of classes.
        names: names of loaded data sets; their classes are equal, so those of the first are used.

    Returns:
        The names under "thing_classes", "stuff_classes" or both, if the data set has names.
    """
    fields = sorted({field for _, field in class_keys(cfg)})
    found = {f: class_list(name, f) for name in names[:1] for f in fields}
    return {f: classes for f, classes in found.items() if classes}


def _value(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def set_num_classes(cfg: CfgNode, evaluate: bool = False) -> CfgNode:
    """Returns the config with each NUM_CLASSES that is 0 set to the data's number of classes.

    Args:
        cfg: config, which is not changed.
        evaluate: whether the model is only evaluated; the classes are then those of DATASETS.TEST.

    Raises:
        UserError: if there is no data set, or if it has no class names.
    """
    missing = [(k, field) for k, field in class_keys(cfg) if _value(cfg, k) == 0]
    if not missing:
        return cfg
    names = cfg.DATASETS.TEST or cfg.DATASETS.TRAIN if evaluate else cfg.DATASETS.TRAIN
    if not names:
        raise UserError(f"{missing[0][0]} is 0, and no data set is given to count classes in")
    if evaluate and cfg.DATASETS.TEST:
        load_test_set(cfg, names[0])  # sets the names of its classes in the metadata
    else:
        load_train_set(cfg)
    cfg = cfg.clone()
    frozen = cfg.is_frozen()
    cfg.defrost()
    for key, field in missing:
        classes = class_list(names[0], field)
        if not classes:
            raise UserError(
                f"{key} is 0, and data set {names[0]} has no class names ({field}) to count"
            )
        cfg.merge_from_list([key, len(classes)])
    if frozen:
        cfg.freeze()
    return cfg


def check_train_set(cfg: CfgNode) -> DataSet:
    """Loads DATASETS.TRAIN and checks that the model of ``cfg`` can train on it.

    Raises:
        UserError: if the classes of data sets and config differ, or if the annotations lack masks,
            keypoints or segmentations that the config requires.
    """
    data = load_train_set(cfg)
    for key, field in class_keys(cfg):
        for name in cfg.DATASETS.TRAIN:
            first = cfg.DATASETS.TRAIN[0]
            _check_classes(cfg, key, field, name, data.contents.largest_class, first)
    names = annotation_files(cfg.DATASETS.TRAIN)
    if any(field == "thing_classes" for _, field in class_keys(cfg)):
        if data.contents.without_annotations:
            raise UserError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, but "
                f"{_some(data.contents.without_annotations, data)} of {names} have no annotations: "
                "give images without objects an empty list"
            )
    if _predicts_masks(cfg):
        _check_has_masks(names, data)
        _check_mask_format(cfg, names, data)
    if cfg.MODEL.META_ARCHITECTURE in _RCNNS:
        _check_keypoints(cfg, names, data)
    if cfg.MODEL.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor"):
        if data.contents.without_sem_seg:
            raise UserError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, but "
                f"{_some(data.contents.without_sem_seg, data)} of {names} have no semantic "
                "segmentation (sem_seg_file_name)"
            )
    return data


def check_test_sets(cfg: CfgNode, trained: bool = True) -> None:
    """Raises a UserError if DATASETS.TEST has other classes than the model, or lacks its masks.

    Args:
        cfg: config of the model.
        trained: whether to compare the names of the classes with those of DATASETS.TRAIN.
    """
    for name in cfg.DATASETS.TEST:
        data = load_test_set(cfg, name)
        for key, field in class_keys(cfg):
            other = cfg.DATASETS.TRAIN[0] if trained and cfg.DATASETS.TRAIN else None
            _check_classes(cfg, key, field, name, data.contents.largest_class, other)
        # The masks of a COCO file are evaluated.
        if _predicts_masks(cfg) and MetadataCatalog.get(name).get("json_file"):
            _check_has_masks(annotation_files([name]), data)


def _check_classes(
    cfg: CfgNode, key: str, field: str, name: str, largest: int, other: Optional[str] = None
) -> None:
    """Compares the classes of a data set with the config and with the classes of ``other``."""
    classes = class_list(name, field)
    number = _value(cfg, key)
    wanted = class_list(other, field) if other else []
    if classes and wanted and classes != wanted:
        differing = [
            f"; class {n} is {a!r} and {b!r}"
            for n, (a, b) in enumerate(zip(classes, wanted))
            if a != b
        ]
        raise UserError(
            f"data set {name} has {len(classes)} classes ({_listed(classes)}), {other} has "
            f"{len(wanted)} ({_listed(wanted)}){''.join(differing[:1])}: give the categories of "
            "both files the same names, in the same order of their ids"
        )
    if classes and len(classes) != number:
        raise UserError(
            f"data set {name} has {len(classes)} classes, {key} is {number}: set it to "
            f"{len(classes)} ({_listed(classes)}), or to 0 for as many as the training data has"
        )
    if field == "thing_classes" and largest >= number:
        raise UserError(f"data set {name} has objects of class {largest}, {key} is {number}")


def _predicts_masks(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE in _RCNNS and cfg.MODEL.MASK_ON


def _check_has_masks(names: str, data: DataSet) -> None:
    without = data.contents.without_mask
    if without:
        raise UserError(
            f"MODEL.MASK_ON is True, but {_some(without, data)} of {names} have objects without a "
            "mask (segmentation): add the masks, or set MODEL.MASK_ON False"
        )


def _check_mask_format(cfg: CfgNode, names: str, data: DataSet) -> None:
    found = data.contents
    if found.with_rle and cfg.INPUT.MASK_FORMAT == "polygon":
        raise UserError(
            f"INPUT.MASK_FORMAT is polygon, but {_some(found.with_rle, data)} of {names} have "
            "masks that are RLE: set INPUT.MASK_FORMAT bitmask"
        )


def _check_keypoints(cfg: CfgNode, names: str, data: DataSet) -> None:
    if not cfg.MODEL.KEYPOINT_ON:
        return
    found = data.contents
    if found.without_keypoints:
        raise UserError(
            f"MODEL.KEYPOINT_ON is True, but {_some(found.without_keypoints, data)} of {names} "
            "have objects without keypoints: add them, or set MODEL.KEYPOINT_ON False"
        )
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if found.keypoint_counts - {number}:
        raise UserError(
            f"objects of {names} have {min(found.keypoint_counts - {number})} keypoints, "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}"
        )
    for name in cfg.DATASETS.TRAIN:
        for field in ("keypoint_names", "keypoint_flip_map"):
            if MetadataCatalog.get(name).get(field) is None:
                raise UserError(
                    f"MODEL.KEYPOINT_ON is True, but the metadata of data set {name} has no {field}"
                )


def _some(images: List[str], data: DataSet) -> str:
    return f"{len(images)} of {data.contents.images} images (the first is {images[0]})"


def _listed(classes: List[str]) -> str:
    return ", ".join(map(str, classes[:3])) + (", ..." if len(classes) > 3 else "")
