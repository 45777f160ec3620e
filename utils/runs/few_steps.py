"""Few-step distillation in a run: the losses of its experts, and what is watched at validation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from utils.adapters.attach import LoraAdapter
from utils.common.decisions import Decisions
from utils.data.plan import count_batch
from utils.encoding.conditioning import Batch
from utils.runs.inputs import Inputs
from utils.training.distillation import distil
from utils.training.experts import Experts
from utils.training.few_step import FewStep
from utils.training.phases import Phase
from utils.training.variety import Variety, corner


def make_few_steps(inputs: Inputs, adapters: Mapping[str, LoraAdapter], experts: Experts) -> dict[str, FewStep]:
    """The losses of each expert in training, by its name."""
    assert inputs.texts.negative is not None
    family, negative = inputs.files.family, inputs.texts.negative
    losses = {
        role.name: distil(role, adapters, experts, family, inputs.size, negative, inputs.high) for role in inputs.roles
    }
    return {role.name: replace(losses[role.name], held_share=role.opts.held_share) for role in inputs.roles}


def watch_variety(
    inputs: Inputs,
    few_steps: Mapping[str, FewStep],
    students: Sequence[Phase],
    clips: Sequence[Batch],
    decisions: Decisions,
) -> dict[str, Variety]:
    """What is measured of each student at validation, by its phase, on the smallest clip; nothing without one.

    A video if there is any, since a still shows no motion; of a model that is given frames a still shows nothing.
    Measures the teachers, which takes a while.
    """
    videos = [clip for clip in clips if clip.latents.shape[2] > 1]
    clips = videos if videos or inputs.files.family.given else clips
    if not clips:
        return {}
    clip, found = min(clips, key=lambda clip: clip.latents.numel()), {}
    for few_step, phase in zip(few_steps.values(), students, strict=True):
        patch, device = phase.model.shape.patch_size, few_step.negative.device
        batch = corner(clip, patch).to(device)
        at_once = max(1, count_batch(inputs.plan.largest_batch) // batch.tokens(patch))
        with phase.speaking():
            variety = Variety(few_step, batch, inputs.plan.seed, at_once)
            found[phase.name] = variety.with_teacher(phase.name, decisions)
    return found
