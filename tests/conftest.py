"""Shared by all tests: two threads at most, and where the real data is."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)


def _real_data() -> Path:
    return Path(os.getenv("REFBN_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real COCO, MNIST and COCOeval data; tests that need it skip without it."""
    folder = _real_data()
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set REFBN_DATA")
    return folder
