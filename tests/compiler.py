"""Tests of what a compiler makes are skipped where there is none."""

from functools import cache

import pytest
import torch

from utils.training.compilation import why_not


@cache
def missing() -> str | None:
    """Why nothing can be compiled for the CPU; None where it can."""
    return why_not(torch.device("cpu"))


def need_compiler() -> None:
    """Skips the test that calls this where nothing can be compiled."""
    if missing():
        pytest.skip(f"no working C++ compiler: {missing()}")
