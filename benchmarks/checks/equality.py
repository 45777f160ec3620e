"""Whether all strategies compute the same numbers, bit for bit: fused blocks with a bf16 stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks.numbers import Numbers, measure
from benchmarks.measure import FAILED, Clock, Row, Sizes, skipped
from benchmarks.models import fused, our_trainee, random_inputs

REFERENCE = "none"
OTHERS = ("selective", "full", "offload")


def check(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """Each strategy against one that keeps everything. Kernels may differ from run to run, so that runs twice."""
    inputs = random_inputs(sizes, sizes.video, device)

    def run(strategy: str) -> Numbers:
        return measure(lambda: our_trainee(sizes.shape, sizes, device, memory=fused(strategy)), inputs)

    with deterministic():
        reference, again = run(REFERENCE), run(REFERENCE)
        repeats = differing(reference, again) == 0
        yield differing_row(f"{REFERENCE}, twice", reference, again, "" if repeats else "not deterministic")
        for strategy in OTHERS:
            try:
                verdict = FAILED if repeats else "as two runs of one"
                yield differing_row(f"{strategy} and {REFERENCE}", reference, run(strategy), verdict)
            except torch.OutOfMemoryError:
                yield skipped(strategy, "out of memory")


@contextmanager
def deterministic() -> Iterator[None]:
    """torch chooses deterministic kernels where it has them, and fills no new memory, which would take longer still."""
    settings: Any = torch.utils.deterministic  # what is set there is not declared
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = filled


def differing_row(name: str, reference: Numbers, other: Numbers, otherwise: str, what: str = "gradients") -> Row:
    """How many gradients differ, and how far; `otherwise` is the verdict where any number does."""
    count = differing(reference, other)
    far = max(_distance(a, b) for a, b in zip(reference[1], other[1], strict=True))
    loss = "equal" if reference[0] == other[0] else f"differs by {abs(reference[0] / other[0] - 1):.2g}"
    of = f"of {len(reference[1])} {what}; the worst by {far:.2g} of its norm; the loss {loss}"
    return Row(f"{name}: that differ", count, "", of, otherwise if count else "equal")


def differing(reference: Numbers, other: Numbers) -> int:
    """How many gradients are not the same bit for bit; one more if the loss is not."""
    pairs = zip(reference[1], other[1], strict=True)
    return sum(not torch.equal(a, b) for a, b in pairs) + (reference[0] != other[0])


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).double().norm() / a.double().norm()).item()
