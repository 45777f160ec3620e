"""What the training loop runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from utils.encoding.conditioning import Batch
from utils.training.learner import Update


@dataclass(frozen=True)
class Phase:
    """One update of a step: who speaks, a loss, and the update that it leads to.

    `speaking` opens a span in which one adapter of the model answers. It must hold forward and backward together: a
    checkpointed block runs again in the backward pass, and must meet the adapter that its forward met.
    `loss` maps a batch to a scalar; `step` clips, updates, and moves schedule and average. Metrics appear under `name`.

    Ordinary training is one phase. Two experts are two phases that take turns; a student and its critic are two that
    share a step.
    """

    name: str
    speaking: Callable[[], AbstractContextManager[None]]
    loss: Callable[[Batch], Tensor]
    step: Callable[[], Update]
