"""Builds the evaluator of a data set by its evaluator_type."""

from importlib.util import find_spec
from typing import List

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from ..data.errors import image_errors
from ..errors import UserError
from ..evaluation.coco_evaluator import FastCOCOEvaluator

__all__ = ["build_evaluator"]

# evaluator_type -> (package that the evaluator needs at the end of training, how to install it)
_NEEDS = {
    "coco_panoptic_seg": (
        "panopticapi",
        "pip install git+https://github.com/cocodataset/panopticapi.git",
    ),
    "cityscapes_instance": ("cityscapesscripts", "pip install cityscapesscripts"),
    "cityscapes_sem_seg": ("cityscapesscripts", "pip install cityscapesscripts"),
    "lvis": ("lvis", "pip install lvis"),
}


class _SemSegEvaluator(SemSegEvaluator):
    """SemSegEvaluator whose error for a ground-truth image that cannot be read names the file."""

    def process(self, inputs, outputs) -> None:
        with image_errors():
            super().process(inputs, outputs)


def build_evaluator(cfg: CfgNode, name: str, output_dir: str) -> DatasetEvaluator:
    """Builds the evaluator of a data set, chosen as in detectron2's tools/train_net.py.

    Args:
        cfg: Config, whose TEST.COCO_BACKEND names the code that computes the AP.
        name: Name of the data set. Its metadata contain the ``evaluator_type``.
        output_dir: Folder of the results files.

    Raises:
        UserError: If the type is unknown, or if a package that its evaluator needs is not
            installed.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    single = {
        "cityscapes_instance": CityscapesInstanceEvaluator,
        "cityscapes_sem_seg": CityscapesSemSegEvaluator,
        "pascal_voc": PascalVOCDetectionEvaluator,
    }
    known = ("coco", "coco_panoptic_seg", "sem_seg", "lvis", *single)
    if not isinstance(kind, str) or kind not in known:
        raise UserError(
            f"data set {name} has evaluator_type {kind!r}: known are {', '.join(known)}"
        )
    package, remedy = _NEEDS.get(kind, ("", ""))
    if package and find_spec(package) is None:
        raise UserError(
            f"data set {name} is evaluated by {package}, which is not installed: {remedy}"
        )
    if kind in single:
        return single[kind](name)
    if kind == "lvis":
        return LVISEvaluator(name, output_dir=output_dir)
    evaluators: List[DatasetEvaluator] = []
    if kind in ("sem_seg", "coco_panoptic_seg"):
        evaluators.append(_SemSegEvaluator(name, output_dir=output_dir))
    if kind in ("coco", "coco_panoptic_seg"):
        evaluators.append(
            FastCOCOEvaluator(name, output_dir=output_dir, backend=cfg.TEST.COCO_BACKEND)
        )
    if kind == "coco_panoptic_seg":
        evaluators.append(COCOPanopticEvaluator(name, output_dir))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
