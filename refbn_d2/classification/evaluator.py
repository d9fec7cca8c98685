"""Top-1 and top-5 error."""

from collections import OrderedDict

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from .classifier import collate, right

__all__ = ["ClassificationEvaluator", "errors"]


def errors(counts: torch.Tensor) -> "OrderedDict[str, float]":
    """Converts the counts that :func:`right` returns, or sums of them, to error rates in %."""
    total, top1, top5 = counts.tolist()
    return OrderedDict(
        top1_error=100 * (total - top1) / total, top5_error=100 * (total - top5) / total
    )


class ClassificationEvaluator(DatasetEvaluator):
    """Error rates in percent, over all processes: the share of images whose label is not among the
    1 or 5 classes with the highest scores."""

    def reset(self):
        self._counts = torch.zeros(3, dtype=torch.int64)

    def process(self, inputs, outputs):
        scores = torch.stack([output["scores"] for output in outputs])
        self._counts += right(scores, collate(inputs)["label"].to(scores.device)).cpu()

    def evaluate(self):
        counts = sum(comm.gather(self._counts))
        if not comm.is_main_process():
            return {}
        return OrderedDict(classification=errors(counts))
