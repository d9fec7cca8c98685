"""Random numbers that depend on their purpose and not on the numbers drawn before."""

import random
from contextlib import contextmanager
from typing import Iterator

import numpy as np
import torch

__all__ = ["derived_seed", "forked_rng", "seed_rng"]


def derived_seed(*key: int) -> int:
    """Hashes integers >= 0 to a seed in [0, 2**32)."""
    # SeedSequence ignores trailing zeros. The length makes (1,) and (1, 0) different keys.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1)[0])


def seed_rng(seed: int) -> None:
    """Seeds torch, NumPy and ``random`` of this process, and its GPU if CUDA is initialized."""
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed: before CUDA is initialized, each call appends a deferred call with a
    # stack trace to a list. That would take 0.7 ms per image, and memory that is never freed.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


@contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Context manager that seeds torch, NumPy and ``random``, and restores their states at exit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Only the current device: querying the state of another device would allocate memory there.
    # CUDA is not initialized in the workers of a data loader.
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
