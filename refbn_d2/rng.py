"""Random numbers that depend on what they are for and not on what was drawn before."""

import random
from contextlib import contextmanager
from typing import Iterator

import numpy as np
import torch

__all__ = ["derived_seed", "forked_rng", "seed_rng"]


def derived_seed(*key: int) -> int:
    """A seed in [0, 2**32) for each sequence of whole numbers >= 0, as if drawn at random."""
    # Without its length a key would be that of one with zeros behind it.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1)[0])


def seed_rng(seed: int) -> None:
    """Seeds torch, NumPy and ``random`` of this process, and its GPU if it uses one."""
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed: where CUDA has not started, that queues a call for when it does, with
    # the stack as text. It would take 0.7 ms of each image, and memory that never comes back.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


@contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Seeds torch, NumPy and ``random``, and puts their states back when the block ends."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # This process's device only: asking for another one's state would take memory on it. A data
    # loader's worker has none.
    gpu_state = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    seed_rng(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state)
