"""Weights that wait on disk come back bit for bit, take no memory until then, and are never mistaken for others."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import wan.checkpoints.load
from tests.adapted import ALPHA, RANK, fill
from tests.tiny import TINY_SHAPE, tiny_transformer, write_model, write_transformer
from tests.trainees import answers, equal, inputs_of
from utils.adapters.fusion import Fusion
from utils.adapters.lora import add_lora, select_modules
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.common.errors import RunError, UserError
from utils.storage.linear import QuantisedLinear
from utils.storage.load import Store
from utils.storage.on_disk import OnDisk, drop
from utils.storage.streaming import Stream
from utils.storage.weights import Storage, linear_layers
from wan.checkpoints import CheckpointError, ModelFiles, Place, build_transformer, cast_to, open_model
from wan.modules.model import WanModel

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
FORMATS = [None, "fp8", "int8", "nf4"]


def write(folder: Path) -> ModelFiles:
    return open_model(write_model(folder / "Wan2.1-T2V-1.3B"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    return write(tmp_path_factory.mktemp("models"))


Loaded = tuple[WanModel, Stream | None, OnDisk]


def load(files: ModelFiles, store: Store, waits: bool = False, **how: object) -> Loaded:
    model = build_transformer(files.transformer)
    stream = store.load(model, files.transformer, **{"cast": cast_to, **how}, waits=waits)
    return model, stream, store.on_disk[-1]


def store_of(format: str | None = None, streamed: int = 0, dtype: torch.dtype = FP32) -> Store:
    return Store(Storage(CPU, dtype, format, num_streamed=streamed, idle_on_disk=True), takes_turns=True)


@torch.no_grad()
def answer(model: WanModel, stream: Stream | None = None) -> Tensor:
    if stream is None:
        return model(*inputs_of(model))
    with stream.followed(model):
        return model(*inputs_of(model))


def storages(model: WanModel) -> Iterator[torch.UntypedStorage]:
    for layer in linear_layers(model).values():
        yield layer.weight.untyped_storage()
        if isinstance(layer, QuantisedLinear) and layer.scale is not None:
            yield layer.scale.untyped_storage()


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the tensors that are read from files, in this order."""
    names: list[str] = []
    own = wan.checkpoints.load.open_tensors

    @contextmanager
    def counting(*args: object) -> Iterator[Callable[[str], object]]:
        with own(*args) as read_one:
            yield lambda name: (names.append(name), read_one(name))[1]

    monkeypatch.setattr(wan.checkpoints.load, "open_tensors", counting)
    return names


# -------------------------------------------------------------------------------------------------- dropped and read


@pytest.mark.parametrize("streamed", [0, 1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_what_was_dropped_and_read_answers_as_before_bit_for_bit(files, format, streamed):
    model, stream, on_disk = load(files, store_of(format, streamed))
    before, names = answer(model, stream), list(model.state_dict())
    for _ in range(2):
        on_disk.drop()
        assert answer(model).isnan().all()
        on_disk.read()
        assert torch.equal(answer(model, stream), before) and list(model.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("format", FORMATS)
def test_dropped_weights_take_no_memory_and_keep_their_shapes(files, format):
    model, _, on_disk = load(files, store_of(format))
    kept = [torch.UntypedStorage._weak_ref(each) for each in storages(model)]
    on_disk.drop()
    assert all(torch.UntypedStorage._expired(each) for each in kept)
    layers = linear_layers(model).values()
    assert sum(each.nbytes() for each in storages(model)) == 4 * len(layers)
    assert all(layer.weight.shape == (layer.out_features, layer.in_features) for layer in layers)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("streamed", [0, 1])
def test_a_model_with_adapters_computes_the_same_gradients_after_its_weights_were_read_again(files, format, streamed):
    model, stream, on_disk = load(files, store_of(format, streamed))
    parameters = add_lora(model, select_modules(model, ["all-linear"]), RANK, ALPHA)
    fill(parameters)

    def step() -> list[Tensor]:
        if stream is None:
            return answers(model, parameters, inputs_of(model))
        with stream.followed(model):
            return answers(model, parameters, inputs_of(model))

    before = step()
    on_disk.drop()
    on_disk.read()
    assert equal(step(), before)


@pytest.mark.parametrize("format", FORMATS)
def test_a_fused_lora_is_in_what_is_read_again(files, format):
    generator, size = torch.Generator().manual_seed(0), TINY_SHAPE.dim
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, size), (size, 2)))
    lora = LoraFile({"blocks.1.self_attn.q": LoraPair(down, up, 2.0)})
    fusion = Fusion().with_lora(build_transformer(files.transformer), lora)

    def cast(dtype: torch.dtype, device: torch.device) -> Place:
        return fusion.place(cast_to(dtype, device))

    model, _, on_disk = load(files, store_of(format), cast=cast, changed=fusion.targets)
    before = answer(model)
    assert not torch.equal(before, answer(load(files, store_of(format))[0]))
    on_disk.drop()
    on_disk.read()
    assert torch.equal(answer(model), before)


def test_each_time_the_file_is_read_and_only_the_weights_of_linear_layers_in_blocks_are(files, read):
    model, _, on_disk = load(files, store_of())
    read.clear()
    inner = [f"{name}.weight" for name in linear_layers(model)]
    for times in (1, 2):
        on_disk.drop()
        on_disk.read()
        assert read == times * inner
    assert len(inner) == 20


def test_progress_sees_every_tensor_that_is_read(files):
    model, _, on_disk = load(files, store_of())
    seen: list[str] = []
    on_disk.read(lambda names: ((seen.append(name), name)[1] for name in names))
    assert seen == [f"{name}.weight" for name in linear_layers(model)]


# ------------------------------------------------------------------------------------------------- the one that waits


@pytest.mark.parametrize("streamed", [0, 1])
@pytest.mark.parametrize("format", FORMATS)
def test_of_a_model_that_waits_nothing_is_read_that_is_dropped_and_all_else(files, read, format, streamed):
    store = store_of(format, streamed)
    load(files, store)
    read.clear()
    model, stream, on_disk = load(files, store, waits=True)
    inner = {f"{name}.weight" for name in linear_layers(model)}
    assert set(read) == files.transformer.tensors.keys() - inner and len(read) == len(set(read))
    assert sum(each.nbytes() for each in storages(model)) == 4 * len(inner)
    on_disk.read()
    assert torch.equal(answer(model, stream), answer(load(files, store_of(format))[0]))


def test_without_the_option_or_without_turns_nothing_waits_on_disk(files):
    for store in (Store(Storage(CPU, FP32), takes_turns=True), Store(Storage(CPU, FP32, idle_on_disk=True))):
        model = build_transformer(files.transformer)
        store.load(model, files.transformer, cast_to, waits=True)
        assert store.on_disk == [] and torch.equal(answer(model), answer(tiny_transformer()))


def test_the_shapes_of_a_file_that_is_not_read_yet_are_checked_at_once(files):
    store = store_of()
    load(files, store)
    model = build_transformer(files.transformer)
    model.blocks[1].ffn[0] = torch.nn.Linear(TINY_SHAPE.dim, TINY_SHAPE.ffn_dim + 1)
    with pytest.raises(CheckpointError, match=r"blocks.1.ffn.0.weight of shape \[96, 48\], not \[97, 48\]"):
        store.load(model, files.transformer, cast_to, waits=True)


# ------------------------------------------------------------------------------------------------------- one memory


def test_streams_of_models_that_take_turns_share_one_memory(files, tmp_path):
    other = write(tmp_path)
    write_transformer(tmp_path / "Wan2.1-T2V-1.3B", tiny_transformer(seed=1))
    store = store_of("int8", streamed=1)
    (first, one, on_disk), (second, two, other_on_disk) = load(files, store), load(other, store, waits=True)
    assert one.hosts is two.hosts and one.nbytes == two.nbytes
    expected = [answer(load(each, store_of("int8"))[0]) for each in (files, other)]
    assert torch.equal(answer(first, one), expected[0])
    for _ in range(2):
        on_disk.drop()
        other_on_disk.read()
        assert torch.equal(answer(second, two), expected[1])
        other_on_disk.drop()
        on_disk.read()
        assert torch.equal(answer(first, one), expected[0])


def test_a_slot_that_holds_a_block_is_filled_anew_once_other_weights_are_in_its_memory(files, tmp_path):
    other = write(tmp_path)
    write_transformer(tmp_path / "Wan2.1-T2V-1.3B", tiny_transformer(seed=1))
    store = store_of(streamed=1)
    (_, one, _), (second, two, on_disk) = load(files, store), load(other, store, waits=True)
    one.enter(0)
    one.enter(1)
    on_disk.read()
    two.enter(0)
    two.enter(1)
    assert torch.equal(second.blocks[1].ffn[0].weight, tiny_transformer(seed=1).blocks[1].ffn[0].weight)


def test_weights_that_do_not_fit_the_memory_of_the_other_model_are_refused(files):
    store = store_of("int8", streamed=1)
    load(files, store)
    model = build_transformer(files.transformer)
    plain = Storage(CPU, FP32)
    stream = Stream(model, store.on_disk[0].stream.slots, store._ring, store.on_disk[0].stream)
    drop(linear_layers(model).values(), FP32)
    place = plain.place({}, cast_to, lambda _: CPU)
    with pytest.raises(RunError, match="quantised in different ways, so their blocks cannot share memory"):
        OnDisk(model, files.transformer, place, FP32, stream).read()


# ------------------------------------------------------------------------------- interrupts, and files that change


@pytest.mark.parametrize("streamed", [0, 1])
def test_a_read_that_was_interrupted_leaves_no_answer_that_could_be_taken_for_one_and_is_done_again(files, streamed):
    model, stream, on_disk = load(files, store_of("int8", streamed))
    before = answer(model, stream)

    def interrupted(names: Sequence[str]) -> Iterator[str]:
        yield from names[:15]
        raise KeyboardInterrupt

    on_disk.drop()
    with pytest.raises(KeyboardInterrupt):
        on_disk.read(interrupted)
    assert answer(model).isnan().all()
    on_disk.read()
    assert torch.equal(answer(model, stream), before)


def remove(path: Path) -> None:
    path.unlink()


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(0, 0))


def shorten(path: Path) -> None:
    content, times = path.read_bytes(), path.stat()
    path.unlink()
    path.write_bytes(content[:-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("damage", [remove, rewrite, shorten])
def test_a_file_that_has_changed_or_is_gone_is_named_and_nothing_of_it_is_used(tmp_path, damage):
    files = write(tmp_path)
    model, _, on_disk = load(files, store_of())
    on_disk.drop()
    (path,) = files.transformer.files
    damage(path)
    with pytest.raises(UserError, match=f"{path.name} has changed or is gone, and --idle_expert disk reads it"):
        on_disk.read()
    assert answer(model).isnan().all()


def test_a_file_that_cannot_be_read_any_more_is_reported(files, monkeypatch):
    _, _, on_disk = load(files, store_of())

    def fail(*_: object) -> None:
        raise CheckpointError("the disk is broken")

    monkeypatch.setattr(wan.checkpoints.load, "open_tensors", fail)
    with pytest.raises(UserError, match="an expert that waited on disk cannot be read: the disk is broken"):
        on_disk.read()
