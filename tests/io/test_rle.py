"""The check of run-length masks, compared with pycocotools' encoder."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from pycocotools import mask as mask_util

from refbn_d2.io import rle

masks = st_numpy.arrays(
    np.uint8, st.tuples(st.integers(1, 60), st.integers(1, 60)), elements=st.integers(0, 1)
)


def counts(mask):
    return mask_util.encode(np.asfortranarray(mask))["counts"].decode()


@settings(max_examples=60, deadline=None)
@given(st.lists(masks, min_size=1, max_size=6))
def test_sound_masks_pass_and_a_wrong_size_is_found(found):
    texts, sizes = [counts(m) for m in found], [m.shape for m in found]
    assert rle.rle_problem(texts, sizes) is None
    wrong = [*sizes[:-1], (sizes[-1][0] + 1, sizes[-1][1])]
    assert rle.rle_problem(texts, wrong)[0] == len(found) - 1


def test_large_masks_and_several_chunks(monkeypatch):
    monkeypatch.setattr(rle, "_CHUNK", 2)
    rng = np.random.default_rng(0)
    found = [(rng.random((700, 900)) < share).astype("uint8") for share in (0, 0.001, 0.5, 0.9, 1)]
    texts, sizes = [counts(m) for m in found], [m.shape for m in found]
    assert rle.rle_problem(texts, sizes) is None
    assert rle.rle_problem(texts, [*sizes[:4], (700, 901)])[0] == 4


@pytest.mark.parametrize(
    "text, words",
    [("", "without counts"), ("~~", "never writes"), ("é1", "never writes"), ("P", "cut off"),
     ("PPPPPPPPPP1", "longer than any image"), ("O", "negative")],
)  # fmt: skip
def test_nonsense_is_named(text, words):
    good = counts(np.ones((4, 4), "uint8"))
    index, problem = rle.rle_problem([good, text], [(4, 4), (4, 4)])
    assert index == 1 and words in problem
