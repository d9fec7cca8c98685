"""These networks are too small for a second thread to be worth its wake-ups."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)
