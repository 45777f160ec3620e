"""What the training loop runs, and all that its options decide."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from utils.diffusion.objectives import Objective
from utils.encoding.conditioning import Batch
from utils.training.learner import Update
from utils.training.memory import MemoryOptions
from utils.training.optim import Optimization
from utils.training.preview import Previews
from utils.training.validation import Validation


@dataclass(frozen=True)
class TrainingOptions(Objective, Optimization, MemoryOptions, Validation, Previews):
    """training"""


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
