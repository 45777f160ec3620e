"""All that a run will do is done once, with the largest batch, and leaves nothing but a plan."""

import random
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import torch
from torch import Tensor

import train_wan_lora
from tests.checkout import copy_prompts
from tests.runs import CARD, FACTS, SPEC, small_learner
from tests.tiny import write_clips, write_model
from tests.trainees import SITUATIONS, inputs_of, loss_of, prepare_again, trainee
from utils.common.decisions import Decisions
from utils.common.errors import RunError, UserError
from utils.common.tensor_files import read_tensors
from utils.diffusion.objectives import Loss
from utils.encoding.conditioning import Batch, Cond
from utils.encoding.samples import FreshSamples
from utils.runs import rehearsal
from utils.runs.rehearsal import rehearse, rehearse_saving, rehearse_step
from utils.runs.run import RunSettings
from utils.training.checkpoint_plan import AUTO, LADDER, CheckpointPlan, Room
from utils.training.learner import Learner, Trainable
from utils.training.memory import Memory
from utils.training.phases import Phase
from wan.configs import FAMILIES

TOKENS = 3 * 18
COSTS = {"offload": 0, "full": 1, "selective": 2, "none": 3}


class Rehearsal:
    """A model, a phase that counts how often its loss is asked for, and a batch."""

    def __init__(self, strategy: str = AUTO, ema_decay: float = 0.0) -> None:
        self.model, self.parameters = trainee()
        self.plan = CheckpointPlan(strategy, len(self.model.blocks))
        prepare_again(self.model, Memory(strategy), self.plan)
        latents, self.timestep, text = inputs_of(self.model)
        self.batch, self.asked, self.strategies = Batch(latents, Cond(text)), 0, []
        named = {str(number): parameter for number, parameter in enumerate(self.parameters)}
        self.learner = Learner([Trainable("lora", SimpleNamespace(parameters=named), SPEC, ema_decay)])
        step = partial(self.learner.update, "lora", 1.0)
        self.phase = Phase("lora", nullcontext, None, self.loss, step, None, (), self.model)

    def loss(self, batch: Batch) -> Loss:
        self.asked += 1
        self.strategies.append(self.plan.strategies(TOKENS))
        noise = torch.randn_like(batch.latents) * random.random()
        return Loss(loss_of(self.model(batch.latents + noise, self.timestep, batch.cond.text)))

    def run(self, decisions: Decisions | None = None) -> None:
        step = partial(rehearse_step, self.phase, self.batch, self.plan, self.learner, decisions)
        rehearse(self.learner, {"training": step})


def in_spans(it: Rehearsal) -> list[object]:
    """The spans in which its phase speaks that are open, from now on."""
    spans = []

    @contextmanager
    def speaking() -> Iterator[None]:
        spans.append(object())
        yield
        spans.pop()

    it.phase = replace(it.phase, speaking=speaking)
    return spans


@pytest.fixture(autouse=True)
def memory(monkeypatch) -> Callable[[int], None]:
    """Sets how much main memory is free."""

    def set_free(available: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))

    set_free(1 << 40)
    return set_free


@pytest.mark.parametrize("strategy", [AUTO, "none", "full"])
def test_nothing_is_left_behind(strategy):
    it = Rehearsal(strategy, ema_decay=0.5)
    for parameter in it.model.parameters():
        parameter.grad = None
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    values = {name: (p.clone(), p.data_ptr()) for name, p in it.model.named_parameters()}
    averages = {name: value.clone() for name, value in it.learner.trainables["lora"].ema.values.items()}
    it.run()
    assert it.asked == (3 if strategy == AUTO else 2)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    for name, parameter in it.model.named_parameters():
        value, address = values[name]
        assert torch.equal(parameter, value) and parameter.grad is None and parameter.data_ptr() == address
    lora = it.learner.trainables["lora"]
    assert all(torch.equal(lora.ema.values[name], value) for name, value in averages.items())
    assert (it.learner.step, lora.updater.step_count, it.learner.is_whole) == (0, 0, True)
    assert not lora.updater.optimizer.state and lora.updater.learning_rate == SPEC.learning_rate


def test_an_update_was_made_meanwhile():
    it = Rehearsal("none")
    before, seen = [p.clone() for p in it.parameters], []

    def look() -> None:
        seen.extend(not torch.equal(p, value) for p, value in zip(it.parameters, before, strict=True))

    step = partial(rehearse_step, it.phase, it.batch, it.plan, it.learner, None)
    rehearse(it.learner, {"training": step, "looking": look})
    assert seen and all(seen)


def test_what_fails_is_said_by_what_it_was_and_all_is_put_back():
    it = Rehearsal("none")
    before = [p.clone() for p in it.parameters]
    step = partial(rehearse_step, it.phase, it.batch, it.plan, it.learner, None)

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        rehearse(it.learner, {"training": step, "generating a preview": full})
    assert caught.value.__notes__ == ["while generating a preview, before the first step"]
    assert all(torch.equal(p, value) for p, value in zip(it.parameters, before, strict=True))
    assert it.learner.step == 0


def test_compiled_blocks_keep_what_they_kept_before_the_run_was_interrupted(monkeypatch, capsys):
    room, decisions = Room(5 * TOKENS, 0, TOKENS, COSTS), Decisions("GPU A")
    monkeypatch.setattr(rehearsal, "measure_room", lambda *_: room)
    first = Rehearsal()
    first.run(decisions)
    saved = decisions.table()
    monkeypatch.setattr(rehearsal, "measure_room", lambda *_: pytest.fail("it is known"))
    again = Rehearsal()
    again.run(Decisions("GPU A", saved))
    assert again.plan.strategies(TOKENS) == first.plan.strategies(TOKENS) == ["none", "selective"]
    assert "what blocks keep is as in the saved run" in capsys.readouterr().out

    monkeypatch.setattr(rehearsal, "measure_room", lambda *_: replace(room, free=0))
    with pytest.raises(UserError, match="what blocks keep is not the same on GPU A and on GPU B\npass --allow_changes"):
        Rehearsal().run(Decisions("GPU B", saved))
    for damaged in ("{}", "7", '{"free": 1, "working": 1, "tokens": 1, "costs": {}}', "[" * 10_000):
        with pytest.raises(UserError, match="the saved run's room is"):
            Rehearsal().run(Decisions("GPU A", saved | {"room": damaged}))


def test_accumulated_gradients_and_the_moments_of_all_loras_are_there_in_time(monkeypatch):
    it, seen = Rehearsal("none"), []
    other = Trainable("other", SimpleNamespace(parameters={"a": torch.nn.Parameter(torch.zeros(1000))}), SPEC)
    it.learner.trainables["other"] = other
    empty, made = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *size, **facts: made.append(size) or empty(*size, **facts))

    def loss(batch: Batch) -> Tensor:
        lora = it.learner.trainables["lora"]
        grads = [parameter.grad is not None for parameter in it.parameters]
        seen.append((all(grads), any(grads), len(lora.updater.optimizer.state), (3 * 4 * 1000,) in made))
        return it.loss(batch)

    it.phase = replace(it.phase, loss=loss)
    rehearse_step(it.phase, it.batch, it.plan, it.learner, None, accumulates=True)
    count = len(it.parameters)
    assert seen == [(False, False, 0, False), (True, True, 0, False), (False, False, count, True)]


@pytest.mark.parametrize(("spare", "strategies"), [(0.0, ["none"] * 2), (0.5, ["selective", "full"])])
def test_a_share_of_the_room_can_be_left_unused(monkeypatch, spare, strategies):
    it = Rehearsal()
    monkeypatch.setattr(rehearsal, "measure_room", lambda *_: Room(6 * TOKENS, 0, TOKENS, COSTS))
    rehearse_step(it.phase, it.batch, it.plan, it.learner, None, spare)
    assert it.plan.strategies(TOKENS) == strategies


def test_the_room_of_compiled_blocks_that_had_to_keep_less_is_the_one_that_is_kept(monkeypatch):
    it, decisions = Rehearsal(), Decisions("GPU A")
    monkeypatch.setattr(rehearsal, "measure_room", lambda *_: Room(6 * TOKENS, 0, TOKENS, COSTS))

    def full(batch: Batch) -> Tensor:
        if "none" in it.plan.strategies(TOKENS):
            raise torch.OutOfMemoryError("full")
        return it.loss(batch)

    it.phase = replace(it.phase, loss=full)
    it.run(decisions)
    assert Room.parse(decisions.made["room"]) == it.plan.room and it.plan.room.free < 6 * TOKENS


def test_a_checkpoint_is_written_and_removed(tmp_path, monkeypatch):
    folder, names = tmp_path / "new" / "outputs", []
    settings = RunSettings(folder, 10, 1.0, "{}", FACTS, {}, CARD)
    write = rehearsal.write_checkpoint

    def written(where: Path, *args: object) -> list[Path]:
        files = write(where, *args)
        names.extend(sorted(path.name for path in where.iterdir()))
        return files

    monkeypatch.setattr(rehearsal, "write_checkpoint", written)
    rehearse_saving(small_learner(ema_decay=0.9), settings, folder)
    assert names == ["state-00000000.safetensors", "wan-lora-00000000-ema.safetensors", "wan-lora-00000000.safetensors"]
    assert not list(folder.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to .*file"):
        rehearse_saving(small_learner(), settings, tmp_path / "file")


def test_an_open_plan_keeps_least_is_settled_by_that_and_then_tried(capsys):
    it = Rehearsal()
    it.run()
    assert it.strategies == [["offload"] * 2, ["none"] * 2, ["none"] * 2] and not it.plan.is_open
    assert capsys.readouterr().out == f"for the backward pass of {TOKENS} tokens all blocks keep everything\n"


def test_where_the_room_was_less_than_measured_blocks_keep_less(capsys, monkeypatch):
    it = Rehearsal()
    monkeypatch.setattr(rehearsal, "measure_room", lambda *_: Room(6 * TOKENS, 0, TOKENS, COSTS))
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
    monkeypatch.setattr(rehearsal, "measure_room", lambda *_: Room(6 * TOKENS, 0, TOKENS, COSTS))

    it.phase = replace(it.phase, loss=Mock(side_effect=torch.OutOfMemoryError("full")))
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
    assert it.asked == 2 and it.plan.strategies(TOKENS) == [strategy] * 2
    assert capsys.readouterr().out == ""


def test_room_is_left_for_gradients_and_moments_of_all_that_is_trained(monkeypatch):
    it = Rehearsal()
    reserves = []

    def measured(model, run, reserve) -> Room:
        run()
        reserves.append(reserve)
        return Room(0, 1, 1, COSTS)

    monkeypatch.setattr(rehearsal, "measure_room", measured)
    other = Trainable("other", SimpleNamespace(parameters={"a": torch.nn.Parameter(torch.zeros(1000))}), SPEC)
    it.learner.trainables["other"] = other
    it.run()
    assert reserves == [3 * 4 * (sum(p.numel() for p in it.parameters) + 1000)]


def test_the_phase_speaks_in_forward_and_backward_and_only_there():
    it, seen = Rehearsal("full"), []
    spans = in_spans(it)
    it.model.blocks[0].ffn.register_forward_hook(lambda *_: seen.append(len(spans)))
    it.run()
    assert len(seen) == 4 and all(seen) and not spans


def test_parameters_that_the_loss_does_not_reach_are_no_error():
    it = Rehearsal()
    it.model.register_parameter("idle", torch.nn.Parameter(torch.ones(1)))
    it.run()
    assert it.asked == 3


def test_memory_that_is_too_small_is_reported_now():
    it = Rehearsal()
    it.phase = replace(it.phase, loss=Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        it.run()
    assert it.plan.is_open


def test_two_rehearsals_draw_the_same_numbers():
    first, second = Rehearsal(), Rehearsal()
    losses = []
    for it, seed in ((first, 1), (second, 2)):
        torch.manual_seed(seed)
        own = it.loss
        it.phase = replace(it.phase, loss=lambda batch, own=own: losses.append((loss := own(batch)).value) or loss)
        it.run()
    assert len(losses) == 6 and all(map(torch.equal, losses[:3], losses[3:]))
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[1], losses[2])  # there was an update
    assert SITUATIONS["text"].batch * 18 == TOKENS == first.batch.tokens(first.model.shape.patch_size)


def test_the_room_is_measured_while_the_phase_speaks(monkeypatch):
    # Of two experts the one that speaks is on the device; before, it may wait on the CPU.
    it, measured = Rehearsal(), []
    spans, room = in_spans(it), Room(1 << 40, 0, TOKENS, dict.fromkeys(LADDER, 1.0))
    monkeypatch.setattr(rehearsal, "measure_room", lambda *_: measured.append(len(spans)) or room)
    it.run()
    assert measured == [1] and not spans


def test_each_try_begins_with_the_expert_of_the_phase():  # one that failed may have left another on the device
    it, opened = Rehearsal(), []
    spans, loss = in_spans(it), it.loss

    def fail_once(batch: Batch) -> Loss:
        opened.append(spans[-1])
        if len(opened) == 2:  # the first is in the measurement of the room
            raise torch.OutOfMemoryError
        return loss(batch)

    it.phase = replace(it.phase, loss=fail_once)
    it.run()
    assert len(opened) == len(set(opened)) > 3


def test_main_memory_is_given_back_where_no_block_waits_in_it():
    it = Rehearsal()
    it.run()
    assert it.plan.strategies(TOKENS) == ["none"] * 2 and not it.plan.parking._chunks


# ---------------------------------------------------------------------------------------------------- the command line

COMMAND = "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 100 --val_samples 1"
STEPS = "--max_train_steps 3 --checkpointing_steps 2 --learning_rate 1e-2 --ema_decay 0.9 --caption_dropout 0.5"
PREVIEWS = "--sample_prompts fox --sample_every 2 --sample_steps 2"


def outcome(folder: Path) -> dict[str, Tensor]:
    """The tensors of all checkpoints of a run."""
    files = {path.name: read_tensors(path)[0] for path in folder.glob("*/checkpoints/*.safetensors")}
    return {f"{name}/{key}": tensor for name, each in files.items() for key, tensor in each.items()}


@pytest.mark.parametrize("family", ["wan2.1-t2v-1.3B", "wan2.2-ti2v-5B", "wan2.2-i2v-A14B"])
def test_a_run_learns_the_same_with_and_without_it_bit_for_bit(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", Path(copy_prompts(tmp_path / "embeddings")))
    write_model(Path("model"), FAMILIES[family])
    write_clips(Path("clips"))
    turns = "--expert_phase_steps 2" if len(FAMILIES[family].experts) > 1 else ""
    done, rehearsed = [], rehearsal.rehearse

    def watched(learner: Learner, acts: Mapping[str, Callable[[], object]]) -> None:
        done.extend(acts)
        rehearsed(learner, acts)

    monkeypatch.setattr(rehearsal, "rehearse", watched)
    train_wan_lora.main(f"{COMMAND} {STEPS} {PREVIEWS} {turns} --output_dir with".split())
    experts = [" the high_noise expert", " the low_noise expert"] if turns else [""]
    validated = [f"validating{expert}" for expert in experts]
    assert done == ["training", *validated, "generating a preview", "saving"]
    monkeypatch.setattr(train_wan_lora, "rehearse_run", lambda *_: None)
    train_wan_lora.main(f"{COMMAND} {STEPS} {PREVIEWS} {turns} --output_dir without".split())
    first, second = outcome(Path("with")), outcome(Path("without"))
    assert len(first) > 100 and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_validation_and_previews_only_a_step_and_a_checkpoint_are_rehearsed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(Path("model"))
    write_clips(Path("clips"))
    memory, done = [torch.empty(8)], []
    left = weakref.ref(memory[0])
    monkeypatch.setattr(FreshSamples, "hold", lambda samples, windows: memory.pop())
    monkeypatch.setattr(rehearsal, "rehearse", lambda learner, parts: done.extend([*parts, left() is not None]))
    train_wan_lora.main(f"{COMMAND} {STEPS} --val_samples 0".split())
    assert done == ["training", "saving", True] and left() is None, "the memory of the next batch was held"
