"""The positions of points, intervals, zero line and margin in a forest plot."""

import math

import numpy as np
import pytest

from refbn_d2.evaluation.forest import Row, forest
from refbn_d2.evaluation.interval import Difference, difference


def test_places_are_on_one_scale():
    rng = np.random.default_rng(0)
    a, b = rng.normal(30, 1, 4), rng.normal(33, 1, 4)
    halves = [x[:, None] + rng.normal(0, 1, (4, 50)) for x in (a, b)]
    d = difference(a, b, *halves, 100)
    plot = forest([Row("one", d, words="better"), Row("none", Difference())], margin=0.5)
    row, empty = plot["rows"]
    low, high = d.ci95
    # Two known places give the scale, the others must lie on it.
    percent = (row["at"] - plot["zero"]) / d.delta
    for place, value in ((row["left"], low), (row["right"], high), (plot["band"][1], 0.5)):
        assert place == pytest.approx(plot["zero"] + percent * value, abs=0.05)
    assert all(0 < place < 100 for place in (row["left"], row["right"], *plot["band"]))
    for place, text in plot["ticks"]:
        value = float(text.replace("−", "-"))
        assert place == pytest.approx(plot["zero"] + percent * value, abs=0.05)
    assert (empty["at"], empty["left"], empty["delta"]) == (None, None, "–")


def test_one_run_shows_the_interval_of_its_checkpoints():
    rng = np.random.default_rng(1)
    a, b = rng.normal(30, 1, (2, 1))
    d = difference(a, b, *rng.normal(30, 1, (2, 1, 50)), 100)
    assert math.isnan(d.se)
    row = forest([Row("one", d)])["rows"][0]
    assert row["given"] and row["left"] < row["at"] < row["right"]
