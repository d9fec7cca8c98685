"""A generated data set in a file, and functions to check and load it."""

import json

import pytest

from refbn_d2.evaluation.inputs import load_ground_truth
from tests.evaluation import generated


@pytest.fixture(scope="session")
def write(tmp_path_factory):
    """Writes content as JSON to a fresh file and returns its path."""
    folder = tmp_path_factory.mktemp("json")
    count = iter(range(10_000))

    def function(content):
        path = folder / f"{next(count)}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return function


@pytest.fixture(scope="session")
def content():
    return generated.ground_truth()


@pytest.fixture(scope="session")
def gt_file(write, content):
    return write(content)


@pytest.fixture(scope="session")
def gt(gt_file):
    return load_ground_truth(gt_file, ("bbox", "segm"))
