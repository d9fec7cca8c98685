"""detectron2's COCOEvaluator, computed by hotcoco: the same numbers in seconds, not minutes."""

import contextlib
import io
from typing import Any, Dict

import numpy as np
from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.coco_json import coco_files_read_once
from ..errors import UserError
from ..extras import needs_extra
from ..upstream import exchanged, whole_files
from .inputs import scored_fields

__all__ = ["BACKENDS", "FastCOCOEvaluator"]

BACKENDS = ("hotcoco", "pycocotools")


class _HotCOCOeval(COCOeval):
    """pycocotools' COCOeval in which hotcoco matches and accumulates boxes and masks.

    Loading of detections, ``summarize``, and everything for keypoints are pycocotools' own.
    """

    def evaluate(self) -> None:
        import hotcoco  # optional for training, see FastCOCOEvaluator

        if self.params.iouType == "keypoints":
            return super().evaluate()
        truth, found = (
            hotcoco.COCO(scored_fields(coco.dataset)) for coco in (self.cocoGt, self.cocoDt)
        )
        scorer = hotcoco.COCOeval(truth, found, self.params.iouType)
        for name in ("imgIds", "catIds", "maxDets"):
            setattr(scorer.params, name, [int(v) for v in getattr(self.params, name)])
        scorer.evaluate()
        self._scorer = scorer

    def accumulate(self, p=None) -> None:
        if self.params.iouType == "keypoints":
            return super().accumulate(p)
        self._scorer.accumulate()
        found = self._scorer.eval
        assert found is not None  # since accumulate()
        self.eval = {k: v for k, v in found.items() if k != "params"}
        self.eval.update({k: np.asarray(self.eval[k]) for k in ("precision", "recall", "scores")})


class FastCOCOEvaluator(COCOEvaluator):
    """COCOEvaluator whose AP comes from hotcoco or from pycocotools itself.

    Both give the same result dict; pycocotools is available to check that. If the limit of
    detections per image is not 100, detectron2's own pycocotools code is always used.
    """

    _coco_api: COCO

    def __init__(self, dataset_name: str, *args: Any, backend: str = "hotcoco", **kwargs: Any):
        """
        Args:
            dataset_name, args, kwargs: As of COCOEvaluator, except for ``use_fast_impl``.
            backend: One of BACKENDS.

        Raises:
            UserError: If the backend is unknown or not installed.
        """
        if backend not in BACKENDS:
            raise UserError(f"TEST.COCO_BACKEND {backend!r}: must be one of {', '.join(BACKENDS)}")
        if backend == "hotcoco":
            with needs_extra("or set TEST.COCO_BACKEND pycocotools"):
                import hotcoco  # noqa: F401
        with coco_files_read_once(evaluated=True):
            super().__init__(dataset_name, *args, **{**kwargs, "use_fast_impl": False})
        if self._do_evaluation:
            self._coco_api = _numbered_from_1(self._coco_api.dataset)
        # Set afterwards, because detectron2 without its C++ extension would turn it off again.
        self._use_fast_impl = backend == "hotcoco"

    def evaluate(self, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """As in detectron2, but an interruption leaves no incomplete results files."""
        with whole_files():
            return super().evaluate(*args, **kwargs)

    def _eval_predictions(self, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        # detectron2 has no argument for the class that evaluates, but looks up this name.
        with exchanged("detectron2.evaluation.coco_evaluation:COCOeval_opt", _HotCOCOeval):
            return super()._eval_predictions(*args, **kwargs)


def _numbered_from_1(dataset: Dict[str, Any]) -> COCO:
    """A COCO with the same annotations, with ids and iscrowd as pycocotools needs them.

    pycocotools treats an object with id 0 as one that was not found, and has no default for
    iscrowd.
    """
    annotations = [
        {"iscrowd": 0, **a, "id": n} for n, a in enumerate(dataset.get("annotations", []), 1)
    ]
    coco = COCO()
    coco.dataset = {**dataset, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
