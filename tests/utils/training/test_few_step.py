"""A student, its critic and their teacher on one frozen base: as three models of the same weights would learn."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import itemgetter

import pytest
import torch
from torch import Tensor, nn

from tests.adapted import fill
from tests.tiny import IMAGE_DIM, TINY_SHAPE, tiny_shape, tiny_transformer
from utils.adapters.lora import adapter_parameters, add_lora, select_modules, speaking
from utils.common.tensors import map_tensors
from utils.diffusion.few_step import noised_to_steps, predict_latents, pure_noise, student_loss
from utils.diffusion.flow import Noisy, add_noise, latents_to_velocity, sample_noisy
from utils.diffusion.objectives import Loss, squared_error
from utils.encoding.conditioning import Batch, Cond, make_predict, replace_text
from utils.training.few_step import CRITIC, STUDENT, Diversity, FewStep, Upper, guided_together
from utils.training.memory import Memory, prepare
from wan.configs import FAMILIES
from wan.modules.model import WanModel
from wan.text2video import Sampler, guided

SIGMAS, INTERVAL, SHIFT, GUIDANCE = [1.0, 0.75], (0.2, 0.9), 3.0, 4.0
DIVERSITY = Diversity(0.5, num_steps=2)
NAMES = ("wan2.1-t2v-1.3B", "wan2.2-ti2v-5B", "wan2.2-i2v-A14B", "wan2.1-flf2v-14B-720P")
T2V, TI2V, I2V, FLF2V = (FAMILIES[name] for name in NAMES)


def base(checkpointing: str = "none", family=T2V, adapters: tuple[str, ...] = (STUDENT, CRITIC)) -> WanModel:
    """A model with these adapters, which change its answers: each of them always in the same way."""
    model = tiny_transformer(tiny_shape(family))

    def attach(model: WanModel) -> None:
        for name in adapters:
            add_lora(model, select_modules(model, ["attn"]), rank=2, alpha=2, adapter=name)
            fill(adapter_parameters(model, name).values(), seed={STUDENT: 1, CRITIC: 2}[name])

    prepare(model, Memory(checkpointing), attach)
    return model


def make_batch(family=T2V, batch: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    drawn = partial(torch.randn, generator=generator)
    latents = drawn(batch, family.out_dim, 2, 4, 6)
    cond = Cond(drawn(batch, 5, TINY_SHAPE.text_dim))
    if family.given_as == "channels":
        cond = replace(cond, channels=drawn(batch, family.in_dim - family.out_dim, 2, 4, 6))
    if family.clip:
        cond = replace(cond, image=drawn(batch, 6, IMAGE_DIM))
    if family.given_as == "latents":
        cond = replace(cond, first=latents[:, :, :1].clone())
    return Batch(latents, cond)


NEGATIVE = torch.randn(3, TINY_SHAPE.text_dim, generator=torch.Generator().manual_seed(9))


def few_step(model: WanModel, **changes) -> FewStep:
    return FewStep(model, **{"sigmas": SIGMAS, "interval": INTERVAL, "shift": SHIFT, "guidance": GUIDANCE,
                             "negative": NEGATIVE} | changes)  # fmt: skip


def outcome(loss: Tensor | Loss, parameters: dict[str, nn.Parameter]) -> list[Tensor]:
    loss = loss.value if isinstance(loss, Loss) else loss
    return [loss.detach(), *torch.autograd.grad(loss, list(parameters.values()))]


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective", "offload"])
@pytest.mark.parametrize("family", [T2V, I2V], ids=lambda family: family.name)
def test_one_base_gives_the_losses_and_gradients_of_three_models(checkpointing, family):
    batch, shared = make_batch(family), few_step(base(checkpointing, family), diversity=DIVERSITY)
    student, critic = (base("none", family, (name,)) for name in (STUDENT, CRITIC))
    teacher = base("none", family, ())

    torch.manual_seed(5)
    with speaking(shared.model, STUDENT):
        found = outcome(shared.student_loss(batch), adapter_parameters(shared.model, STUDENT))
    torch.manual_seed(5)
    noisy = noised_to_steps(batch.latents, SIGMAS)
    latents = predict_latents(make_predict(student), noisy, batch.cond)
    guide = partial(guided_together, make_predict(teacher), negative=NEGATIVE, guidance=GUIDANCE)
    loss = student_loss(latents, guide, make_predict(critic), batch.cond, SHIFT, INTERVAL).loss
    assert len(noisy.sigma.unique()) == 2
    target = few_step(teacher).sample_teacher(noisy, batch.cond, DIVERSITY.num_steps)
    loss = loss + DIVERSITY.weight * squared_error(latents, target)
    assert same(found, outcome(loss, adapter_parameters(student, STUDENT)))

    torch.manual_seed(6)
    with speaking(shared.model, CRITIC):
        found = outcome(shared.critic_loss(batch), adapter_parameters(shared.model, CRITIC))
    torch.manual_seed(6)
    with torch.no_grad():
        latents = predict_latents(make_predict(student), noised_to_steps(batch.latents, SIGMAS), batch.cond)
    noisy = sample_noisy(latents, SHIFT, INTERVAL)
    loss = squared_error(make_predict(critic)(noisy.latents, noisy.timestep, batch.cond), noisy.velocity)
    assert same(found, outcome(loss, adapter_parameters(critic, CRITIC)))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 1 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_there_is_one_base_in_memory():
    shared = base()
    adapters = [adapter_parameters(shared, name) for name in (STUDENT, CRITIC)]
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in shared.parameters()}
    alone = sum(parameter.nbytes for parameter in base(adapters=()).parameters())
    assert sum(stored.values()) == alone + sum(p.nbytes for adapter in adapters for p in adapter.values())


def test_neither_loss_reaches_the_other_adapter():
    shared = few_step(base())
    for name, loss in ((STUDENT, shared.student_loss), (CRITIC, shared.critic_loss)):
        with speaking(shared.model, name):
            loss(make_batch()).value.backward()
        for adapter in (STUDENT, CRITIC):
            grads = [parameter.grad for parameter in adapter_parameters(shared.model, adapter).values()]
            assert all(grad is None for grad in grads) if adapter != name else all(grad.any() for grad in grads)
        shared.model.zero_grad()


# ------------------------------------------------------------------------------------------------------- the teacher


@pytest.mark.parametrize("family", [T2V, I2V, TI2V, FLF2V], ids=lambda family: family.name)
@pytest.mark.parametrize("length", [3, 5, 8])
def test_guidance_in_one_pass_is_guidance_in_two(family, length):
    predict, batch, timestep = (
        make_predict(base(family=family, adapters=())),
        make_batch(family),
        torch.tensor([900.0, 300]),
    )
    negative = torch.randn(length, TINY_SHAPE.text_dim, generator=torch.Generator().manual_seed(3))
    cond = replace(batch.cond, held=torch.tensor([True, False])) if family is TI2V else batch.cond
    answer = partial(predict, batch.latents, timestep)
    expected = guided(answer, cond, replace_text(cond, negative), GUIDANCE)
    found = guided_together(predict, batch.latents, timestep, cond, negative, GUIDANCE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(guided_together(predict, batch.latents, timestep, cond, negative, 1.0), answer(cond))


# -------------------------------------------------------------------------------------------------------- variety


LOW = {"sigmas": [0.833333333, 0.625], "interval": (0.0, 0.9)}
ABOVE = Upper([1.0, 0.9375], lambda: nullcontext(make_predict(base(adapters=()))))
STARTS = {
    "clips": {},
    "its own samples": {"rolls_out": True},
    "clips, for low noise": LOW,
    "samples of the expert above": LOW | {"rolls_out": True, "upper": ABOVE},
}


@pytest.mark.parametrize("changes", STARTS.values(), ids=STARTS)
def test_what_a_step_makes_is_compared_with_the_teachers_samples_of_the_same_latents(changes, monkeypatch):
    model, batch = base(), make_batch()
    begin, sample_teacher, started, asked = FewStep._start, FewStep.sample_teacher, [], []

    def start(*given):
        started.append(begin(*given))
        return started[-1]

    def sample(shared, noisy, *given):
        asked.append(noisy)
        return sample_teacher(shared, noisy, *given)

    monkeypatch.setattr(FewStep, "_start", start)
    monkeypatch.setattr(FewStep, "sample_teacher", sample)
    for seed in range(6):
        values = []
        for weight in (0.0, 0.5, 1.0):
            torch.manual_seed(seed)
            with speaking(model, STUDENT):
                shared = few_step(model, diversity=Diversity(weight, 2), **changes)
                values.append(shared.student_loss(batch).value.item())
        assert values[2] - values[0] == pytest.approx(2 * (values[1] - values[0]), rel=1e-3)
        assert values[1] > values[0]
    assert len(asked) == 2 * 6  # not with a weight of 0
    assert all(any(noisy is one for one in started) for noisy in asked)
    levels = {round(sigma, 6) for noisy in asked for sigma in noisy.sigma.tolist()}
    assert levels == {round(sigma, 6) for sigma in changes.get("sigmas", SIGMAS)}


@pytest.mark.parametrize("family", [T2V, I2V], ids=lambda family: family.name)
def test_the_teacher_samples_as_the_model_is_sampled(family):
    model, batch = base(family=family, adapters=()), make_batch(family)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(4))
    sampler = Sampler("unipc", 5, (GUIDANCE,), SHIFT)
    expected = sampler.denoise(make_predict(model), noise, batch.cond, replace_text(batch.cond, NEGATIVE))
    found = few_step(model, interval=(0.0, 1.0)).sample_teacher(pure_noise(noise), batch.cond, 5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_samples_at_different_steps_are_sampled_as_each_alone():
    model, batch = base(adapters=()), make_batch()
    shared = few_step(model, interval=(0.75, 1.0))  # at whose boundary the second one is
    start = add_noise(batch.latents, torch.randn_like(batch.latents), torch.tensor(SIGMAS))
    together = shared.sample_teacher(start, batch.cond, 3)
    first, second = ([map_tensors(each, itemgetter([row])) for each in (start, batch.cond)] for row in range(2))
    alone = [shared.sample_teacher(*first, 3), predict_latents(shared.teach, *second)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("boundary", [0.875, 0.9])
@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0, 12.0])
def test_the_teacher_of_high_noise_is_asked_last_at_the_boundary_itself(boundary, shift):
    model, asked = base(adapters=()), []
    model.register_forward_pre_hook(lambda _, args: asked.append(args[1].tolist()))
    shared = few_step(model, interval=(boundary, 1.0), shift=shift, guidance=1.0)
    shared.sample_teacher(pure_noise(make_batch().latents), make_batch().cond, 2)
    assert asked[-1] == [1000 * boundary] * 2


@pytest.mark.parametrize("low", [0.0, 0.4])
@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0])
@pytest.mark.parametrize(("step", "deviation"), [(1.0, 8.0), (0.75, 8.0), (0.5, 8.0), (0.25, 8.0), (0.25, 1.0)])
def test_few_steps_of_the_teacher_keep_the_spread_of_what_is_decided_there(step, deviation, shift, low, monkeypatch):
    """At first that is what is large in relation to noise, such as the mean colour of many positions."""
    sigma = shift * step / (1 + (shift - 1) * step)

    def exact(shared, latents, timestep, cond):
        sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
        clean = (1 - sigma) * deviation**2 / ((1 - sigma) ** 2 * deviation**2 + sigma**2) * latents
        return latents_to_velocity(latents, clean, timestep / 1000)

    monkeypatch.setattr(FewStep, "teach", exact)
    noise, at = torch.ones(1, 1, 1, 1, 1), torch.tensor([sigma])
    start = Noisy(noise * math.hypot((1 - sigma) * deviation, sigma), noise, noise, at)
    shared = few_step(None, shift=shift, interval=(low, 1.0))
    found = shared.sample_teacher(start, make_batch(batch=1).cond, Diversity().num_steps)
    variance = (1 - low) ** 2 * deviation**2
    assert found.item() == pytest.approx(deviation * math.sqrt(variance / (variance + low**2)), rel=0.08)


# ------------------------------------------------------------------------------------------- where the student starts


@pytest.mark.parametrize("rolls_out", [False, True])
def test_the_student_starts_from_clips_or_from_its_own_samples(rolls_out, monkeypatch):
    sigmas, asked = [1.0, 0.75, 0.5] if rolls_out else [0.75, 0.5], []
    shared = few_step(base(), rolls_out=rolls_out, sigmas=sigmas)
    forward = shared.model.forward

    def watched(latents, timestep, *rest):
        asked.append((timestep.tolist(), torch.is_grad_enabled()))
        return forward(latents, timestep, *rest)

    monkeypatch.setattr(shared.model, "forward", watched)
    batch, exits = make_batch(), set()
    other = replace(batch, latents=batch.latents + 1)
    for seed in range(12):
        asked.clear()
        values = []
        for clips in (batch, other):
            torch.manual_seed(seed)
            with speaking(shared.model, STUDENT):
                values.append(shared.student_loss(clips).value.item())
        assert (values[0] == values[1]) == rolls_out, "a student that rolls out reads no clip"
        steps = asked[: len(asked) // 2 - 2]  # the last two are the teacher's and the critic's
        assert [grad for _, grad in steps] == [False] * (len(steps) - 1) + [True]
        if rolls_out:
            assert [levels for levels, _ in steps] == [[1000] * 2, [750] * 2, [500] * 2][: len(steps)]
        exits.add(len(steps))
    assert exits == ({1, 2, 3} if rolls_out else {1})


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_first_frame_that_is_given_counts_nothing(share, monkeypatch):
    shared, batch = few_step(base(family=TI2V), held_share=share, diversity=DIVERSITY), make_batch(TI2V)
    answer, made, seen = FewStep._answer, [], set()

    def watched(shared, noisy, cond):
        made.append((answer(shared, noisy, cond), cond.held, noisy.sigma == 1))
        made[-1][0].retain_grad()
        return made[-1][0]

    monkeypatch.setattr(FewStep, "_answer", watched)
    for seed in range(8):
        torch.manual_seed(seed)
        with speaking(shared.model, STUDENT):
            shared.student_loss(batch).value.backward()
        latents, *drawn = made[-1]
        for sample, gradient, given, held, first in zip(latents, latents.grad, batch.cond.first, *drawn, strict=True):
            assert torch.equal(sample[:, :1], given) == held
            assert gradient[:, :1].any() != held and gradient[:, 1:].any()
            seen.add((held.item(), first.item()))
    assert seen == {(held, first) for held in {share > 0, share == 1} for first in (True, False)}


def test_a_mask_of_a_clip_has_no_effect():
    shared, batch = few_step(base()), make_batch()
    masked = replace(batch, mask=torch.zeros(2, 2, 4, 6).index_fill_(3, torch.tensor([0]), 1.0))
    for loss in (shared.student_loss, shared.critic_loss):
        values = []
        for each in (batch, masked):
            torch.manual_seed(0)
            values.append(loss(each).value.item())
        assert values[0] == values[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sigmas": []}, "at least one step"), ({"sigmas": [0.8], "rolls_out": True}, "not at 0.8")],
)
def test_steps_that_no_student_could_take_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        few_step(base(), **changes)
