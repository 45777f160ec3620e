"""Where the weights that wait in main memory are, on either side, and what a ring of slots holds and forgets."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.streamed import CPU, Case, LateLane
from tests.trainees import answers, inputs_of
from utils.common.errors import RunError
from utils.storage.arena import ALIGNMENT, aligned
from utils.storage.formats import quantise
from utils.storage.linear import QuantisedLinear
from utils.storage.streaming import SLOTS, PlainLane, Ready, Ring, Stream, assign_slots
from utils.storage.weights import linear_layers
from utils.training.memory import Memory
from wan.modules.model import WanModel

FP32 = torch.float32
PLAIN = Case()


@pytest.mark.parametrize("format", [None, "fp8", "fp8_scaled", "int8", "nf4"])
def test_a_block_is_one_piece_of_memory_and_its_layers_refer_to_one_slot_for_good(format):
    case = Case(Memory("full"), format)
    model, ring = case.model(), Ring(CPU, LateLane())
    names, biases = list(model.state_dict()), {name: p for name, p in model.named_parameters() if "bias" in name}
    weights = {name: layer.weight.clone() for name, layer in linear_layers(model).items()}
    stream = Stream(model, assign_slots(5, 3), ring)
    assert list(model.state_dict()) == names
    assert all(model.get_parameter(name) is bias for name, bias in biases.items())
    (size,) = {host.nbytes for host in stream.hosts.values()}
    assert size % ALIGNMENT == 0 and {slot.nbytes for slot in ring.slots.values()} == {size}
    assert len({host.untyped_storage().data_ptr() for host in stream.hosts.values()}) == 1
    places = {name: layer.weight.data_ptr() for name, layer in linear_layers(model).items()}
    parameters = case.trained(model, stream)
    answers(model, parameters, inputs_of(model, case.situation))
    for name, layer in linear_layers(model).items():
        if ".lora_" in name:
            continue
        layer, name = getattr(layer, "base_layer", layer), name.replace(".base_layer", "")
        block = int(name.split(".")[1])
        assert layer.weight.data_ptr() == places[name] and not layer.weight.requires_grad
        assert stream.holds(layer.weight) == (block in stream.slots)
        if isinstance(layer, QuantisedLinear) and layer.scale is not None:
            assert stream.holds(layer.scale) == (block in stream.slots)
        if block in stream.slots:
            slot = ring.slots[stream.slots[block]]
            start = layer.weight.data_ptr() - slot.data_ptr()
            assert start % ALIGNMENT == 0 and start >= 0 and start + layer.weight.nbytes <= size
            host = stream.hosts[block][start : start + layer.weight.nbytes]
            assert torch.equal(host, weights[name].flatten().view(torch.uint8))
    assert not any(stream.holds(parameter) for parameter in parameters)


def test_weights_that_moved_to_main_memory_leave_the_device():
    model = PLAIN.model()
    kept = [torch.UntypedStorage._weak_ref(layer.weight.untyped_storage()) for layer in linear_layers(model).values()]
    Stream(model, assign_slots(5, 5), Ring(CPU, PlainLane()))
    assert all(torch.UntypedStorage._expired(each) for each in kept)


def test_a_copy_at_once_is_what_the_cpu_does():
    ring, host = Ring(CPU), torch.arange(8, dtype=torch.uint8)
    assert isinstance(ring.lane, PlainLane) and ring.lane.copy(ring.slot(0, 8), host) is None
    assert torch.equal(ring.slots[0], host)
    ring.lane.wait(None)


def test_a_slot_has_one_size_and_takes_no_larger_block():
    ring = Ring(CPU, PlainLane())
    first: Tensor = ring.slot(0, 16)
    assert ring.slot(0, 16) is ring.slot(0, 8) is first and len(first) == 16
    with pytest.raises(RunError, match="quantised in different ways"):
        ring.slot(0, 17)


@pytest.mark.parametrize("format", ["fp8", "int8", None])
def test_blocks_whose_ends_are_kept_take_their_own_sizes_and_are_copied_no_further(format):
    case = Case(format=format, keeps_ends=format is not None)
    model, ring = case.model(), Ring(CPU, PlainLane())
    own = {
        block: sum(
            aligned(tensor.nbytes)
            for layer in model.blocks[block].modules()
            if isinstance(layer, nn.Linear)
            for tensor in (layer.weight, getattr(layer, "scale", None))
            if tensor is not None
        )
        for block in range(5)
    }
    rows = sum(aligned(4 * layer.out_features) for layer in linear_layers(model).values()) // 5
    if format == "fp8":  # without a scale; in a stream each row has one
        own = {block: size + (0 if block in (0, 4) else rows) for block, size in own.items()}
    stream = Stream(model, assign_slots(5, 5), ring)
    assert {block: host.nbytes for block, host in stream.hosts.items()} == own
    assert stream.nbytes == sum(own.values()) == next(iter(stream.hosts.values())).untyped_storage().nbytes()
    assert stream.block_bytes == max(own.values()) == own[0] and (own[1] < own[0]) == (format is not None)
    # A slot is as large as the largest of the blocks that share it: 0, 2 and 4; 1 and 3.
    assert {number: len(slot) for number, slot in ring.slots.items()} == {0: own[0], 1: own[1]}
    ring.slots[stream.slots[2]].fill_(7)
    ring.fetch(stream.slots[2], stream.hosts[2])
    slot = ring.slots[stream.slots[2]]
    assert torch.equal(slot[: own[2]], stream.hosts[2]) and slot[own[2] :].eq(7).all()


@pytest.mark.parametrize("format", ["fp8_scaled", "int8"])
def test_on_a_ring_of_another_device_all_that_decides_the_values_is_there(format):
    model, meta = Case(format=format).model(), torch.device("meta")
    for layer in linear_layers(model).values():  # as they are loaded: codes wait in main memory
        layer.hold(quantise(layer.weight, format), meta)
    Stream(model, assign_slots(5, 5), Ring(meta, PlainLane()))
    for layer in linear_layers(model).values():
        assert layer.weight.is_meta and layer.scale.is_meta
        assert layer.mixed_by.is_meta if format == "int8" else layer.mixed_by is None
        assert layer.values(FP32).is_meta


# -------------------------------------------------------------------------------- experts that are stored differently


def with_scales(scales: str, case: Case, seed: int) -> WanModel:
    """A model in fp8, as files have it: with a scale for each "row", one for a "layer", or "none"."""
    model = case.model(seed)
    for layer in linear_layers(model).values():
        quantised = quantise(layer.values(FP32), "fp8_scaled" if scales == "row" else "fp8")
        one = torch.tensor(0.75 + 0.5 * seed) if scales == "layer" else None
        layer.hold(replace(quantised, scale=quantised.scale if one is None else one), CPU)
    return model


@pytest.mark.parametrize("pair", [*itertools.permutations(("row", "layer", "none"), 2)])
def test_two_experts_whose_scales_differ_in_number_share_one_ring(pair):
    case, ring = Case(format="fp8"), Ring(CPU, LateLane())
    models = [with_scales(scales, case, seed) for seed, scales in enumerate(pair)]
    inputs = inputs_of(models[0], case.situation)
    with torch.no_grad():
        expected = [model(*inputs) for model in models]
        streams = [Stream(model, assign_slots(5, 4, takes_turns=True), ring) for model in models]
        for model, stream, answer in [*zip(models, streams, expected, strict=True)] * 2:
            with stream.followed(model):
                assert torch.equal(model(*inputs), answer)
    assert not torch.equal(*expected) and len(ring.slots) == 1 + SLOTS


# -------------------------------------------------------------------------------------- what is forgotten, or given up


def test_a_ring_that_forgets_holds_no_main_memory_and_copies_again():
    lane = LateLane()
    ring, host = Ring(CPU, lane), torch.arange(8, dtype=torch.uint8)
    slot = ring.slot(0, 8)
    ring.fetch(0, host)
    ring.wait(0)
    ring.forget()
    memory = torch.UntypedStorage._weak_ref(host.untyped_storage())
    ring.fetch(0, host)
    ring.wait(0)
    assert len(lane.copies) == 2 and torch.equal(slot, host)
    ring.forget()
    del host
    assert torch.UntypedStorage._expired(memory)


def test_a_stream_that_is_no_longer_followed_leaves_no_main_memory_in_the_ring():
    model, ring = PLAIN.model(), Ring(CPU, PlainLane())
    stream = Stream(model, assign_slots(5, 4), ring)
    memory = torch.UntypedStorage._weak_ref(stream.hosts[0].untyped_storage())
    with torch.no_grad(), pytest.raises(KeyError), stream.followed(model):
        model(*inputs_of(model, PLAIN.situation))
        raise KeyError("interrupted")
    del stream
    assert torch.UntypedStorage._expired(memory) and not any("forward" in vars(block) for block in model.blocks)


class Interrupted(PlainLane):
    """The copies of some numbers are begun, and end half way."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.count = numbers, 0

    def copy(self, slot: Tensor, host: Tensor) -> Ready:
        self.count += 1
        if self.count in self.numbers:
            slot[: len(slot) // 2] = host[: len(slot) // 2]
            raise KeyboardInterrupt
        return super().copy(slot, host)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_copy_that_was_interrupted_is_made_again_when_the_weights_are_needed_next(is_same):
    """Of the block whose copy it was, or of the one whose weights it has overwritten."""
    ring = Ring(CPU, Interrupted(2))
    first, second = torch.arange(8, dtype=torch.uint8), torch.arange(8, 16, dtype=torch.uint8)
    slot = ring.slot(0, 8)
    ring.fetch(0, first)
    with pytest.raises(KeyboardInterrupt):
        ring.fetch(0, second)
    needed = second if is_same else first
    assert not torch.equal(slot, needed)
    ring.fetch(0, needed)
    ring.wait(0)
    assert torch.equal(slot, needed)
