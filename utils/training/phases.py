"""What the training loop runs, and all that its options decide."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Self, TypeVar

from utils.adapters.attach import LoraAdapter
from utils.common.errors import UserError
from utils.common.formatting import counted
from utils.diffusion.flow import NUM_TIMESTEPS, Predict
from utils.diffusion.objectives import Loss, Objective
from utils.encoding.conditioning import Batch, Cond, make_predict
from utils.storage.weights import StorageOptions
from utils.training.attention import AttentionOptions
from utils.training.distillation import FewStepOptions
from utils.training.experts import OWN_RANGE, ExpertOptions, Experts, Role
from utils.training.few_step import CRITIC, STUDENT, FewStep
from utils.training.learner import Learner, Trainable, Update
from utils.training.memory import MemoryOptions
from utils.training.optim import Optimization
from utils.training.optimizers import ADAMW, OptimizerSpec
from utils.training.planning import PlanOptions
from utils.training.preview import Previews
from utils.training.validation import Losses, Validation, quantiles, validation_loss
from wan.configs import Expert, Family
from wan.modules.model import WanModel

Opts = TypeVar("Opts", bound="TrainingOptions")


@dataclass(frozen=True)
class TrainingOptions(
    Objective,
    FewStepOptions,
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

        And where a learning rate is not meant for the optimizer, --idle_expert would be ignored, or few steps cannot be
        distilled so.
        """
        roles = super().roles(family)
        if self.few_step:
            self.check_few_step(family, [role.expert for role in roles])
            self._check_objective(min(role.opts.max_train_steps for role in roles))
        self.check_idle_expert(len(family.experts) if self.needs_others_for else len(roles))
        for role in roles:
            role.opts.check_warmup()
            role.opts.check_rate()
            if self.few_step:
                replace(role.opts, learning_rate=role.opts.spec_of(CRITIC).learning_rate).check_rate()
        return roles

    @property
    def needs_others_for(self) -> list[str]:
        """What an expert that is not trained is loaded for; empty where it is not."""
        previews = [] if self.sample_prompts is None else ["previews (--sample_prompts)"]
        return previews + ([] if self.high_lora is None else ["samples to begin with (--high_lora)"])

    def _check_objective(self, num_steps: int) -> None:
        """Raises UserError for options that would be ignored, and for a run in which the LoRA has no update."""
        if self.distill_cfg:
            raise UserError("--few_step distils guidance too, see --real_guidance_scale: leave out --distill_cfg")
        if self.shift != Objective.shift:
            raise UserError("--shift would be ignored: with --few_step it is --few_step_shift")
        if self.expert_range != OWN_RANGE:
            raise UserError("--expert_range would be ignored: with --few_step an expert has its own noise levels")
        if self.mask_floor != Objective.mask_floor:
            raise UserError("--mask_floor would be ignored: --few_step compares distributions, not positions")
        if num_steps < self.gen_update_interval and not self.epochs:
            fewer = f"{counted(num_steps, 'step')} are fewer than --gen_update_interval {self.gen_update_interval}"
            raise UserError(f"{fewer}: the LoRA would not be trained.\nGive more --max_train_steps or --epochs")

    @property
    def batches_per_step(self) -> Fraction:
        """How many batches a step takes, on average: each update has its own."""
        updates = 1 + Fraction(1, self.gen_update_interval) if self.few_step else Fraction(1)
        return self.gradient_accumulation * updates

    def num_updates(self, name: str) -> int:
        """Those of one adapter in the whole run: of the LoRA, or of its critic."""
        is_rare = self.few_step and name != CRITIC
        return self.max_train_steps // self.gen_update_interval if is_rare else self.max_train_steps

    def spec_of(self, name: str) -> OptimizerSpec:
        """How one adapter learns. The LoRA and its critic warm up over the same steps of the run."""
        spec = self.optimizer_spec
        if not self.few_step:
            return spec
        if name == CRITIC:
            rate = self.learning_rate if self.learning_rate_critic is None else self.learning_rate_critic
            return replace(spec, learning_rate=rate)
        warmup = self.lr_warmup_steps // self.gen_update_interval
        return replace(spec, total_steps=self.num_updates(name), warmup_steps=warmup)

    def describe_rate(self, expert: Expert, family: Family) -> str:
        """How fast an expert's LoRA learns, and what."""
        distilled = f", guidance {1 + self.distill_cfg:g} distilled" if self.distill_cfg else ""
        by = "" if self.optimizer == ADAMW else f"{self.optimizer}, "
        if self.few_step:
            return f"{by}{self._describe_few_steps(expert, family)}"
        return f"{by}learning rate {self.learning_rate:g}, shift {self.shift:g}{distilled}"

    def _describe_few_steps(self, expert: Expert, family: Family) -> str:
        steps = ", ".join(f"{NUM_TIMESTEPS * sigma:.0f}" for sigma in self.steps_of(expert, family))
        rates = f"learning rate {self.learning_rate:g}, of its critic {self.spec_of(CRITIC).learning_rate:g}"
        count, every = counted(self.num_updates(STUDENT), "update"), self.gen_update_interval
        what = f"guidance {self.guidance_of_teacher(expert):g} distilled into steps at {steps}, on {self.distill_input}"
        return f"{rates}, {count}, one after each {every} of the critic; {what}"


@dataclass(frozen=True)
class Phase:
    """One update of a step: who speaks, a loss, and the update that it leads to.

    `speaking` opens a span in which one adapter of the `model` answers. It must hold forward and backward together: a
    checkpointed block runs again in the backward pass, and must meet the adapter that its forward met. Inside,
    `predict` is the model's answer and `loss` maps a batch to a scalar. `step` clips, updates, and moves schedule and
    average; `taken` counts these updates. `sigmas` are the noise levels to validate at. Metrics appear under `name`.

    Ordinary training is one phase. Two experts are two phases that take turns; a student and its critic are two that
    share a step. One that is not due in each step is due in the last of `every` so many of its turn.
    """

    name: str
    speaking: Callable[[], AbstractContextManager[None]]
    predict: Predict[Cond]
    loss: Callable[[Batch], Loss]
    step: Callable[[], Update]
    taken: Callable[[], int]
    sigmas: Sequence[float]
    model: WanModel
    every: int = 1

    def validate(self, clips: Iterable[Batch], seed: int) -> Losses:
        """The losses on these clips, on the device, at the noise levels of the phase."""
        with self.speaking():
            return Losses(validation_loss(self.predict, clips, seed, self.sigmas), self.sigmas)


def make_trainables(role: Role[Opts], adapter: LoraAdapter) -> list[Trainable]:
    """What is trained of a role: its LoRA, and in few-step distillation the critic, which is not exported."""
    opts = role.opts
    student = Trainable(role.trainable, adapter, opts.spec_of(STUDENT), opts.ema_decay)
    if not opts.few_step:
        return [student]
    return [student, Trainable(role.named(CRITIC), adapter.named(CRITIC), opts.spec_of(CRITIC), exported=False)]


def count_updates(role: Role[Opts]) -> dict[str, int]:
    """The updates in the whole run of what is trained of a role, by the names of `make_trainables`."""
    critic = {role.named(CRITIC): role.opts.num_updates(CRITIC)} if role.opts.few_step else {}
    return {role.trainable: role.opts.num_updates(STUDENT), **critic}


def make_phase(
    role: Role[Opts],
    adapter: LoraAdapter,
    experts: Experts,
    learner: Learner,
    loss: Callable[..., Loss],
) -> Phase:
    """The update of one LoRA: it speaks, forward and backward, and its optimizer follows.

    `loss` maps a batch to a loss, given the role's `opts` and `sigmas`, and the `model`.
    """
    loss = partial(loss, opts=role.opts, sigmas=role.sigmas, model=adapter.model)
    return _phase(role, adapter, experts, learner.trainables[role.trainable], learner, loss)


def make_few_step_phases(
    role: Role[Opts], adapter: LoraAdapter, experts: Experts, learner: Learner, few_step: FewStep
) -> list[Phase]:
    """The updates of a student, which is the LoRA, and of its critic."""
    critic, opts, name = adapter.named(CRITIC), role.opts, role.named(CRITIC)
    student = _phase(role, adapter, experts, learner.trainables[role.trainable], learner, few_step.student_loss)
    follower = _phase(role, critic, experts, learner.trainables[name], learner, few_step.critic_loss)

    def step() -> Update:
        update = student.step()
        # Implicit distribution alignment of SenseFlow, https://arxiv.org/abs/2506.00523: the critic follows the student
        # into what it has just become.
        if opts.critic_alignment:
            critic.take_values(adapter, opts.critic_alignment)
        return update

    student_name, every = role.named("student"), opts.gen_update_interval
    return [replace(student, name=student_name, step=step, every=every), replace(follower, name=name)]


def _phase(
    role: Role[Opts],
    adapter: LoraAdapter,
    experts: Experts,
    trainable: Trainable,
    learner: Learner,
    loss: Callable[[Batch], Loss],
) -> Phase:
    update = partial(learner.update, trainable.name, role.opts.max_grad_norm)
    span = partial(experts.speaking, role.name, adapter.speaking)
    sigmas, updater = quantiles(*role.expert.sigmas), trainable.updater
    predict, model = make_predict(adapter.model), adapter.model
    return Phase(role.phase, span, predict, loss, update, lambda: updater.step_count, sigmas, model)


@dataclass(frozen=True)
class Schedule:
    """Which phases each step has: those of whose turn it is, `length` steps in a row, until each has taken its own.

    Ordinary training has one turn of one phase, two experts have two. Of each turn one phase is due in every step.
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
        taken = [max(phase.taken() for phase in phases) for phases in self.turns]
        turn = in_turn(taken, self.steps, self.length)
        return [phase for phase in self.turns[turn] if (taken[turn] + 1) % phase.every == 0]

    @property
    def updates_taken(self) -> int:
        """The number of updates so far, of all phases."""
        return sum(phase.taken() for phase in self.phases)


def in_turn(taken: Sequence[int], steps: Sequence[int], length: int) -> int:
    """Whose turn it is where each has `taken` so many of its own `steps`: 0, 1, ... again and again, `length` each.

    Who has taken all of its steps is left out. An unfinished turn is finished first. Turns are counted from what each
    has taken, so that a run whose options have changed still gives each its own number.
    """
    left = [index for index, (count, total) in enumerate(zip(taken, steps, strict=True)) if count < total]
    unfinished = [index for index in left if taken[index] % length]
    return unfinished[0] if unfinished else min(left, key=lambda index: (taken[index] // length, index))
