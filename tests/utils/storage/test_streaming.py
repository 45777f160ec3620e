"""Weights that come from main memory give the same numbers as weights that stay, bit for bit, whenever they arrive."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.compiler import need_compiler
from tests.streamed import CPU, Case, LateLane, resident
from tests.trainees import SITUATIONS, Situation, answers, equal, inputs_of, relative_error
from utils.storage.streaming import SLOTS, Ring, Stream, assign_slots, streamed_blocks
from utils.training.checkpointing import STRATEGIES
from utils.training.memory import Memory

BF16, FP32 = torch.bfloat16, torch.float32
FUSED = {"fuse": True}

# --------------------------------------------------------------------------------- which blocks, and where


@pytest.mark.parametrize("num_blocks", [1, 2, 5, 30, 40])
def test_blocks_that_are_streamed_are_spread_evenly(num_blocks):
    for count in range(1, num_blocks + 1):
        blocks = streamed_blocks(num_blocks, count)
        assert len(set(blocks)) == count and blocks == sorted(blocks) and 0 <= blocks[0] <= blocks[-1] < num_blocks
        gaps = [second - first for first, second in itertools.pairwise(blocks)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        # As many of those that stay before the first as after the last, so that the ends are like the middle.
        assert abs(blocks[0] - (num_blocks - 1 - blocks[-1])) <= 1
    assert streamed_blocks(num_blocks, num_blocks) == list(range(num_blocks))
    assert streamed_blocks(num_blocks, 0) == []


@pytest.mark.parametrize(("num_blocks", "count"), [(40, 1), (40, 7), (40, 40), (5, 4)])
def test_neighbours_have_different_slots(num_blocks, count):
    slots = assign_slots(num_blocks, count)
    assert list(slots) == streamed_blocks(num_blocks, count)
    assert set(slots.values()) == set(range(min(count, SLOTS)))
    assert all(slots[a] != slots[b] for a, b in itertools.pairwise(slots))


@pytest.mark.parametrize(("num_blocks", "count"), [(40, 1), (40, 7), (40, 40), (5, 4)])
def test_of_models_that_take_turns_the_blocks_that_stay_have_slots_of_their_own(num_blocks, count):
    slots, streamed = assign_slots(num_blocks, count, takes_turns=True), assign_slots(num_blocks, count)
    assert list(slots) == list(range(num_blocks))
    own = [slots[block] for block in slots if block not in streamed]
    assert len(set(own)) == len(own) == num_blocks - count and not set(own) & set(streamed.values())
    assert {block: slots[block] for block in streamed} == streamed


# ---------------------------------------------------------------------------------------- the same numbers

PLAIN = Case()
CASES = {
    "none": (PLAIN, 4),
    "one block": (PLAIN, 1),
    "all blocks": (Case(Memory("full")), 5),
    "selective, bf16": (Case(Memory("selective", stream=BF16), "int8", BF16), 3),
    "offload": (Case(Memory("offload"), "fp8_scaled"), 4),
    "nf4": (Case(Memory("none"), "nf4"), 3),
    "fused, none": (Case(Memory(**FUSED), "int8"), 4),
    "fused, selective": (Case(Memory("selective", **FUSED), "nf4"), 5),
    "fused, full, bf16": (Case(Memory("full", stream=BF16, **FUSED), None, BF16), 2),
    "fused, offload, bf16": (Case(Memory("offload", stream=BF16, **FUSED), "fp8_scaled", BF16), 3),
    "ends that are not quantised": (Case(Memory(**FUSED), "int8", keeps_ends=True), 5),
    "a frozen start": (Case(Memory("full"), "int8", situation=Situation(targets=("blocks.[34].*",), batch=1)), 4),
    "a frozen start, fused": (Case(Memory(**FUSED), situation=Situation(targets=("blocks.2.*",), batch=1)), 5),
    "images that are trained": (
        Case(Memory(), "int8", situation=replace(SITUATIONS["images"], targets=("img_emb.*", "attn"))),
        4,
    ),
    "images that are trained, fused": (
        Case(Memory("selective", **FUSED), situation=replace(SITUATIONS["images"], targets=("img_emb.*", "attn"))),
        3,
    ),
    "control": (Case(Memory("offload"), situation=SITUATIONS["held frame"]), 4),
    "one block of one": (Case(Memory("full"), "int8", blocks=1), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_streamed_blocks_give_the_numbers_of_those_that_stay_bit_for_bit(name):
    case, count = CASES[name]
    found, lane = case.run(count)
    assert all(tensor.isfinite().all() for tensor in found)
    assert equal(found, resident(case)) and lane.copies


def test_every_strategy_and_every_number_of_blocks_is_among_the_cases():
    assert {case.memory.checkpointing for case, _ in CASES.values()} == set(STRATEGIES)
    assert {(case.memory.checkpointing, case.memory.fuse) for case, _ in CASES.values()} == set(
        itertools.product(STRATEGIES, (False, True))
    )
    assert {case.format for case, _ in CASES.values()} == {None, "fp8_scaled", "int8", "nf4"}
    assert {count for case, count in CASES.values() if case.blocks == 5} == {1, 2, 3, 4, 5}


def in_turns(case: Case, count: int, ring: Ring | None) -> list[Tensor]:
    """What two models give in turns, with so many streamed blocks on a ring, or with all weights on the device."""
    models = [case.model(seed) for seed in range(2)]
    slots = assign_slots(case.blocks, count, takes_turns=True)
    streams = [None if ring is None else Stream(model, slots, ring) for model in models]
    trained = [case.trained(model, stream) for model, stream in zip(models, streams, strict=True)]
    inputs, found = inputs_of(models[0], case.situation), []
    for index in (0, 1, 1, 0):
        found += answers(models[index], trained[index], inputs)
        if index:
            with torch.no_grad():  # as previews ask them, each for its part
                found += [model(*inputs) for model in models]
    return found


@pytest.mark.parametrize(("count", "fuse"), [(1, True), (3, False), (5, True)])
def test_models_that_take_turns_on_one_ring_give_the_numbers_of_those_that_stay(count, fuse):
    case, ring = Case(Memory("selective", fuse=fuse), "int8"), Ring(CPU, LateLane())
    assert equal(in_turns(case, count, ring), in_turns(case, count, None))
    assert len(ring.slots) == case.blocks - count + min(count, SLOTS)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("format", [None, "int8"])
def test_compiled_blocks_give_the_numbers_of_those_that_stay(strategy, format):
    need_compiler()
    torch._dynamo.reset()
    case = Case(Memory(strategy, compile=True), format)
    found, expected = case.run(4)[0], case.run()[0]
    torch._dynamo.reset()
    assert relative_error(found, expected) < 1e-5


def test_a_sampled_model_gives_the_numbers_of_one_that_stays():
    """Nothing else tells a stream when blocks run."""
    model, lane = PLAIN.model(), LateLane()
    inputs = inputs_of(model, PLAIN.situation)
    with torch.no_grad():
        expected = model(*inputs)
    stream = Stream(model, assign_slots(5, 4), Ring(CPU, lane))
    for context in (torch.no_grad, torch.inference_mode):  # again, after it was no longer followed
        with context(), stream.followed(model):
            assert all(torch.equal(model(*inputs), expected) for _ in range(3))
        assert not any("forward" in vars(block) for block in model.blocks)


# --------------------------------------------------------------------------------------- how often, and when


def copies(count: int, strategy: str = "full", **more: bool) -> list[int]:
    """The copies of a first step, of a second one, and of each of three passes without gradients after it."""
    case, lane = Case(Memory(strategy, **more)), LateLane()
    model = case.model()
    stream = Stream(model, assign_slots(case.blocks, count), Ring(CPU, lane))
    parameters, inputs, seen = case.trained(model, stream), inputs_of(model, case.situation), []
    for training in (True, True, False, False, False):
        before = len(lane.copies)
        if training:
            answers(model, parameters, inputs)
        else:
            with torch.no_grad():
                model(*inputs)
        seen.append(len(lane.copies) - before)
    return seen


@pytest.mark.parametrize(
    ("strategy", "fuse"), [("none", False), ("selective", True), ("full", False), ("offload", True)]
)
def test_weights_are_copied_as_often_as_needed_and_no_more(strategy, fuse):
    # Up and down, and up again: each time two of the four are still there. When samplers are at the last block, the
    # first follows in the slot of the one before.
    assert copies(4, strategy, fuse=fuse) == [4 + 2, 2 + 2, 2 + 1, 4, 4]


@pytest.mark.parametrize(("count", "expected"), [(1, [1, 0, 0, 0, 0]), (2, [2, 0, 0, 0, 0]), (3, [4, 2, 1, 2, 2])])
def test_as_many_blocks_as_slots_are_copied_once(count, expected):
    assert copies(count) == expected


def test_the_next_block_is_on_its_way_while_one_runs():
    """When a block runs the weights of the next are fetched, upwards and downwards, and of no others."""
    model, lane = PLAIN.model(), LateLane()
    stream = Stream(model, assign_slots(5, 5), Ring(CPU, lane))
    number = {host.data_ptr(): block for block, host in stream.hosts.items()}
    seen = []
    own = stream.enter

    def enter(block: int) -> None:
        before = len(lane.copies)
        own(block)
        seen.append((block, [number[address] for address in lane.copies[before:]]))

    stream.enter = enter
    answers(model, Case(Memory("full")).trained(model, stream), inputs_of(model, PLAIN.situation))
    up = [(0, [0, 1]), (1, [2]), (2, [3]), (3, [4]), (4, [])]
    assert seen == [*up, (4, []), (3, [2]), (2, [1]), (1, [0]), (0, [])]


# -------------------------------------------------------------------------------------- what is seen to fail


class Hasty(Stream):
    """Issues the copy of one block further than there are slots for."""

    def enter(self, block: int) -> None:
        super().enter(block)
        further = [other for other in self._blocks if other > block][1:2]
        for other in further:
            self._ring.fetch(self.slots[other], self.hosts[other])


class Late(Stream):
    """Does not wait for the weights of the block that runs."""

    def enter(self, block: int) -> None:
        wait, self._ring.wait = self._ring.wait, lambda _: None
        super().enter(block)
        self._ring.wait = wait


class OneWay(Stream):
    """Does not notice the backward pass."""

    def enter(self, block: int) -> None:
        if torch._C._current_graph_task_id() == -1:
            super().enter(block)


@pytest.mark.parametrize(
    ("broken", "name"), [(Hasty, "none"), (Hasty, "offload"), (Late, "none"), (OneWay, "none"), (OneWay, "fused, none")]
)
def test_a_stream_that_is_too_early_or_too_late_is_found_out(broken, name):
    case, _ = CASES[name]
    found, _ = case.run(4, of=broken)
    assert not equal(found, resident(case))


def test_the_weights_are_those_in_main_memory():
    """Poisoned there, they are poisoned in every answer: nothing else of them is left."""
    found, _ = PLAIN.run(4, before=lambda stream: stream.hosts[3].fill_(255))
    assert not any(tensor.isfinite().all() for tensor in found)
