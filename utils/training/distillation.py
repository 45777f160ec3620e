"""Few-step distillation: its options, and what they mean for each expert of a family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from utils.adapters.attach import LoraAdapter
from utils.adapters.beside import Chosen, beside
from utils.adapters.choosing import choose_lora_of
from utils.adapters.stated_steps import StatedSteps, read_statement
from utils.common.errors import UserError
from utils.common.options import option
from utils.diffusion.few_step import own_steps, step_sigmas
from utils.diffusion.flow import NUM_TIMESTEPS
from utils.training.experts import Experts, Role
from utils.training.few_step import Diversity, FewStep, Upper
from wan.checkpoints import ModelFiles
from wan.configs import Expert, Family

Opts = TypeVar("Opts", bound="FewStepOptions")
DATA, ROLLOUT = INPUTS = ("data", "rollout")


@dataclass(frozen=True)
class FewStepOptions:
    """distillation into a few steps"""

    few_step: bool = option(False, "train a LoRA with which the model needs a few steps and no guidance")
    denoising_steps: int = option(
        4,
        "number of these steps, even before the shift",
        minimum=1,
        maximum=NUM_TIMESTEPS,
        requires="few_step",
    )
    denoising_step_indices_list: tuple[float, ...] = option(
        (),
        "these steps themselves, on the scale from 1000 (noise) to 0 before the shift, such as 1000 750 500 250",
        minimum=0.001,
        maximum=NUM_TIMESTEPS,
        requires="few_step",
    )
    few_step_shift: float | None = option(
        None,
        "shift of these steps, and of the noise levels at which the models are compared (default: the model's)",
        minimum=0.01,
        maximum=1000,
        requires="few_step",
    )
    gen_update_interval: int = option(
        5, "each step trains the critic, every N-th the LoRA too", minimum=1, requires="few_step"
    )
    learning_rate_critic: float | None = option(
        None, "learning rate of the critic (default: --learning_rate)", minimum=0, requires="few_step"
    )
    critic_alignment: float = option(
        0.0,
        "share by which the critic is moved towards the LoRA after each update of that; try 0.03",
        minimum=0,
        maximum=1,
        requires="few_step",
    )
    real_guidance_scale: float | None = option(
        None,
        "guidance that is distilled, uncond + N * (cond - uncond), 1: none (default: that of the model, or expert)",
        minimum=0,
        requires="few_step",
    )
    diversity_weight: float = option(
        0.25,
        "weight of a loss that keeps samples varied: how far the LoRA's results are from the teacher's samples of the "
        "same noisy latents; 0: off",
        minimum=0,
        requires="few_step",
    )
    diversity_steps: int = option(
        8, "number of the teacher's steps in the samples of --diversity_weight", minimum=1, requires="few_step"
    )
    distill_input: str = option(
        DATA,
        "what the LoRA is trained on; data: clips with noise; rollout: its own samples, of which clips give the size "
        "and what the model is given",
        choices=INPUTS,
        requires="few_step",
    )
    high_lora: Path | None = option(
        None,
        "with --expert low and --distill_input rollout, the finished LoRA of the high-noise expert",
        requires="few_step",
    )

    @property
    def other_files(self) -> dict[str, Path | None]:
        """The files that training reads besides model and clips, by the names of their options."""
        return {"high_lora": self.high_lora}

    @property
    def rolls_out(self) -> bool:
        """Whether the student starts from its own samples."""
        return self.distill_input == ROLLOUT

    @property
    def denoising_list(self) -> tuple[float, ...]:
        """All steps on the 1000..0 scale before the shift; evenly spaced ones as ComfyUI's scheduler "simple" does."""
        count = self.denoising_steps
        even = (float(NUM_TIMESTEPS - int(index * (NUM_TIMESTEPS / count))) for index in range(count))
        return self.denoising_step_indices_list or tuple(even)

    def shift_of_steps(self, family: Family, size: tuple[int, int] | None = None) -> float:
        """That of the steps and of the noise levels, for videos of this (width, height); else for the family's size."""
        return family.shift_at(*(size or family.size)) if self.few_step_shift is None else self.few_step_shift

    def check_few_step(self, family: Family, experts: Sequence[Expert]) -> None:
        """Raises UserError for steps that cannot be trained, and for an expert of those in training without a step."""
        given, defaults = self.denoising_step_indices_list, FewStepOptions()
        if given and self.denoising_steps != defaults.denoising_steps:
            raise UserError("--denoising_steps and --denoising_step_indices_list exclude each other: give one of them")
        if list(given) != sorted(set(given), reverse=True):
            listed = " ".join(f"{step:g}" for step in given)
            raise UserError(f"--denoising_step_indices_list {listed} must descend, such as 1000 750 500 250")
        if given and given[0] != NUM_TIMESTEPS:
            raise UserError(f"--denoising_step_indices_list begins at {given[0]:g}: it must begin at 1000, with noise")
        if not self.diversity_weight and self.diversity_steps != defaults.diversity_steps:
            raise UserError("--diversity_steps would be ignored: --diversity_weight is 0")
        for expert in experts:
            if not self.steps_of(expert, family):
                raise UserError(self._without_step(expert, family))
        self._check_start(family, experts)

    def _without_step(self, expert: Expert, family: Family) -> str:
        shift = self.shift_of_steps(family)
        levels = ", ".join(f"{NUM_TIMESTEPS * sigma:.0f}" for sigma in step_sigmas(self.denoising_list, shift))
        low, high = (f"{NUM_TIMESTEPS * sigma:.0f}" for sigma in expert.sigmas)
        return (
            f"the {expert.name} expert has no step: it answers from {low} to {high}, and the steps are at {levels}, "
            f"shifted by {shift:g}\ngive more --denoising_steps, or others as --denoising_step_indices_list"
        )

    def _check_start(self, family: Family, experts: Sequence[Expert]) -> None:
        low_alone = len(family.experts) > 1 and family.experts[0] not in experts
        if self.high_lora is not None and not (low_alone and self.rolls_out):
            raise UserError(
                "--high_lora would be ignored: it is for --expert low with --distill_input rollout, which begins with "
                "samples of the other expert"
            )
        if low_alone and self.rolls_out and self.high_lora is None:
            raise UserError(
                "--distill_input rollout with --expert low begins with samples of the high-noise expert: give its "
                "finished LoRA as --high_lora, or leave --distill_input out"
            )

    def steps_of(self, expert: Expert, family: Family, size: tuple[int, int] | None = None) -> list[float]:
        """The noise levels of one expert's steps, descending."""
        return own_steps(step_sigmas(self.denoising_list, self.shift_of_steps(family, size)), expert.sigmas)

    def guidance_of_teacher(self, expert: Expert) -> float:
        """The guidance that is distilled into an expert's LoRA."""
        return expert.guidance if self.real_guidance_scale is None else self.real_guidance_scale

    def passes(self, expert: Expert, family: Family) -> tuple[float, float]:
        """The passes in a step of an expert, on average: with gradients, and without.

        The student's update asks the teacher, with both texts unless its guidance is 1, and the critic; the critic's
        asks the student. Each may begin with a roll-out, through all steps of the expert above. From where the student
        answers the teacher samples too.
        """
        share, rolled = 1 / self.gen_update_interval, 0.0
        texts = 1 if self.guidance_of_teacher(expert) == 1 else 2
        sampled = self.diversity_steps + (expert.sigmas[0] > 0) if self.diversity_weight else 0
        taught = texts * (1 + sampled)
        if self.rolls_out:
            above = 0 if expert == family.experts[0] else len(self.steps_of(family.experts[0], family))
            rolled = above + (len(self.steps_of(expert, family)) - 1) / 2
        return 1 + share, 1 + (1 + taught) * share + (1 + share) * rolled

    def stated(self, family: Family, size: tuple[int, int]) -> list[StatedSteps]:
        """How a LoRA for videos of this (width, height) is sampled, where that differs from the model's own way."""
        steps = StatedSteps(self.denoising_list, self.shift_of_steps(family, size), "this run's LoRA")
        return [steps] if self.few_step else []


def finished_student(path: Path, opts: FewStepOptions, files: ModelFiles) -> Chosen:
    """The LoRA of the high-noise expert, from whose samples the other one begins.

    Raises UserError where the file is for another model or expert, or was distilled into other steps.
    """
    family = files.family
    chosen = choose_lora_of(path, family.experts[0].name, files)
    if chosen is None:
        raise UserError(f"--high_lora {path} is not for the {family.experts[0].name} expert")
    (own,), stated = opts.stated(family, family.size), read_statement(chosen.lora.metadata, path)
    if stated is None:
        raise UserError(f"--high_lora {path} was not distilled into few steps: give one that was, with --expert high")
    if (stated.timesteps, stated.shift) != (own.timesteps, own.shift):
        raise UserError(f"{stated}, but {own}: train both experts for the same steps")
    return chosen


def distil(
    role: Role[Opts],
    adapters: Mapping[str, LoraAdapter],
    experts: Experts,
    family: Family,
    size: tuple[int, int],
    negative: Tensor,
    high: Chosen | None,
) -> FewStep:
    """The losses of one expert's student and critic, for videos of about this (width, height).

    `adapters` are the students by the names of their experts; `high` is the finished LoRA of the expert above.
    """
    opts, upper = role.opts, None
    if opts.rolls_out and role.expert != family.experts[0]:
        above = family.experts[0]
        model = experts.models[above.name]
        span = partial(beside, model, [high], experts.device) if high else adapters[above.name].speaking
        upper = Upper(opts.steps_of(above, family, size), partial(experts.answering, above.name, span))
    return FewStep(
        adapters[role.name].model,
        opts.steps_of(role.expert, family, size),
        role.expert.sigmas,
        opts.shift_of_steps(family, size),
        opts.guidance_of_teacher(role.expert),
        negative,
        rolls_out=opts.rolls_out,
        upper=upper,
        diversity=Diversity(opts.diversity_weight, opts.diversity_steps),
    )
