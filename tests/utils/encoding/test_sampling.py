"""The LoRAs that are sampled with reach the transformers that they are for, one of which is in memory."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import utils.encoding.sampling
from tests.chosen import A14B, HIGH, LOW, make_lora, write_loras
from tests.tiny import TINY_SHAPE, tiny_shape, tiny_transformer, write_model
from utils.adapters.choosing import choose_loras, find_fused_base
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import write_lora
from utils.adapters.provenance import fused_file, to_metadata
from utils.encoding.conditioning import Cond, make_predict
from utils.encoding.sampling import Transformers, denoise
from utils.storage.weights import Storage, hold_as
from wan.checkpoints import ModelFiles, open_model
from wan.modules.model import WanModel
from wan.text2video import Sampler

CPU = torch.device("cpu")
COND = Cond(torch.randn(1, 5, TINY_SHAPE.text_dim, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> ModelFiles:
    """A small model with two experts."""
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.2-T2V-A14B", A14B))


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> ModelFiles:
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.1-T2V-1.3B"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_loras(tmp_path)


def draw() -> Tensor:
    return torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def answer(model: WanModel, timestep: float) -> Tensor:
    return make_predict(model)(draw(), torch.tensor([timestep]), COND)


def expert_model(number: int, *loras: tuple[LoraFile, float]) -> WanModel:
    model = tiny_transformer(tiny_shape(A14B), number)
    for lora, strength in loras:
        fuse_lora(model, lora, strength)
    return model


# -------------------------------------------------------------------------------------------------------- who answers


def test_each_expert_answers_on_its_own_side_of_the_boundary_and_only_one_is_in_memory(experts, monkeypatch):
    alive: list[weakref.ref] = []
    counts = []

    def build(files):
        gc.collect()
        counts.append(sum(reference() is not None for reference in alive))
        model = original(files)
        alive.append(weakref.ref(model))
        return model

    original = utils.encoding.sampling.build_transformer
    monkeypatch.setattr(utils.encoding.sampling, "build_transformer", build)
    transformers = Transformers(experts, hold_as("auto", CPU))
    for timestep, expert in ((1000, 0), (875, 0), (874, 1), (0, 1), (999, 0)):
        found = transformers.predict(draw(), torch.tensor([timestep]), COND)
        torch.testing.assert_close(found, answer(expert_model(expert), timestep), rtol=1e-5, atol=1e-5)
    assert counts == [0, 0, 0]  # high, low, high again: nothing else was in memory when each was loaded


def test_transformers_answer_as_the_base_until_loras_are_used_and_then_with_these_whenever_loaded(folder, experts):
    loras = choose_loras([folder / "fox.safetensors"], 0.5, [f"{folder}/fast.safetensors"], experts)
    transformers = Transformers(experts, hold_as("auto", CPU))

    def answers() -> list[Tensor]:
        return [transformers.predict(draw(), torch.tensor([timestep]), COND) for timestep in (900.0, 100.0, 950.0)]

    base = [answer(expert_model(number), t) for number, t in ((0, 900.0), (1, 100.0), (0, 950.0))]
    torch.testing.assert_close(answers(), base, rtol=1e-5, atol=1e-5)
    transformers.use(loras)
    further = read_lora(folder / "fast.safetensors"), 1.0
    high, low = (
        expert_model(number, (read_lora(folder / f"fox_{name}.safetensors"), 0.5), further)
        for number, name in enumerate((HIGH, LOW))
    )
    expected = [answer(high, 900.0), answer(low, 100.0), answer(high, 950.0)]
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(expected, base, strict=True))
    torch.testing.assert_close(answers(), expected, rtol=1e-4, atol=1e-5)


def test_a_transformer_that_is_in_memory_is_fused_where_it_is(folder, single, monkeypatch):
    loras = choose_loras([folder / "fast.safetensors"], 1.0, [], single)
    transformers = Transformers(single, hold_as("auto", CPU))
    before = transformers.predict(draw(), torch.tensor([500.0]), COND)
    monkeypatch.setattr(utils.encoding.sampling, "build_transformer", None)
    transformers.use(loras)
    assert not torch.allclose(transformers.predict(draw(), torch.tensor([500.0]), COND), before)


@pytest.mark.parametrize("held", [hold_as("auto", CPU), Storage(CPU, torch.float32, num_streamed=1)])
def test_other_loras_take_the_place_of_those_before(folder, single, held):
    loras = choose_loras([folder / "fast.safetensors"], 1.0, [f"{folder}/fox_high_noise.safetensors:0.5"], single)
    first, second = ({"transformer": [chosen]} for chosen in loras["transformer"])
    transformers, answers = Transformers(single, held), []
    for used in ({}, first, second, loras, {}):
        transformers.use(used)
        answers.append(transformers.predict(draw(), torch.tensor([500.0]), COND).clone())
        model = tiny_transformer()
        for chosen in used.get("transformer", []):
            fuse_lora(model, chosen.lora, chosen.strength)
        expected = answer(model, 500.0)
        torch.testing.assert_close(answers[-1], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(answers[0], answers[-1]) and not torch.allclose(answers[1], answers[2], atol=1e-4)


@pytest.mark.parametrize("held", [hold_as("auto", CPU), Storage(CPU, torch.float32, num_streamed=1)])
def test_what_loras_are_on_top_of_is_in_the_transformers_before_and_after_they_are(folder, experts, held):
    """However weights are held, for they go through it while they are loaded."""
    for expert in (HIGH, LOW):
        below = fused_file(folder / f"fox_{expert}.safetensors", 2.0)
        lora = replace(make_lora(0.04, "blocks.0.self_attn.k"), metadata=to_metadata([below.record]))
        write_lora(folder / f"top_{expert}.safetensors", lora)
    top = [folder / "top.safetensors"]
    fused = find_fused_base(top, [], experts)
    said = ", on top of fox_high_noise.safetensors at 2 and fox_low_noise.safetensors at 2"
    assert fused.describe(False) == said and fused.describe(True) == f"{said}, with and without the LoRA"
    loras = choose_loras(top, 0.5, [], experts, fused)
    transformers = Transformers(experts, held, fused.fusions)
    for strength in (0.0, 0.5):
        for number, (name, timestep) in enumerate(((HIGH, 900.0), (LOW, 100.0))):
            below, lora = (read_lora(folder / f"{stem}_{name}.safetensors") for stem in ("fox", "top"))
            expected = answer(expert_model(number, (below, 2.0), (lora, strength)), timestep)
            found = transformers.predict(draw(), torch.tensor([timestep]), COND)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            bare = answer(expert_model(number, (lora, strength)), timestep)
            assert (found - bare).abs().max() > 1e-3
        transformers.use(loras)


def test_a_lora_is_tried_on_the_model_that_a_fused_control_lora_has_widened(folder, single, monkeypatch):
    channels = {"down": torch.ones(2, 32, 1, 2, 2), "up": torch.ones(TINY_SHAPE.dim, 2, 1, 1, 1)}
    wide = {"patch_embedding": (TINY_SHAPE.dim, 32, 1, 2, 2)}
    control = LoraFile({"patch_embedding": LoraPair(**channels, alpha=2.0)}, input_shapes=wide)
    write_lora(folder / "control.safetensors", control)
    narrow = LoraFile({"patch_embedding": LoraPair(channels["down"][:, :16], channels["up"], 2.0)})
    top = replace(narrow, metadata=to_metadata([fused_file(folder / "control.safetensors", 1.0).record]))
    write_lora(folder / "top.safetensors", top)
    fused = find_fused_base([folder / "top.safetensors"], [], single)
    assert fused.reads_control
    (chosen,) = choose_loras([folder / "top.safetensors"], 1.0, [], single, fused)["transformer"]
    assert chosen.lora.pairs["patch_embedding"].down.shape[1] == 32
    changed = []
    load = utils.encoding.sampling.Store.load
    monkeypatch.setattr(utils.encoding.sampling.Store, "load", lambda *a: changed.append(a[4]) or load(*a))
    transformers = Transformers(single, hold_as("auto", CPU), fused.fusions)
    cond = replace(COND, channels=draw())
    assert transformers.predict(draw(), torch.tensor([500.0]), cond).shape == draw().shape
    assert changed == [{"patch_embedding.weight"}]  # what a file has quantised is not kept as it is stored there


# ------------------------------------------------------------------------------------------------------------ sampling


class Asked:
    """Answers with the mean of the text, and remembers the conditions."""

    def __init__(self) -> None:
        self.conds: list[Cond] = []

    def __call__(self, latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        self.conds.append(cond)
        return latents * cond.text.mean()


def test_the_negative_side_of_guidance_differs_in_its_text_alone():
    model, negative = Asked(), torch.full((3, 8), -1.0)
    cond = Cond(torch.ones(1, 4, 8), torch.rand(1, 20, 2, 4, 6), torch.rand(1, 257, 8))
    denoise(Sampler("euler", 1, (2.0,), 5.0), model, draw(), cond, negative)
    without, within = model.conds
    assert torch.equal(without.text[0], negative) and within is cond
    assert without.channels is cond.channels and without.image is cond.image
    model.conds = []
    denoise(Sampler("euler", 2, (2.0,), 5.0), model, draw(), cond, None)
    assert model.conds == [cond, cond]


def test_the_result_has_the_first_latent_frame_that_was_given_and_only_in_the_samples_that_hold_it():
    first, noise = torch.full((2, 16, 1, 4, 6), 7.0), torch.cat([draw(), draw()])
    cond = Cond(torch.ones(2, 4, 8), first=first)
    result = denoise(Sampler("unipc", 3, (1.0,), 5.0), Asked(), noise, cond, None)
    assert torch.equal(result[:, :, :1], first) and not result[:, :, 1:].eq(7).any()
    some = denoise(
        Sampler("unipc", 3, (1.0,), 5.0), Asked(), noise, replace(cond, held=torch.tensor([True, False])), None
    )
    assert torch.equal(some[0], result[0]) and not some[1].eq(7).any()
