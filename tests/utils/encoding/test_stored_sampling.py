"""Transformers whose weights are in codes, or wait in main memory, are sampled with their LoRAs as plain ones are."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.formats import FORMATS
from tests.tiny import TINY_SHAPE, tiny_shape, tiny_transformer, write_model
from tests.trainees import relative_error
from utils.adapters.beside import Chosen, beside, split_patch
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.encoding.conditioning import Cond, make_predict
from utils.encoding.sampling import Transformers
from utils.storage.load import Store
from utils.storage.streaming import Stream
from utils.storage.weights import Storage
from wan.checkpoints import ModelFiles, build_transformer, cast_to, open_model
from wan.configs import FAMILIES
from wan.modules.model import WanModel

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
A14B, SINGLE = FAMILIES["wan2.2-t2v-A14B"], FAMILIES["wan2.1-t2v-1.3B"]
HIGH, LOW = "high_noise", "low_noise"
COND = Cond(torch.randn(1, 5, TINY_SHAPE.text_dim, generator=torch.Generator().manual_seed(1)))
WIDTH = TINY_SHAPE.dim
# Of the answer of a small model, and more than what is measured: its layers are narrow.
ERRORS = {"fp8": 0.02, "fp8_scaled": 0.02, "int8": 0.005, "nf4": 0.08}


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> ModelFiles:
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.2-T2V-A14B", A14B))


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> ModelFiles:
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.1-T2V-1.3B"))


def matrix(*size: int, seed: int) -> Tensor:
    return 0.2 * torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def make_lora(seed: int = 0) -> LoraFile:
    """Pairs in both blocks, and what replaces a norm and a bias."""
    names = ("blocks.0.self_attn.q", "blocks.1.cross_attn.v", "blocks.1.ffn.0")
    outputs = (WIDTH, WIDTH, TINY_SHAPE.ffn_dim)
    pairs = {
        name: LoraPair(matrix(4, WIDTH, seed=seed + 1), matrix(output, 4, seed=seed + 2), 4.0)
        for name, output in zip(names, outputs, strict=True)
    }
    diffs = {"blocks.0.norm3.diff": matrix(WIDTH, seed=seed), "blocks.1.self_attn.q.diff_b": matrix(WIDTH, seed=seed)}
    return LoraFile(pairs, diffs)


def control_lora() -> LoraFile:
    """A LoRA that reads as many channels again, for its control."""
    channels = 2 * SINGLE.in_dim
    down, up = matrix(4, channels, 1, 2, 2, seed=7), matrix(WIDTH, 4, 1, 1, 1, seed=8)
    lora = make_lora()
    return replace(
        lora,
        pairs=lora.pairs | {"patch_embedding": LoraPair(down, up, 4.0)},
        input_shapes={"patch_embedding": (WIDTH, channels, 1, 2, 2)},
    )


def draw(channels: int = 16) -> Tensor:
    return torch.randn(1, channels, 2, 4, 6, generator=torch.Generator().manual_seed(0))


def ask(transformers: Transformers, timestep: float = 500.0, cond: Cond = COND) -> Tensor:
    with torch.no_grad():
        return transformers.predict(draw(), torch.tensor([timestep]), cond).clone()


def single_answer(files: ModelFiles, lora: LoraFile, storage: Storage) -> list[Tensor]:
    """The answers without the LoRA, and with it, twice."""
    transformers = Transformers(files, storage)
    base = ask(transformers)
    transformers.use({"transformer": [Chosen(lora, 0.5)]})
    return [base, ask(transformers), ask(transformers)]


@pytest.mark.parametrize("format", FORMATS)
def test_quantised_transformers_answer_nearly_as_plain_ones_with_their_loras_and_without(single, format):
    plain = single_answer(single, make_lora(), Storage(CPU, FP32))
    found = single_answer(single, make_lora(), Storage(CPU, FP32, format))
    assert relative_error(found, plain) < ERRORS[format]
    # What the LoRA changes is as exact, although the base is not.
    assert relative_error([found[1] - found[0]], [plain[1] - plain[0]]) < 3 * ERRORS[format]
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize(("format", "dtype"), [(None, FP32), (None, BF16), ("int8", FP32), ("nf4", BF16)])
@pytest.mark.parametrize("count", [1, 2])
def test_streamed_transformers_answer_as_those_that_stay_with_the_lora_beside_bit_for_bit(single, format, dtype, count):
    model = build_transformer(single.transformer)
    Store(Storage(CPU, dtype, format)).load(model, single.transformer, cast_to)
    with torch.no_grad():
        predict = make_predict(model)
        base = predict(draw(), torch.tensor([500.0]), COND)
        with beside(model, [Chosen(make_lora(), 0.5)], CPU):
            expected = predict(draw(), torch.tensor([500.0]), COND)
    found = single_answer(single, make_lora(), Storage(CPU, dtype, format, num_streamed=count))
    assert torch.equal(found[0], base) and not torch.equal(found[1], base)
    assert torch.equal(found[1], expected) and torch.equal(found[2], expected)


@pytest.mark.parametrize("storage", [Storage(CPU, FP32, "int8"), Storage(CPU, FP32, num_streamed=2)])
def test_a_control_lora_widens_a_base_that_is_quantised_or_streamed(single, storage):
    cond = replace(COND, channels=draw())
    lora = control_lora()
    assert split_patch(lora)[0].pairs.keys() == {"patch_embedding"}
    answers = []
    for held in (Storage(CPU, FP32), storage):
        transformers = Transformers(single, held)
        transformers.use({"transformer": [Chosen(lora, 1.0)]})
        answers.append([ask(transformers, cond=cond), ask(transformers, cond=replace(cond, channels=0 * draw()))])
    assert relative_error(answers[1], answers[0]) < ERRORS["int8"]
    assert relative_error(answers[1][1:], answers[1][:1]) > 0.05  # the control is seen


def expert(number: int, lora: LoraFile) -> WanModel:
    model = tiny_transformer(tiny_shape(A14B), number)
    fuse_lora(model, lora, 0.5)
    return model


@pytest.mark.parametrize("storage", [Storage(CPU, FP32, "int8"), Storage(CPU, FP32, "int8", num_streamed=1)])
def test_experts_come_and_go_with_their_loras_however_they_are_held(experts, storage):
    loras = {HIGH: [Chosen(make_lora(0), 0.5)], LOW: [Chosen(make_lora(5), 0.5)]}
    transformers = Transformers(experts, storage)
    ask(transformers, 100.0)
    transformers.use(loras)
    found = [ask(transformers, timestep) for timestep in (950.0, 900.0, 100.0, 950.0)]
    with torch.no_grad():
        models = expert(0, make_lora(0)), expert(1, make_lora(5))
        expected = [
            make_predict(models[number])(draw(), torch.tensor([timestep]), COND)
            for number, timestep in ((0, 950.0), (0, 900.0), (1, 100.0), (0, 950.0))
        ]
    assert relative_error(found, expected) < ERRORS["int8"]
    assert torch.equal(found[0], found[3])


@pytest.fixture
def without_gc():
    """Nothing frees what refers to itself."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def refer(transformers: Transformers) -> tuple[weakref.ref[WanModel], list[Any]]:
    """The loaded model, and the storages of its weights on either side, none of which is kept alive by this."""
    _, model = transformers._loaded
    held = transformers._store._ring._held.values()
    tensors = [*model.parameters(), *(host for host, _ in held)]
    slots = {slot.data_ptr() for slot in transformers._store._ring.slots.values()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    kept = [torch.UntypedStorage._weak_ref(each) for address, each in storages.items() if address not in slots]
    return weakref.ref(model), kept


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "storage",
    [
        Storage(CPU, FP32),
        Storage(CPU, FP32, "int8"),
        Storage(CPU, FP32, num_streamed=1),
        Storage(CPU, FP32, "int8", num_streamed=2),
    ],
)
def test_what_is_unloaded_is_freed_at_once_on_either_side(single, without_gc, storage, fused):
    transformers = Transformers(single, storage)
    if fused:
        transformers.use({"transformer": [Chosen(make_lora(), 0.5)]})
    before = ask(transformers)
    model, weights = refer(transformers)
    assert model() is not None and not any(torch.UntypedStorage._expired(each) for each in weights)
    transformers.unload()
    assert model() is None and all(torch.UntypedStorage._expired(each) for each in weights)
    assert transformers._store._ring._held == {}
    assert torch.equal(ask(transformers), before)


def test_an_expert_has_left_memory_before_the_other_is_read(experts, without_gc, monkeypatch):
    transformers = Transformers(experts, Storage(CPU, FP32, "int8", num_streamed=1))
    ask(transformers, 950.0)
    model, weights = refer(transformers)
    own, seen = transformers._store.load, list[bool]()

    def load(*args: Any, **how: Any) -> Stream | None:
        seen.append(model() is None and all(torch.UntypedStorage._expired(each) for each in weights))
        return own(*args, **how)

    monkeypatch.setattr(transformers._store, "load", load)
    ask(transformers, 100.0)
    assert seen == [True]


def test_nothing_is_unloaded_where_nothing_is_loaded(single):
    transformers = Transformers(single, Storage(CPU, FP32, num_streamed=1))
    transformers.unload()
    ask(transformers)
    transformers.unload()
    transformers.unload()
