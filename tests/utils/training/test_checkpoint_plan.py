"""Blocks keep as much as there is room for, and never more."""

import random
from dataclasses import replace

import pytest

from utils.training.checkpoint_plan import AUTO, KEEPING, LADDER, CheckpointPlan, Room
from utils.training.checkpointing import STRATEGIES

COSTS = {"offload": 0.0, "full": 10.0, "selective": 30.0, "none": 100.0}


def room(free: int, working: int = 0, tokens: int = 10, **costs: float) -> Room:
    return Room(free, working, tokens, COSTS | costs)


def random_rooms(count: int = 300) -> list[tuple[Room, int]]:
    """Rooms that hold from nothing to everything of so many blocks."""
    rng, rooms = random.Random(0), []
    for _ in range(count):
        steps = [rng.choice([0.0, rng.uniform(0, 1e4)]) for _ in LADDER]
        costs = {name: sum(steps[: n + 1]) for n, name in enumerate(LADDER)}
        costs["offload"], tokens, blocks = (
            rng.choice([0.0, costs["offload"]]),
            rng.randint(1, 50_000),
            rng.randint(1, 40),
        )
        most = int(costs["none"] * tokens * blocks)
        rooms.append((Room(rng.randint(-most, 2 * most + 1), rng.randint(0, most + 1), tokens, costs), blocks))
    return rooms


def heights(strategies: list[str]) -> list[int]:
    """How much each block keeps, as a place on the ladder."""
    return [LADDER.index(strategy) for strategy in strategies]


def test_the_ladder_has_every_strategy_and_a_word_for_each():
    assert set(LADDER) == set(STRATEGIES) == set(KEEPING)


@pytest.mark.parametrize(
    ("free", "chosen"),
    [
        (-1, ["offload"] * 3),
        (99, ["offload"] * 3),
        (100, ["full", "offload", "offload"]),
        (299, ["full", "full", "offload"]),
        (300, ["full"] * 3),
        (499, ["full"] * 3),
        (500, ["selective", "full", "full"]),
        (900, ["selective"] * 3),
        (1600, ["none", "selective", "selective"]),
        (2999, ["none", "none", "selective"]),
        (3000, ["none"] * 3),
        (10**9, ["none"] * 3),
    ],
)
def test_each_block_climbs_one_step_before_any_climbs_the_next(free, chosen):
    assert room(free).choose(10, 3) == chosen
    assert room(free + 70, working=70).choose(10, 3) == chosen


def test_what_a_pass_works_with_grows_with_the_tokens():
    assert room(400, working=100).choose(10, 3) == ["full"] * 3
    assert room(400, working=100).choose(20, 3) == ["full", "offload", "offload"]
    assert room(400, working=100).choose(40, 3) == ["offload"] * 3


def test_a_step_that_costs_nothing_is_always_climbed():
    assert room(0, offload=10.0).choose(10, 2) == ["full"] * 2
    assert room(-5, offload=10.0).choose(10, 2) == ["full"] * 2
    assert room(0, offload=5.0, full=5.0, selective=5.0, none=5.0).choose(10, 2) == ["none"] * 2


def test_no_more_is_kept_than_is_free():
    for measured, blocks in random_rooms():
        for tokens in {1, measured.tokens // 2 or 1, measured.tokens, 3 * measured.tokens}:
            chosen = measured.choose(tokens, blocks)
            assert len(chosen) == blocks
            kept = sum(measured.costs[strategy] - measured.costs["offload"] for strategy in chosen) * tokens
            left = measured.free - measured.working * tokens / measured.tokens
            assert kept <= max(0, left) * (1 + 1e-9)


def test_nothing_that_is_free_could_hold_one_step_more():
    for measured, blocks in random_rooms():
        chosen = heights(measured.choose(measured.tokens, blocks))
        lowest = min(chosen)
        if lowest == len(LADDER) - 1:
            continue
        kept = sum(measured.costs[LADDER[height]] - measured.costs["offload"] for height in chosen) * measured.tokens
        step = (measured.costs[LADDER[lowest + 1]] - measured.costs[LADDER[lowest]]) * measured.tokens
        assert kept + step > (measured.free - measured.working) * (1 - 1e-9)


def test_the_first_blocks_keep_most_and_no_two_differ_by_more_than_a_step():
    for measured, blocks in random_rooms():
        chosen = heights(measured.choose(measured.tokens, blocks))
        assert chosen == sorted(chosen, reverse=True) and chosen[0] - chosen[-1] <= 1


def test_more_free_memory_and_fewer_tokens_never_make_a_block_keep_less():
    rng = random.Random(1)
    for measured, blocks in random_rooms():
        chosen = heights(measured.choose(measured.tokens, blocks))
        larger = Room(measured.free + rng.randint(0, 10**9), measured.working, measured.tokens, measured.costs)
        fewer = rng.randint(1, measured.tokens)
        for other in (larger.choose(measured.tokens, blocks), measured.choose(fewer, blocks)):
            assert all(a >= b for a, b in zip(heights(other), chosen, strict=True))


# ---------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_strategy_is_that_of_all_blocks_and_never_open(strategy):
    plan = CheckpointPlan(strategy, 3)
    assert plan.strategies(5) == [strategy] * 3 and not plan.is_open
    plan.settle(room(10**9))
    assert plan.strategies(5) == [strategy] * 3


def test_auto_keeps_least_until_the_room_is_measured():
    plan = CheckpointPlan(AUTO, 3)
    assert plan.is_open and plan.strategies(10) == ["offload"] * 3
    plan.settle(room(500))
    assert not plan.is_open
    assert plan.strategies(10) == ["selective", "full", "full"]
    assert plan.strategies(5) == room(500).choose(5, 3) != plan.strategies(10)
    plan.settle(room(300))
    assert plan.strategies(10) == ["full"] * 3


def test_the_answer_for_a_number_of_tokens_stays_the_same_list():
    plan = CheckpointPlan(AUTO, 3)
    plan.settle(room(500))
    assert plan.strategies(10) is plan.strategies(10)


def test_a_plan_says_what_blocks_keep():
    def sentence(free: int, tokens: int = 10) -> str:
        plan = CheckpointPlan(AUTO, 5)
        plan.settle(Room(free * 100, 0, tokens, COSTS))
        return plan.describe(tokens)

    assert sentence(10**9) == "for the backward pass of 10 tokens all blocks keep everything"
    assert CheckpointPlan("full", 3).describe(1234567) == (
        "for the backward pass of 1,234,567 tokens all blocks keep the input"
    )
    assert sentence(2) == (
        "for the backward pass of 10 tokens blocks 0 to 1 keep the input, blocks 2 to 4 keep nothing on the device"
    )
    assert sentence(22) == (
        "for the backward pass of 10 tokens block 0 keeps everything, blocks 1 to 4 keep the input and the attention"
    )
    assert sentence(9) == (
        "for the backward pass of 10 tokens blocks 0 to 1 keep the input and the attention, "
        "blocks 2 to 4 keep the input"
    )
    assert sentence(30) == (
        "for the backward pass of 10 tokens blocks 0 to 1 keep everything, "
        "blocks 2 to 4 keep the input and the attention"
    )


def test_a_room_is_read_back_exactly():
    found = room(123, 45, 6, selective=0.1 + 0.2)
    assert Room.parse(str(found)) == found


@pytest.mark.parametrize(
    "change",
    [{"tokens": 0}, {"tokens": -1}, {"working": -1}, {"full": -1.0}, {"full": float("nan")}, {"none": float("inf")}],
)
def test_a_room_that_was_never_measured_is_none(change):
    costs = {name: value for name, value in change.items() if name in COSTS}
    facts = {name: value for name, value in change.items() if name not in COSTS}
    with pytest.raises(ValueError):
        Room.parse(str(replace(room(1, 2, 3, **costs), **facts)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"free": 1, "working": 2, "tokens": 3, "costs": {"full": 1}}',
        '{"free": "a", "working": 2, "tokens": 3, "costs": {}}',
        '{"free": 1e999, "working": 2, "tokens": 3, "costs": 7}',
    ],
)
def test_another_text_is_no_room(text):
    with pytest.raises(ValueError):
        Room.parse(text)
