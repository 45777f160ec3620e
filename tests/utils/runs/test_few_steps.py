"""The losses that a run makes of its options, and on what its students are watched."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from tests.experts import HIGH, LOW, options
from tests.tiny import TINY_SHAPE, tiny_shape, tiny_transformer
from utils.adapters.attach import AdapterOptions, AdapterPlan, LoraAdapter
from utils.adapters.lora import speaking
from utils.common.decisions import Decisions
from utils.encoding.conditioning import Batch, Cond
from utils.runs.few_steps import make_few_steps, watch_variety
from utils.training.experts import Experts
from utils.training.few_step import CRITIC, STUDENT, FewStep
from utils.training.phases import Phase
from utils.training.variety import Variety
from wan.configs import FAMILIES, Family

A14B, TI2V = FAMILIES["wan2.2-t2v-A14B"], FAMILIES["wan2.2-ti2v-5B"]
NEGATIVE = torch.ones(3, TINY_SHAPE.text_dim)
TOKENS = 40  # of the largest batch


@dataclass
class Planned:
    tokens: int


def inputs_of(family: Family, flags: str = "") -> tuple[SimpleNamespace, dict[str, LoraAdapter], Experts]:
    """As much of a run's inputs as the losses need, with small experts."""
    plan = AdapterPlan(AdapterOptions(lora_rank=2), copies=(CRITIC,))
    adapters = {each.name: plan.attach(tiny_transformer(tiny_shape(family))) for each in family.experts}
    experts = Experts({name: each.model for name, each in adapters.items()}, family.boundaries, torch.device("cpu"))
    inputs = SimpleNamespace(
        roles=options(f"--few_step {flags}").roles(family),
        files=SimpleNamespace(family=family),
        texts=SimpleNamespace(negative=NEGATIVE),
        size=(64, 48),
        high=None,
        plan=SimpleNamespace(largest_batch=[Planned(TOKENS // 2), Planned(TOKENS // 2)], seed=5),
    )
    return inputs, adapters, experts


@pytest.mark.parametrize(
    ("flags", "names", "sigmas"),
    [("", [HIGH, LOW], [3, 1]), ("--expert low", [LOW], [1]), ("--expert high --denoising_steps 8", [HIGH], [6])],
)
def test_each_expert_in_training_has_its_losses(flags, names, sigmas):
    inputs, adapters, experts = inputs_of(A14B, flags)
    found = make_few_steps(inputs, adapters, experts)
    assert list(found) == names and [len(each.sigmas) for each in found.values()] == sigmas
    assert all(each.model is adapters[name].model and each.negative is NEGATIVE for name, each in found.items())


@pytest.mark.parametrize(("flags", "share"), [("", 0.5), ("--i2v_probability 1", 1.0), ("--i2v_probability 0", 0.0)])
def test_of_the_samples_as_many_are_given_their_first_frame_as_the_run_says(flags, share):
    inputs, adapters, experts = inputs_of(TI2V, flags)
    (found,) = make_few_steps(inputs, adapters, experts).values()
    assert found.held_share == share == inputs.roles[0].opts.held_share


# -------------------------------------------------------------------------------------------------- what is watched


def clip(height: int, width: int) -> Batch:
    """A clip whose latents say how large it is."""
    return Batch(torch.full((1, 16, 2, height, width), float(height)), Cond(torch.zeros(1, 5, TINY_SHAPE.text_dim)))


CLIPS = [clip(8, 8), clip(4, 6), clip(6, 8)]


def students(few_steps: dict[str, FewStep], spoken: list[str]) -> list[Phase]:
    """The phases of students, which note when they speak."""

    def span(name: str, model):
        spoken.append(name)
        return speaking(model, STUDENT)

    return [
        Phase(
            f"{name}_student", lambda n=name, f=few_step: span(n, f.model), None, None, None, None, (), few_step.model
        )
        for name, few_step in few_steps.items()
    ]


@pytest.fixture
def measured(monkeypatch) -> list[Variety]:
    """The varieties whose teacher was measured, each found to be as large as how many there were."""
    seen: list[Variety] = []
    monkeypatch.setattr(Variety, "of_teacher", lambda self: seen.append(self) or float(len(seen)))
    return seen


def test_each_student_is_watched_on_the_smallest_clip_as_its_own_expert(measured):
    inputs, adapters, experts = inputs_of(A14B)
    few_steps, spoken, decisions = make_few_steps(inputs, adapters, experts), [], Decisions("cpu")
    found = watch_variety(inputs, few_steps, students(few_steps, spoken), CLIPS, decisions)
    assert list(found) == ["high_noise_student", "low_noise_student"] and spoken == [HIGH, LOW]
    assert [each.few_step for each in found.values()] == [*few_steps.values()] == [each.few_step for each in measured]
    assert [each.taught for each in found.values()] == [1.0, 2.0]
    kept = {name: value.split()[0] for name, value in decisions.made.items()}
    assert kept == {"variety_high_noise_student": "1.0", "variety_low_noise_student": "2.0"}
    for each in found.values():
        assert torch.equal(each.batch.latents, CLIPS[1].latents) and each.seed == 5


def test_as_many_samples_go_through_the_model_as_the_largest_batch_has_tokens(measured):
    inputs, adapters, experts = inputs_of(A14B, "--expert low")
    few_steps = make_few_steps(inputs, adapters, experts)
    for clips, count in ((CLIPS, 3), (CLIPS[:1], 1), ([clip(16, 16)], 1)):  # of 12, 32 and 128 tokens
        (found,) = watch_variety(inputs, few_steps, students(few_steps, []), clips, Decisions("cpu")).values()
        assert found.at_once == count


def test_a_resumed_run_measures_no_teacher_again(measured):
    inputs, adapters, experts = inputs_of(A14B, "--expert low")
    few_steps, decisions = make_few_steps(inputs, adapters, experts), Decisions("cpu")
    watch_variety(inputs, few_steps, students(few_steps, []), CLIPS, decisions)
    resumed = replace(decisions, saved=decisions.table(), made={})
    (found,) = watch_variety(inputs, few_steps, students(few_steps, []), CLIPS, resumed).values()
    assert len(measured) == 1 and found.taught == 1.0 and resumed.table() == decisions.table()


def test_what_would_change_the_teachers_samples_lets_it_be_measured_again(measured):
    inputs, adapters, experts = inputs_of(A14B, "--expert low")
    few_steps, decisions = make_few_steps(inputs, adapters, experts), Decisions("cpu")
    watch_variety(inputs, few_steps, students(few_steps, []), CLIPS, decisions)
    other = {name: replace(each, guidance=9.0) for name, each in few_steps.items()}
    for changed, clips in ((other, CLIPS), (few_steps, CLIPS[:1])):
        resumed = replace(decisions, saved=decisions.table(), made={})
        watch_variety(inputs, changed, students(changed, []), clips, resumed)
        assert resumed.made["variety_low_noise_student"].split()[0] == str(float(len(measured)))
    assert len(measured) == 3


def test_a_video_is_watched_rather_than_a_still_and_a_still_only_where_it_shows_something(measured):
    still = replace(clip(2, 2), latents=torch.zeros(1, 16, 1, 2, 2))
    for family, clips, watched in ((A14B, [still, *CLIPS], CLIPS[1]), (A14B, [still], still), (TI2V, [still], None)):
        inputs, adapters, experts = inputs_of(family)
        few_steps = make_few_steps(inputs, adapters, experts)
        found = watch_variety(inputs, few_steps, students(few_steps, []), clips, Decisions("cpu"))
        shapes = {each.batch.latents.shape for each in found.values()}
        assert shapes == ({watched.latents.shape} if watched else set())


def test_without_clips_nothing_is_watched(measured):
    inputs, adapters, experts = inputs_of(A14B)
    few_steps = make_few_steps(inputs, adapters, experts)
    assert watch_variety(inputs, few_steps, students(few_steps, []), [], Decisions("cpu")) == {} and not measured
