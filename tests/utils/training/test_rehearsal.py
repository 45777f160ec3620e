"""The largest batch goes through the model once, and leaves nothing but a plan."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor

from tests.trainees import SITUATIONS, inputs_of, loss_of, prepare_again, trainee
from utils.encoding.conditioning import Batch, Cond
from utils.training import rehearsal
from utils.training.checkpoint_plan import AUTO, LADDER, CheckpointPlan, Room
from utils.training.memory import Memory
from utils.training.phases import Phase
from utils.training.rehearsal import rehearse

TOKENS = 3 * 18


class Rehearsal:
    """A model, a phase that counts how often its loss is asked for, and a batch."""

    def __init__(self, strategy: str = AUTO) -> None:
        self.model, self.parameters = trainee()
        self.plan = CheckpointPlan(strategy, len(self.model.blocks))
        prepare_again(self.model, Memory(strategy), self.plan)
        latents, self.timestep, text = inputs_of(self.model)
        self.batch, self.asked, self.strategies = Batch(latents, Cond(text)), 0, []
        self.phase = Phase("lora", nullcontext, None, self.loss, None, None, ())

    def loss(self, batch: Batch) -> Tensor:
        self.asked += 1
        self.strategies.append(self.plan.strategies(TOKENS))
        noise = torch.randn_like(batch.latents) * random.random()
        return loss_of(self.model(batch.latents + noise, self.timestep, batch.cond.text))

    def run(self) -> None:
        rehearse(self.phase, self.model, self.batch, self.plan, self.parameters)


@pytest.fixture(autouse=True)
def memory(monkeypatch) -> Callable[[int], None]:
    """Sets how much main memory is free."""

    def set_free(available: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))

    set_free(1 << 40)
    return set_free


@pytest.mark.parametrize("strategy", [AUTO, "none", "full"])
def test_nothing_is_left_behind(strategy):
    it = Rehearsal(strategy)
    for parameter in it.model.parameters():
        parameter.grad = None
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    values = {name: (p.clone(), p._version, p.data_ptr()) for name, p in it.model.named_parameters()}
    it.run()
    assert it.asked == (2 if strategy == AUTO else 1)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    for name, parameter in it.model.named_parameters():
        value, version, address = values[name]
        assert torch.equal(parameter, value) and parameter.grad is None
        assert (parameter._version, parameter.data_ptr()) == (version, address)


def test_gradients_that_exist_are_not_added_to():
    it = Rehearsal()
    for parameter in it.parameters:
        parameter.grad = torch.ones_like(parameter)
    it.run()
    assert all((parameter.grad == 1).all() for parameter in it.parameters)


def test_an_open_plan_keeps_least_is_settled_by_that_and_then_tried(capsys):
    it = Rehearsal()
    it.run()
    assert it.strategies == [["offload"] * 2, ["none"] * 2] and not it.plan.is_open
    assert capsys.readouterr().out == f"for the backward pass of {TOKENS} tokens all blocks keep everything\n"


def test_where_the_room_was_less_than_measured_blocks_keep_less(capsys, monkeypatch):
    it = Rehearsal()
    costs = {"offload": 0, "full": 1, "selective": 2, "none": 3}
    monkeypatch.setattr(rehearsal, "measure_room", lambda *_: Room(6 * TOKENS, 0, TOKENS, costs))
    right = ["none", "selective"]

    def full_until_it_fits(batch: Batch) -> Tensor:
        if it.plan.strategies(TOKENS) != right:
            raise torch.OutOfMemoryError("full")
        return it.loss(batch)

    it.phase = replace(it.phase, loss=full_until_it_fits)
    it.run()
    assert it.plan.strategies(TOKENS) == right and "that was too much" in capsys.readouterr().out


def test_where_even_the_least_does_not_fit_that_is_an_error(monkeypatch):
    it = Rehearsal()
    costs = {"offload": 0, "full": 1, "selective": 2, "none": 3}
    monkeypatch.setattr(rehearsal, "measure_room", lambda *_: Room(6 * TOKENS, 0, TOKENS, costs))

    def full(_batch: Batch) -> Tensor:
        raise torch.OutOfMemoryError("full")

    it.phase = replace(it.phase, loss=full)
    with pytest.raises(torch.OutOfMemoryError):
        it.run()
    assert it.plan.strategies(TOKENS) == ["offload"] * 2


def test_where_memory_is_short_the_plan_says_what_blocks_keep(memory, capsys):
    it = Rehearsal()
    memory(0)
    it.run()
    assert it.plan.strategies(TOKENS) == ["full"] * 2
    out = " ".join(capsys.readouterr().out.split())
    assert out == f"for the backward pass of {TOKENS} tokens all blocks keep the input"


@pytest.mark.parametrize("strategy", ["none", "offload"])
def test_a_plan_that_is_not_open_stays_and_says_nothing(strategy, capsys, monkeypatch):
    it = Rehearsal(strategy)
    monkeypatch.setattr(rehearsal, "measure_room", lambda *_: pytest.fail("nothing is to be measured"))
    it.run()
    assert it.asked == 1 and it.plan.strategies(TOKENS) == [strategy] * 2
    assert capsys.readouterr().out == ""


def test_room_is_left_for_gradients_and_moments_of_all_that_is_trained(monkeypatch):
    it = Rehearsal()
    reserves = []

    def measured(model, run, reserve) -> Room:
        run()
        reserves.append(reserve)
        return Room(0, 1, 1, {"offload": 0, "full": 1, "selective": 2, "none": 3})

    monkeypatch.setattr(rehearsal, "measure_room", measured)
    others = [torch.nn.Parameter(torch.zeros(1000))]
    rehearse(it.phase, it.model, it.batch, it.plan, [*it.parameters, *others])
    assert reserves == [3 * 4 * (sum(p.numel() for p in it.parameters) + 1000)]


def test_the_phase_speaks_in_forward_and_backward_and_only_there():
    it = Rehearsal("full")
    spans, seen = [], []

    @contextmanager
    def speaking() -> Iterator[None]:
        spans.append("open")
        yield
        spans.append("closed")

    it.model.blocks[0].ffn.register_forward_hook(lambda *_: seen.append(list(spans)))
    it.phase = replace(it.phase, speaking=speaking)
    it.run()
    assert seen == [["open"], ["open"]] and spans == ["open", "closed"]


def test_parameters_that_the_loss_does_not_reach_are_no_error():
    it = Rehearsal()
    it.model.register_parameter("idle", torch.nn.Parameter(torch.ones(1)))
    it.run()
    assert it.asked == 2


def test_memory_that_is_too_small_is_reported_now():
    it = Rehearsal()

    def full(batch: Batch) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    it.phase = replace(it.phase, loss=full)
    with pytest.raises(torch.OutOfMemoryError):
        it.run()
    assert it.plan.is_open


def test_two_rehearsals_draw_the_same_numbers():
    first, second = Rehearsal(), Rehearsal()
    losses = []
    for it, seed in ((first, 1), (second, 2)):
        torch.manual_seed(seed)
        own = it.loss
        it.phase = replace(it.phase, loss=lambda batch, own=own: losses.append(value := own(batch)) or value)
        it.run()
    assert all(torch.equal(loss, losses[0]) for loss in losses[1:])
    assert SITUATIONS["text"].batch * 18 == TOKENS == first.batch.tokens(first.model.shape.patch_size)


def test_the_room_is_measured_while_the_phase_speaks(monkeypatch):
    # Of two experts the one that speaks is on the device; before, it may wait on the CPU.
    it = Rehearsal()
    spans: list[str] = []

    @contextmanager
    def speaking() -> Iterator[None]:
        spans.append("open")
        yield
        spans.append("closed")

    measured: list[list[str]] = []
    monkeypatch.setattr(
        rehearsal,
        "measure_room",
        lambda *_: measured.append(list(spans)) or Room(1 << 40, 0, TOKENS, dict.fromkeys(LADDER, 1.0)),
    )
    it.phase = replace(it.phase, speaking=speaking)
    it.run()
    assert measured == [["open"]] and spans == ["open", "closed"]


def test_main_memory_is_given_back_where_no_block_waits_in_it():
    it = Rehearsal()
    it.run()
    assert it.plan.strategies(TOKENS) == ["none"] * 2 and not it.plan.parking._chunks
