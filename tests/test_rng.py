"""Derived seeds and forked random states."""

import random

import numpy as np
import pytest
import torch

from refbn_d2.rng import derived_seed, forked_rng


def _draw():
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def test_derived_seeds_tell_keys_apart():
    keys = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    keys += [(a, b) for a in range(1, 10) for b in range(1, 10)]
    seeds = [derived_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= s < 2**32 for s in seeds)
    assert seeds == [derived_seed(*key) for key in keys]


def test_forked_rng_seeds_and_restores():
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    expected = _draw()
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    with forked_rng(4):
        inside = _draw()
    assert _draw() == expected
    with forked_rng(4):
        assert _draw() == inside
    with forked_rng(5):
        assert all(a != b for a, b in zip(_draw(), inside))


def test_forked_rng_restores_after_an_error():
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    expected = _draw()
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    with pytest.raises(ZeroDivisionError), forked_rng(4):
        _draw()
        1 / 0  # noqa: B018
    assert _draw() == expected
