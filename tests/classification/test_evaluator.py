"""Top-1 and top-5 error, compared with errors counted by hand."""

import pytest
import torch

from refbn_d2.classification.evaluator import ClassificationEvaluator


def test_errors_in_percent():
    ranked = torch.tensor([9.0, 8, 7, 6, 5, 4, 3])  # class 0 first, class 6 last
    evaluator = ClassificationEvaluator()
    evaluator.reset()
    for label in (0, 0, 4, 5):
        evaluator.process([{"label": label}], [{"scores": ranked}])
    result = evaluator.evaluate()["classification"]
    assert result["top1_error"] == pytest.approx(50) and result["top5_error"] == pytest.approx(25)
    evaluator.reset()
    evaluator.process([{"label": 1}], [{"scores": torch.tensor([0.0, 1.0])}])
    assert evaluator.evaluate()["classification"] == {"top1_error": 0, "top5_error": 0}
