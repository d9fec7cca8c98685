"""The package's messages are in the same log as detectron2's."""

import logging
import subprocess
import sys

import pytest
import tiny
import torch
from detectron2.utils.logger import setup_logger

from refbn_d2.norms import RefBatchNorm2d, ReferenceNorm2d


@pytest.fixture
def log_txt(tmp_path):
    """log.txt of detectron2's own set-up, as its training scripts make it."""
    logger = logging.getLogger("detectron2")
    before = list(logger.handlers), logger.level, logger.propagate
    setup_logger(str(tmp_path))
    yield tmp_path / "log.txt"
    for handler in set(logger.handlers) - set(before[0]):
        logger.removeHandler(handler)
    logger.level, logger.propagate = before[1:]


def test_a_layers_warning_is_in_the_log_of_whatever_trains(log_txt, monkeypatch):
    monkeypatch.setattr(ReferenceNorm2d, "_fallback_logged", False)
    RefBatchNorm2d(3)(torch.randn(4, 3, 5, 5))
    (line,) = [text for text in log_txt.read_text().splitlines() if "No reference" in text]
    assert "refbn_d2.norms.reference_norm WARNING" in line


def test_without_detectron2_warnings_are_on_standard_error():
    code = (
        "import sys; sys.modules['detectron2'] = None; import torch; "
        "from refbn_d2.norms import RefBatchNorm2d as Norm; Norm(3)(torch.randn(4, 3, 5, 5))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True
    )
    assert result.returncode == 0 and "No reference was captured" in result.stderr
    assert result.stdout == ""
