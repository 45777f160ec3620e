"""What LoRAs that were distilled into few steps say of how they are sampled, and the settings that follow from it.

Such a LoRA answers well at the steps that it was distilled into, and without guidance. Its metadata state the steps,
`denoising_steps` on the 0..1000 scale before the shift ("1000 750 500 250"), and the `shift`. Each half of a pair of
experts states all steps of both. Every LoRA of the trainer has a `shift`, which says nothing of sampling by itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from utils.adapters.beside import Chosen
from utils.adapters.lora_file import LoraError, shown
from utils.common.errors import UserError
from utils.common.formatting import counted
from wan.text2video import Sampler
from wan.utils.fm_solvers import LCM, NUM_TIMESTEPS

STEPS_KEY, SHIFT_KEY = "denoising_steps", "shift"  # of a LoRA file's metadata


@dataclass(frozen=True)
class StatedSteps:
    """The steps that a LoRA was distilled into, by the solver "lcm" and without guidance."""

    timesteps: tuple[float, ...]  # descending, 0..1000 before the shift
    shift: float
    source: str  # who says so, for messages: a file

    @property
    def metadata(self) -> dict[str, str]:
        """What the LoRA's file says."""
        return {STEPS_KEY: to_text(self.timesteps), SHIFT_KEY: f"{self.shift:.9g}"}

    def __str__(self) -> str:
        """For people: "fast.safetensors was distilled into 4 steps (1000 750 500 250) at shift 5"."""
        steps = f"{counted(len(self.timesteps), 'step')} ({to_text(self.timesteps)})"
        return f"{self.source} was distilled into {steps} at shift {self.shift:g}"


@dataclass(frozen=True)
class Asked:
    """What a user asks of sampling; what is None, or empty, is left open. `prefix` is that of the flags' names."""

    steps: int | None = None
    solver: str | None = None
    guidance: tuple[float, ...] = ()
    shift: float | None = None
    prefix: str = "--"


def to_text(timesteps: Sequence[float]) -> str:
    """A list of steps as metadata hold it: "1000 750 500 250"."""
    return " ".join(f"{timestep:.9g}" for timestep in timesteps)


def read_statement(metadata: Mapping[str, str], source: object) -> StatedSteps | None:
    """What a LoRA's metadata state, None where they state no steps. Raises LoraError for a damaged statement."""
    if STEPS_KEY not in metadata:
        return None
    steps = [_number(word) for word in metadata[STEPS_KEY].split()]
    is_descending = all(earlier > later for earlier, later in pairwise(steps))
    if not steps or not is_descending or not all(0 < step <= NUM_TIMESTEPS for step in steps):
        raise LoraError(
            f"{source}: the metadata {STEPS_KEY} is '{shown(metadata[STEPS_KEY])}', not a list of steps from "
            f"{NUM_TIMESTEPS} down, such as '1000 750 500 250'. The file is damaged."
        )
    shift = _number(metadata.get(SHIFT_KEY, ""))
    if not 0 < shift < math.inf:
        stated = f"is '{shown(metadata[SHIFT_KEY])}'" if SHIFT_KEY in metadata else "is missing"
        raise LoraError(
            f"{source}: it was distilled into the steps {to_text(steps)}, but the metadata {SHIFT_KEY}, a positive "
            f"number, {stated}. The file is damaged."
        )
    return StatedSteps(tuple(steps), shift, str(source))


def statements(loras: Mapping[str, Sequence[Chosen]]) -> list[StatedSteps]:
    """What the LoRAs of all transformers state, in their order. Raises LoraError for a damaged statement."""
    found = [read_statement(each.lora.metadata, each.path or "a LoRA") for loras in loras.values() for each in loras]
    return [statement for statement in dict.fromkeys(found) if statement is not None]


def choose_sampler(usual: Sampler, asked: Asked, stated: Sequence[StatedSteps] = ()) -> Sampler:
    """The `usual` settings, or those that LoRAs state in place of them, and what is asked in place of either.

    Another number of steps than the stated one is taken evenly. Another solver than "lcm" takes as many steps as are
    stated, by its own schedule. Raises UserError for another number of guidances than the model has experts, and where
    LoRAs state different things, of which nothing is asked.
    """
    experts = len(usual.boundaries) + 1
    if len(asked.guidance) not in (0, 1, experts):
        values = f"{asked.prefix}guidance has {len(asked.guidance)} values"
        raise UserError(f"{values}, but the model {counted(experts, 'expert')}")
    steps: tuple[float, ...] = ()
    if stated:
        _check_agreement(stated, asked)
        steps, shift = stated[0].timesteps, stated[0].shift
        usual = replace(usual, solver=LCM, steps=len(steps), guidance=(1.0,), shift=shift)
    sampler = replace(
        usual,
        solver=asked.solver or usual.solver,
        steps=asked.steps or usual.steps,
        guidance=asked.guidance or usual.guidance,
        shift=asked.shift or usual.shift,
    )
    is_stated = sampler.solver == LCM and sampler.steps == len(steps) and _agree_on_steps(stated)
    return replace(sampler, timesteps=steps) if is_stated else sampler


def _check_agreement(stated: Sequence[StatedSteps], asked: Asked) -> None:
    """Raises UserError where statements differ in what is not asked."""
    first = stated[0]
    for other in stated[1:]:
        differing = {
            "steps": first.timesteps != other.timesteps and asked.steps is None,
            "shift": first.shift != other.shift and asked.shift is None,
        }
        if any(differing.values()):
            flags = " and ".join(f"{asked.prefix}{name}" for name, differs in differing.items() if differs)
            raise UserError(
                f"{first}, and {other}: nothing can be sampled both ways.\nLeave out one of them, or say how to sample "
                f"with {flags}."
            )


def _agree_on_steps(stated: Sequence[StatedSteps]) -> bool:
    return len({statement.timesteps for statement in stated}) == 1


def _number(text: str) -> float:
    """A number in a text, NaN where there is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
