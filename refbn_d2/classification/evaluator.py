"""Top-1 and top-5 error."""

import itertools
from collections import OrderedDict

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

__all__ = ["ClassificationEvaluator"]


class ClassificationEvaluator(DatasetEvaluator):
    """Error rates in percent, over all processes: the share of images whose label is not among the
    1 or 5 classes with the highest scores."""

    def reset(self):
        self._hits = []  # per image (top-1, top-5)

    def process(self, inputs, outputs):
        for d, output in zip(inputs, outputs):
            scores = output["scores"]
            best = scores.topk(min(5, len(scores))).indices.tolist()
            self._hits.append((best[0] == d["label"], d["label"] in best))

    def evaluate(self):
        hits = list(itertools.chain(*comm.gather(self._hits)))
        if not comm.is_main_process():
            return {}
        errors = [100 * (1 - sum(h[k] for h in hits) / len(hits)) for k in (0, 1)]
        return OrderedDict(classification={"top1_error": errors[0], "top5_error": errors[1]})
