"""A scope with its own random state."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MAX_SEED = 2**32 - 1  # the largest that every generator takes


@contextmanager
def temp_rng(seed: int) -> Iterator[None]:
    """Seeds Python's and torch's random states inside the scope and restores them on leaving, also on an exception."""
    python_state = random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
