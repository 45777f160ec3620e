"""What the training loop runs, and all that its options decide."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Self, TypeVar

from torch import Tensor

from utils.adapters.attach import LoraAdapter
from utils.diffusion.flow import Predict
from utils.diffusion.objectives import Objective
from utils.encoding.conditioning import Batch, Cond, make_predict
from utils.storage.weights import StorageOptions
from utils.training.attention import AttentionOptions
from utils.training.experts import ExpertOptions, Experts, Role
from utils.training.learner import Learner, Update
from utils.training.memory import MemoryOptions
from utils.training.optim import Optimization
from utils.training.optimizers import ADAMW
from utils.training.planning import PlanOptions
from utils.training.preview import Previews
from utils.training.validation import Losses, Validation, quantiles, validation_loss
from wan.configs import Family
from wan.modules.model import WanModel

Opts = TypeVar("Opts", bound="TrainingOptions")


@dataclass(frozen=True)
class TrainingOptions(
    Objective,
    Optimization,
    ExpertOptions,
    StorageOptions,
    AttentionOptions,
    MemoryOptions,
    PlanOptions,
    Validation,
    Previews,
):
    """training"""

    def roles(self, family: Family) -> list[Role[Self]]:
        """As `ExpertOptions.roles`. Raises UserError too where a warm-up is as long as the training of its expert.

        And where a learning rate is not meant for the optimizer, or --idle_expert would be ignored.
        """
        roles = super().roles(family)
        # An expert that is not trained is loaded for previews.
        self.check_idle_expert(len(roles) if self.sample_prompts is None else len(family.experts))
        for role in roles:
            role.opts.check_warmup()
            role.opts.check_rate()
        return roles

    def describe_rate(self) -> str:
        """How fast is learned, and what."""
        distilled = f", guidance {1 + self.distill_cfg:g} distilled" if self.distill_cfg else ""
        by = "" if self.optimizer == ADAMW else f"{self.optimizer}, "
        return f"{by}learning rate {self.learning_rate:g}, shift {self.shift:g}{distilled}"


@dataclass(frozen=True)
class Phase:
    """One update of a step: who speaks, a loss, and the update that it leads to.

    `speaking` opens a span in which one adapter of the `model` answers. It must hold forward and backward together: a
    checkpointed block runs again in the backward pass, and must meet the adapter that its forward met. Inside,
    `predict` is the model's answer and `loss` maps a batch to a scalar. `step` clips, updates, and moves schedule and
    average; `taken` counts these updates. `sigmas` are the noise levels to validate at. Metrics appear under `name`.

    Ordinary training is one phase. Two experts are two phases that take turns; a student and its critic are two that
    share a step.
    """

    name: str
    speaking: Callable[[], AbstractContextManager[None]]
    predict: Predict[Cond]
    loss: Callable[[Batch], Tensor]
    step: Callable[[], Update]
    taken: Callable[[], int]
    sigmas: Sequence[float]
    model: WanModel

    def validate(self, clips: Iterable[Batch], seed: int) -> Losses:
        """The losses on these clips, on the device, at the noise levels of the phase."""
        with self.speaking():
            return Losses(validation_loss(self.predict, clips, seed, self.sigmas), self.sigmas)


def make_phase(
    role: Role[Opts],
    adapter: LoraAdapter,
    experts: Experts,
    learner: Learner,
    loss: Callable[..., Tensor],
) -> Phase:
    """The update of one LoRA: it speaks, forward and backward, and its optimizer follows.

    `loss` maps a batch to a scalar, given the role's `opts` and `sigmas`, and the `model`.
    """
    loss = partial(loss, opts=role.opts, sigmas=role.sigmas, model=adapter.model)
    update = partial(learner.update, role.trainable, role.opts.max_grad_norm)
    span = partial(experts.speaking, role.name, adapter.speaking)
    updater = learner.trainables[role.trainable].updater
    sigmas = quantiles(*role.expert.sigmas)
    predict, model = make_predict(adapter.model), adapter.model
    return Phase(role.phase, span, predict, loss, update, lambda: updater.step_count, sigmas, model)


@dataclass(frozen=True)
class Schedule:
    """Which phases each step has: those of whose turn it is, `length` steps in a row, until each has taken its own.

    Ordinary training has one turn of one phase, two experts have two. All turns have as many phases.
    """

    turns: Sequence[Sequence[Phase]]
    steps: Sequence[int]  # of each turn, in all
    length: int = 1

    @property
    def phases(self) -> list[Phase]:
        """The phases of all turns."""
        return [phase for phases in self.turns for phase in phases]

    @property
    def total_steps(self) -> int:
        """The steps of the run."""
        return sum(self.steps)

    def due(self) -> Sequence[Phase]:
        """The phases of the next step, all of which belong to it."""
        taken = [phases[0].taken() for phases in self.turns]
        return self.turns[in_turn(taken, self.steps, self.length)]

    def updates_before(self, step: int) -> int:
        """The number of phases in all of the steps before this one."""
        return step * len(self.turns[0])


def in_turn(taken: Sequence[int], steps: Sequence[int], length: int) -> int:
    """Whose turn it is where each has `taken` so many of its own `steps`: 0, 1, ... again and again, `length` each.

    Who has taken all of its steps is left out. An unfinished turn is finished first. Turns are counted from what each
    has taken, so that a run whose options have changed still gives each its own number.
    """
    left = [index for index, (count, total) in enumerate(zip(taken, steps, strict=True)) if count < total]
    unfinished = [index for index in left if taken[index] % length]
    return unfinished[0] if unfinished else min(left, key=lambda index: (taken[index] // length, index))
