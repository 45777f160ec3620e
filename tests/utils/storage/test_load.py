"""Transformers are loaded as the options want them, and a GPU never holds more than that."""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import utils.storage.load
import wan.checkpoints.load
from tests.tiny import TINY_SHAPE, tiny_transformer, write_model
from tests.trainees import inputs_of
from utils.common.errors import UserError
from utils.common.formatting import readable_size
from utils.storage.arena import aligned
from utils.storage.linear import QuantisedLinear
from utils.storage.load import Store
from utils.storage.streaming import SLOTS, Stream
from utils.storage.weights import Storage, linear_layers
from wan.checkpoints import (
    ModelFiles,
    Quantised,
    TransformerFiles,
    build_transformer,
    cast_to,
    open_model,
    rotation,
)
from wan.checkpoints.tensors import Entry
from wan.modules.model import WanModel, WanShape

BF16, FP32 = torch.bfloat16, torch.float32
CPU, META = torch.device("cpu"), torch.device("meta")
NEAR = torch.device("cpu", 0)  # in main memory, as another device than that


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.1-T2V-1.3B"))


def load(files: ModelFiles, store: Store, **how: Any) -> tuple[WanModel, Stream | None]:
    model = build_transformer(files.transformer)
    return model, store.load(model, files.transformer, cast_to, **how)


@torch.no_grad()
def answer(model: WanModel, stream: Stream | None = None) -> Tensor:
    with nullcontext() if stream is None else stream.followed(model):
        return model(*inputs_of(model))


def said(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


# --------------------------------------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("format", [None, "fp8_scaled", "int8", "nf4"])
def test_blocks_that_are_streamed_answer_as_those_that_stay(files, format):
    plain, nothing = load(files, Store(Storage(CPU, FP32, format)))
    streamed, stream = load(files, Store(Storage(CPU, FP32, format, num_streamed=1)))
    assert nothing is None and list(stream.slots) == [1]
    assert torch.equal(answer(streamed, stream), answer(plain))


def test_a_model_without_options_is_that_of_its_file(files):
    model, stream = load(files, Store(Storage(CPU, FP32)))
    assert stream is None and torch.equal(answer(model), answer(tiny_transformer()))


def test_models_that_take_turns_share_one_ring(files):
    store = Store(Storage(CPU, FP32, "int8", num_streamed=1), takes_turns=True)
    (first, one), (second, two) = load(files, store), load(files, store, waits=True)
    assert list(one.slots) == list(two.slots) == [0, 1] and len(store._ring.slots) == 2
    for block in range(2):
        layers = [model.blocks[block].ffn[0] for model in (first, second)]
        assert layers[0].weight.data_ptr() == layers[1].weight.data_ptr()
    assert one.hosts[0].data_ptr() != two.hosts[0].data_ptr()
    expected = answer(load(files, Store(Storage(CPU, FP32, "int8")))[0])
    for model, stream in ((first, one), (second, two), (first, one)):
        assert torch.equal(answer(model, stream), expected)


def homes(model: WanModel) -> dict[str, str]:
    return {name: parameter.device.type for name, parameter in model.named_parameters()}


def test_all_of_a_model_that_waits_is_in_main_memory_and_of_another_nothing(files):
    waiting, _ = load(files, Store(Storage(META, BF16)), waits=True)
    active, _ = load(files, Store(Storage(META, BF16)))
    assert set(homes(waiting).values()) == {"cpu"} and set(homes(active).values()) == {"meta"}


def test_streamed_weights_are_in_main_memory_and_in_a_ring_on_the_device(files):
    model, stream = load(files, Store(Storage(META, BF16, num_streamed=1)))
    assert set(homes(model).values()) == {"meta"}  # those of the streamed block are views of a slot
    assert {host.device for host in stream.hosts.values()} == {CPU}
    expected = tiny_transformer().blocks[1].self_attn.q.weight.bfloat16().flatten().view(torch.uint8)
    assert torch.equal(stream.hosts[1][: len(expected)], expected)


# ------------------------------------------------------------------------------------------------------ what is said


def quantised(format: str, size: str) -> str:
    others = "the others take 0.09 MB: embeddings, head"
    return f"{format}: 20 of 26 linear layers are quantised, {size}; {others}"


def swapped(count: int, buffers: str) -> str:
    holds = f"main memory holds {0.11 * count:.2f} MB of weights"
    return f"{count} of 2 blocks are swapped: {holds}, and the GPU has {buffers} of 0.11 MB for them"


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        (Storage(CPU, FP32), []),
        (Storage(CPU, BF16), ["the model computes in bfloat16"]),
        (Storage(CPU, BF16, "fp8"), [quantised("fp8", "0.06 MB")]),
        (Storage(CPU, BF16, "int8"), [quantised("int8", "0.06 MB")]),
        (Storage(CPU, BF16, "fp8_scaled"), [quantised("fp8_scaled", "0.06 MB, 18 of them in int8")]),
        (Storage(CPU, BF16, "nf4"), [quantised("nf4", "0.05 MB, 16 of them in int8")]),
        (Storage(CPU, FP32, num_streamed=1), [swapped(1, "1 buffer")]),
        (Storage(CPU, FP32, num_streamed=2), [swapped(2, "2 buffers")]),
    ],
)
def test_what_was_done_is_said(files, capsys, storage, expected):
    load(files, Store(storage))
    assert said(capsys) == expected


def test_what_was_done_is_said_of_the_first_model_alone(files, capsys):
    store = Store(Storage(CPU, BF16, "int8", num_streamed=1), takes_turns=True)
    _, stream = load(files, store)
    first, second = said(capsys)
    assert first.startswith("int8: 20 of 26")
    twice, slot = readable_size(2 * stream.nbytes), readable_size(stream.block_bytes)
    holds = f"1 of 2 blocks of each expert are swapped: main memory holds {twice} of weights"
    assert second == f"{holds}, and the GPU has 1 buffer of {slot} for them"
    load(files, store, waits=True)
    assert said(capsys) == []


@pytest.mark.parametrize("streamed", [0, 1])
def test_what_waits_on_disk_is_said(files, capsys, streamed):
    store = Store(Storage(CPU, FP32, num_streamed=streamed, idle_on_disk=True), takes_turns=True)
    _, stream = load(files, store)
    *before, last = said(capsys)
    layers = linear_layers(build_transformer(files.transformer)).values()
    size = readable_size(4 * sum(layer.weight.numel() for layer in layers))
    assert last == f"the expert that waits is on disk: {size} are read again whenever the experts change"
    assert [f"main memory holds {readable_size(stream.nbytes)} of weights" in line for line in before] == [
        True
    ] * streamed
    load(files, store, waits=True)
    assert said(capsys) == []


def test_ends_that_are_kept_are_said(capsys, files):
    load(files, Store(Storage(CPU, BF16, "fp8", keeps_ends=True)))  # a model of two blocks has nothing else
    (line,) = said(capsys)
    assert line.startswith("fp8: 0 of 26 linear layers are quantised")
    assert line.endswith(": embeddings, head, the first and the last block")


# ------------------------------------------------------------------------------------------------------- main memory


def with_free(monkeypatch, size: int) -> None:
    monkeypatch.setattr(utils.storage.load.psutil, "virtual_memory", lambda: SimpleNamespace(available=size))


def forbid_reading(monkeypatch) -> None:
    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(utils.storage.load, "load_weights", read)


@pytest.mark.parametrize(
    ("held", "waits", "message"),
    [
        (
            Storage(META, BF16, num_streamed=1),
            False,
            "the blocks in main memory take 0.0. MB, and 0.00 MB are free\nswap",
        ),
        (Storage(META, BF16, "int8"), True, "one of the two experts is in main memory at any time: it takes 0.1. MB"),
    ],
)
def test_too_little_main_memory_is_said_with_numbers_before_anything_is_read(files, monkeypatch, held, waits, message):
    forbid_reading(monkeypatch)
    with_free(monkeypatch, 1000)
    with pytest.raises(UserError, match=message):
        load(files, Store(held), waits=waits)


DISK, ALONE = "let one of them wait on disk with --idle_expert disk, ", "train one at a time"


@pytest.mark.parametrize(
    ("held", "waits", "advice"),
    [
        (Storage(META, BF16), True, f"\n{DISK}{ALONE}: --expert high"),
        (Storage(META, BF16, num_streamed=1), True, f"\n{DISK}{ALONE} \\(--expert\\)"),
        (Storage(META, BF16, num_streamed=1), False, f"\n{ALONE} \\(--expert\\)"),  # the first one alone is too large
        (Storage(META, BF16, num_streamed=1, idle_on_disk=True), False, f"\n{ALONE} \\(--expert\\)"),
    ],
)
def test_disk_is_the_advice_where_the_expert_that_waits_is_too_much(files, monkeypatch, held, waits, advice):
    with_free(monkeypatch, 1000)
    with pytest.raises(UserError, match=advice):
        load(files, Store(held, takes_turns=True), waits=waits)


@pytest.mark.parametrize("streamed", [0, 1])
def test_of_an_expert_that_waits_on_disk_only_what_is_in_main_memory_is_counted(files, monkeypatch, streamed):
    held = Storage(NEAR, BF16, num_streamed=streamed, idle_on_disk=True)
    store, layout = Store(held, takes_turns=True), build_transformer(files.transformer)
    load(files, store)
    inner = {f"{name}.weight" for name in linear_layers(layout)}
    needed = sum(size for name, size in held.sizes(layout).items() if name not in inner)
    with_free(monkeypatch, needed)
    load(files, store, waits=True)
    with_free(monkeypatch, needed - 1)
    with pytest.raises(UserError, match=f"what the expert that waits on disk has in main memory takes .*\n{ALONE}"):
        load(files, store, waits=True)


def test_exactly_as_much_main_memory_as_is_needed_is_enough(files, monkeypatch):
    held = Storage(META, BF16, num_streamed=1)
    layers = linear_layers(build_transformer(files.transformer))
    needed = sum(layer.weight.numel() * 2 for name, layer in layers.items() if name.startswith("blocks.1."))
    with_free(monkeypatch, needed)
    load(files, Store(held))
    with_free(monkeypatch, needed - 1)
    with pytest.raises(UserError, match="swap fewer with --blocks_to_swap"):
        load(files, Store(held))


@pytest.fixture(scope="module")
def wide_files(tmp_path_factory) -> ModelFiles:
    """A model of four blocks whose weights fill their places in memory, as those of released widths do."""
    shape = replace(TINY_SHAPE, dim=64, ffn_dim=128, num_layers=4)
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.1-T2V-1.3B", base=shape))


@pytest.mark.parametrize("format", [None, "fp8", "fp8_scaled", "int8", "nf4"])
@pytest.mark.parametrize("keeps_ends", [False, True])
def test_what_is_counted_is_what_waits_in_main_memory_each_block_with_its_own_size(
    wide_files, monkeypatch, format, keeps_ends
):
    counted: list[int] = []
    monkeypatch.setattr(Store, "_check_room", lambda _, needed, waits: counted.append(needed))
    model, stream = load(wide_files, Store(Storage(NEAR, BF16, format, keeps_ends, num_streamed=4)))
    own = dict.fromkeys(range(4), 0)
    for name, layer in linear_layers(model).items():
        own[int(name.split(".")[1])] += layer.nbytes if isinstance(layer, QuantisedLinear) else layer.weight.nbytes
    assert counted == [sum(own.values())] == [stream.nbytes]
    assert {block: host.nbytes for block, host in stream.hosts.items()} == own
    assert own[0] == own[3] and own[1] == own[2]
    assert (own[0] > own[1]) == (keeps_ends and format is not None) and stream.block_bytes == own[0]


@pytest.mark.parametrize(
    ("held", "waits", "asks"),
    [
        (Storage(CPU, BF16), False, 0),
        (Storage(CPU, BF16, "int8"), False, 1),
        (Storage(CPU, BF16, num_streamed=1), False, 1),
        (Storage(META, BF16), True, 1),
    ],
)
def test_what_waits_or_is_quantised_gives_back_at_once_what_is_freed_while_it_is_loaded(
    files, monkeypatch, held, waits, asks
):
    asked: list[str] = []
    monkeypatch.setattr(utils.storage.load, "return_memory_at_once", lambda: asked.append("give back"))
    own = utils.storage.load.load_weights
    monkeypatch.setattr(utils.storage.load, "load_weights", lambda *args: asked.append("load") or own(*args))
    load(files, Store(held), waits=waits)
    assert asked == ["give back"] * asks + ["load"]


def test_where_the_model_is_in_main_memory_anyway_nothing_is_checked(files, monkeypatch):
    with_free(monkeypatch, 0)
    load(files, Store(Storage(CPU, BF16, num_streamed=1)), waits=True)


# -------------------------------------------------------------------------------- a device that is hardly large enough

BLOCKS, STREAMED = 4, 3
SHAPE = WanShape(dim=5120, ffn_dim=13824, num_heads=40, num_layers=BLOCKS)  # of Wan 14B


class CappedDevice(TorchDispatchMode):
    """Counts the bytes of what lives on the meta device, and has no more than a budget of them."""

    def __init__(self, budget: float = math.inf) -> None:
        super().__init__()
        self.budget, self.live, self.peak = budget, 0, 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, given = func(*args, **(kwargs or {})), storages_of((args, kwargs))
        for key, storage in storages_of(result).items():
            if key not in given:  # no view
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        self._known[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._forget, storage._cdata)
        if self.live > self.budget:
            raise torch.OutOfMemoryError(f"{self.live} bytes of {self.budget}")

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


def storages_of(tree: Any) -> dict[int, torch.UntypedStorage]:
    """The storages on the meta device that a call was given, or returns."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}


def large_files(monkeypatch) -> TransformerFiles:
    """A transformer as wide as the released one, in int8. Its content is memory that nobody has written."""
    with META:
        model = WanModel(SHAPE)
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    in_int8 = {f"{name}.weight" for name in linear_layers(model)}

    @contextmanager
    def open_tensors(entries: dict[str, Entry], dtype: torch.dtype) -> Iterator[Any]:
        def read(name: str) -> Tensor | Quantised:
            if name not in in_int8:
                return torch.empty(names[name], dtype=BF16)
            return Quantised(torch.empty(names[name], dtype=torch.int8), torch.ones(names[name][0], 1), 256)

        yield read

    monkeypatch.setattr(wan.checkpoints.load, "open_tensors", open_tensors)
    return TransformerFiles(Path("large"), {name: Entry(shape, ()) for name, shape in names.items()}, SHAPE)


def load_large(files: TransformerFiles, streamed: int, budget: float) -> CappedDevice:
    """Loads it on a device of so many bytes, and runs its blocks up and down twice."""
    model, device = build_transformer(files), CappedDevice(budget)
    rotation.cache_clear()
    with device:
        stream = Store(Storage(META, BF16, "int8", num_streamed=streamed)).load(model, files, cast_to)
        layers = linear_layers(model).values()
        assert all(layer.weight.is_meta and layer.scale.is_meta and layer.mixed_by.is_meta for layer in layers)
        loaded = device.live
        for block in 2 * [*range(BLOCKS), *reversed(range(BLOCKS))] if stream else ():
            stream.enter(block)
        assert device.live == loaded == device.peak
    return device


def test_a_streamed_model_takes_its_ring_and_what_stays_and_not_a_byte_more(monkeypatch, capsys):
    files = large_files(monkeypatch)
    sizes = Storage(META, BF16, "int8").sizes(build_transformer(files))
    in_block = [size for name, size in sizes.items() if name.startswith("blocks.0.") and size > 10**6]
    assert len(in_block) == 10 and 351e6 < sum(in_block) < 353e6
    rest = sum(sizes.values()) - STREAMED * sum(in_block)
    needed = SLOTS * sum(map(aligned, in_block)) + rest + 2 * 256**2  # one rotation in bf16, which all layers share
    assert load_large(files, STREAMED, needed).peak == needed
    with pytest.raises(torch.OutOfMemoryError):
        load_large(files, STREAMED, needed - 1)
    with pytest.raises(torch.OutOfMemoryError):
        load_large(files, 0, needed)  # nothing waits
    assert "and the GPU has 2 buffers of 0.35 GB for them" in capsys.readouterr().out
