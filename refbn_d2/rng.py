"""Random numbers that depend on what they are for and not on what was drawn before."""

import random
from contextlib import contextmanager
from typing import Iterator

import numpy as np
import torch
from detectron2.utils.env import seed_all_rng

__all__ = ["derived_seed", "forked_rng"]


def derived_seed(*key: int) -> int:
    """A seed in [0, 2**32) for each sequence of whole numbers >= 0, as if drawn at random."""
    # Without its length a key would be that of one with zeros behind it.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1)[0])


@contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Seeds torch, NumPy and ``random``, and puts their states back when the block ends."""
    states = random.getstate(), np.random.get_state()
    # This process's device only: asking for another one's state would take memory on it. A data
    # loader's worker has none.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        # seed_all_rng announces itself only for seed None.
        seed_all_rng(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
