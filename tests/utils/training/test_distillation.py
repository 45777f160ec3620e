"""What the options of few-step distillation mean for each expert, and from what the low-noise one begins."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.adapted import fill
from tests.chosen import make_lora
from tests.experts import HIGH, LOW
from tests.tiny import TINY_SHAPE, tiny_shape, tiny_transformer, write_model
from utils.adapters.attach import AdapterOptions, AdapterPlan, LoraAdapter
from utils.adapters.beside import Chosen
from utils.adapters.lora import speaking
from utils.adapters.lora_file import delta
from utils.adapters.lora_writer import write_lora
from utils.common.errors import UserError
from utils.diffusion.few_step import step_sigmas
from utils.encoding.conditioning import Batch, Cond, make_predict
from utils.training.distillation import ROLLOUT, FewStepOptions, distil, finished_student
from utils.training.experts import Experts, Role
from utils.training.few_step import CRITIC, STUDENT, Diversity, FewStep
from wan.checkpoints import ModelFiles, open_model
from wan.configs import FAMILIES, Family
from wan.utils.fm_solvers import few_step_grid

I2V, T2V, SMALL = (FAMILIES[name] for name in ("wan2.2-i2v-A14B", "wan2.2-t2v-A14B", "wan2.1-i2v-14B-480P"))
SINGLE = FAMILIES["wan2.1-t2v-1.3B"]
CPU = torch.device("cpu")
SIZE = (64, 48)


def options(**changes) -> FewStepOptions:
    return FewStepOptions(few_step=True, **changes)


# ---------------------------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize(
    ("count", "steps"),
    [(4, (1000, 750, 500, 250)), (3, (1000, 667, 334)), (8, (1000, 875, 750, 625, 500, 375, 250, 125)), (1, (1000,))],
)
def test_even_steps_are_those_of_comfyuis_simple_schedule(count, steps):
    assert options(denoising_steps=count).denoising_list == steps


def test_every_number_of_even_steps_is_where_a_sampler_takes_them():
    for count in (*range(1, 101), 122, 500, 999, 1000):
        grid = few_step_grid(count, 5.0)
        assert step_sigmas(options(denoising_steps=count).denoising_list, 5.0) == pytest.approx(grid, abs=1e-9), count


def test_listed_steps_are_taken_as_they_are():
    assert options(denoising_step_indices_list=(1000.0, 937.5, 500.0)).denoising_list == (1000.0, 937.5, 500.0)


@pytest.mark.parametrize(
    ("family", "high", "low"),
    [(I2V, [1000, 937.5], [833.333333, 625]), (T2V, [1000, 972.972973, 923.076923], [800])],
    ids=["i2v", "t2v"],
)
def test_the_steps_are_divided_between_the_experts_at_their_boundary(family, high, low):
    found = [options().steps_of(expert, family) for expert in family.experts]
    assert [[1000 * sigma for sigma in own] for own in found] == [pytest.approx(high), pytest.approx(low)]


def test_a_step_at_the_boundary_itself_is_the_high_ones():
    """2/3 of 1000 at shift 4.5 is at 0.9, though not in floating point."""
    opts = options(denoising_step_indices_list=(1000.0, 2000 / 3, 250.0), few_step_shift=4.5)
    high, low = (opts.steps_of(expert, I2V) for expert in I2V.experts)
    assert high == [1.0, 0.9] and len(low) == 1


@pytest.mark.parametrize(
    ("family", "size", "shift"),
    [
        (I2V, None, 5),
        (T2V, None, 12),
        (SMALL, None, 3),
        (SMALL, (832, 480), 3),
        (SMALL, (1280, 720), 5),
        (SINGLE, (64, 64), 5),
    ],
)
def test_the_shift_is_that_of_the_family_for_this_size_unless_another_is_given(family, size, shift):
    assert options().shift_of_steps(family, size) == shift
    assert options(few_step_shift=7.0).shift_of_steps(family, size) == 7
    (first, *_), levels = family.experts, step_sigmas((1000.0, 750.0), shift)
    assert options(denoising_steps=4).steps_of(first, family, size)[:2] == levels


@pytest.mark.parametrize(("family", "guidance"), [(I2V, [3.5, 3.5]), (T2V, [4, 3]), (SINGLE, [5])])
def test_the_guidance_that_is_distilled_is_that_of_each_expert(family, guidance):
    assert [options().guidance_of_teacher(expert) for expert in family.experts] == guidance
    given = options(real_guidance_scale=1.0)
    assert {given.guidance_of_teacher(expert) for expert in family.experts} == {1}


@pytest.mark.parametrize(
    ("changes", "high", "low"),
    [
        ({"diversity_weight": 0.0}, 1.6, 1.6),
        ({}, 1.6 + 0.2 * 2 * 9, 1.6 + 0.2 * 2 * 8),  # with an answer at the boundary
        ({"diversity_steps": 4}, 1.6 + 0.2 * 2 * 5, 1.6 + 0.2 * 2 * 4),
        ({"diversity_steps": 4, "real_guidance_scale": 1.0}, 1.4 + 0.2 * 5, 1.4 + 0.2 * 4),  # one text
    ],
)
def test_passes_count_the_teachers_samples(changes, high, low):
    found = [options(**changes).passes(expert, T2V) for expert in T2V.experts]
    assert found == [(1.2, pytest.approx(high)), (1.2, pytest.approx(low))]


def test_a_lora_states_all_steps_of_both_experts_and_the_shift_of_its_size():
    (stated,) = options().stated(I2V, I2V.size)
    assert stated.metadata == {"denoising_steps": "1000 750 500 250", "shift": "5"}
    assert [each.shift for size in ((832, 480), (1280, 720)) for each in options().stated(SMALL, size)] == [3, 5]
    assert FewStepOptions().stated(I2V, I2V.size) == []


# ------------------------------------------------------------------------------------------------- the finished student


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.2-T2V-A14B", T2V))


def written(path: Path, opts: FewStepOptions | None, expert: str = HIGH) -> Path:
    """A LoRA of one layer that was distilled so, or not at all."""
    stated = opts.stated(T2V, T2V.size)[0].metadata if opts else {"shift": "12"}
    write_lora(path, replace(make_lora(0.1), metadata={"expert": expert, **stated}))
    return path


def test_a_finished_student_of_the_high_expert_is_read(files, tmp_path):
    path = written(tmp_path / "fast.safetensors", options())
    chosen = finished_student(path, options(), files)
    assert (chosen.path, chosen.strength) == (path, 1.0) and set(chosen.lora.pairs) == {"blocks.0.self_attn.q"}


@pytest.mark.parametrize(
    ("opts", "expert", "message"),
    [
        (options(), LOW, "--high_lora .*fast.safetensors is not for the high_noise expert"),
        (None, HIGH, "fast.safetensors was not distilled into few steps: give one that was, with --expert high"),
        (options(denoising_steps=8), HIGH, "into 8 steps .*, but this run's LoRA was distilled into 4 steps"),
        (options(few_step_shift=5.0), HIGH, "at shift 5, but this run's LoRA .* at shift 12: train both .* same steps"),
    ],
)
def test_what_the_low_expert_could_not_begin_from_is_refused_by_its_name(files, tmp_path, opts, expert, message):
    path = written(tmp_path / "fast.safetensors", opts, expert)
    with pytest.raises(UserError, match=message):
        finished_student(path, options(), files)


def test_a_student_of_another_model_is_refused(files, tmp_path):
    path = tmp_path / "deep.safetensors"
    facts = {"expert": HIGH, **options().stated(T2V, T2V.size)[0].metadata}
    write_lora(path, replace(make_lora(0.1, "blocks.9.self_attn.q"), metadata=facts))
    with pytest.raises(UserError, match=r"deep\.safetensors"):
        finished_student(path, options(), files)


def test_nothing_is_said_of_the_expert_that_is_in_training(files, tmp_path, capsys):
    finished_student(written(tmp_path / "fast.safetensors", options()), options(), files)
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------------------- losses of experts

NEGATIVE = torch.ones(3, TINY_SHAPE.text_dim)


def pair(family: Family = T2V) -> tuple[Experts, dict[str, LoraAdapter]]:
    """Small experts, each with a student and a critic that change its answers."""
    models, adapters = {}, {}
    plan = AdapterPlan(AdapterOptions(lora_rank=2), copies=(CRITIC,))
    for seed, expert in enumerate(family.experts):
        models[expert.name] = tiny_transformer(tiny_shape(family), seed)
        adapters[expert.name] = plan.attach(models[expert.name], STUDENT)
        fill(adapters[expert.name].parameters.values(), seed)
    return Experts(models, family.boundaries, CPU), adapters


def losses(number: int, family: Family = T2V, high: Chosen | None = None, **changes) -> tuple[FewStep, Experts, dict]:
    """The losses of one expert of a family, with its experts and students."""
    opts, expert, (experts, adapters) = options(**changes), family.experts[number], pair(family)
    role = Role(expert, opts, expert.sigmas, alone=len(family.experts) == 1)
    return distil(role, adapters, experts, family, SIZE, NEGATIVE, high), experts, adapters


@pytest.mark.parametrize("family", [T2V, I2V, SINGLE], ids=lambda family: family.name)
def test_an_expert_is_distilled_at_its_own_steps_and_compared_at_its_own_noise_levels(family):
    for number, expert in enumerate(family.experts):
        found, experts, _ = losses(number, family, real_guidance_scale=2.0 if family is I2V else None)
        assert found.model is experts.models[expert.name] and found.interval == expert.sigmas
        assert found.sigmas == options().steps_of(expert, family) and found.shift == family.shift
        assert found.guidance == (2.0 if family is I2V else expert.guidance) and found.negative is NEGATIVE
        assert not found.rolls_out and found.upper is None
        assert found.diversity == Diversity(options().diversity_weight, options().diversity_steps)


def test_only_the_low_expert_on_its_own_samples_begins_with_those_of_the_other():
    for number, upper in ((0, False), (1, True)):
        found, _, _ = losses(number, distill_input=ROLLOUT)
        assert found.rolls_out and (found.upper is not None) == upper
    assert found.upper.sigmas == options().steps_of(T2V.experts[0], T2V) == pytest.approx([1, 0.972973, 0.923077])
    assert losses(0, SINGLE, distill_input=ROLLOUT)[0].upper is None


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 5, TINY_SHAPE.text_dim, generator=generator)
    return Batch(torch.randn(1, 16, 2, 4, 6, generator=generator), Cond(text))


@torch.no_grad()
def test_above_answers_the_student_in_training_and_the_expert_that_was_there_comes_back():
    found, experts, adapters = losses(1, distill_input=ROLLOUT)
    given, timestep, model = batch(), torch.tensor([990.0]), experts.models[HIGH]
    experts.activate(LOW)
    with speaking(model, CRITIC), found.upper.answering() as predict:
        assert experts.active == HIGH
        answer = predict(given.latents, timestep, given.cond)
    assert experts.active == LOW
    expected = {}
    for name in (STUDENT, CRITIC):
        with speaking(model, name):
            expected[name] = make_predict(model)(given.latents, timestep, given.cond)
    assert torch.equal(answer, expected[STUDENT]) and not torch.equal(answer, expected[CRITIC])
    assert adapters[HIGH].model is model


@torch.no_grad()
def test_above_answers_the_finished_student_where_that_expert_is_not_trained():
    high = Chosen(make_lora(0.5), 1.0)
    models = {expert.name: tiny_transformer(tiny_shape(T2V), seed) for seed, expert in enumerate(T2V.experts)}
    adapter = AdapterPlan(AdapterOptions(lora_rank=2), copies=(CRITIC,)).attach(models[LOW])
    experts = Experts(models, T2V.boundaries, CPU)
    role = Role(T2V.experts[1], options(distill_input=ROLLOUT), T2V.experts[1].sigmas, alone=False)
    found = distil(role, {LOW: adapter}, experts, T2V, SIZE, NEGATIVE, high)
    given, timestep = batch(), torch.tensor([990.0])
    experts.activate(LOW)
    with found.upper.answering() as predict:
        answer = predict(given.latents, timestep, given.cond)
    model = models[HIGH]
    bare = make_predict(model)(given.latents, timestep, given.cond)
    model.blocks[0].self_attn.q.weight += delta(high.lora.pairs["blocks.0.self_attn.q"])
    torch.testing.assert_close(answer, make_predict(model)(given.latents, timestep, given.cond), rtol=1e-4, atol=1e-4)
    assert (answer - bare).abs().max() > 0.01 and experts.active == LOW
