"""One thread, because these networks are too small to profit from a second one."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)
