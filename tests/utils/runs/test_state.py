"""A state file is restored exactly; a damaged or foreign one is refused with its name, and nothing has changed."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.runs import FACTS, small_learner, take_step, take_turn, two_experts
from utils.common.checkpoint_names import EXPERTS
from utils.common.decisions import Decisions
from utils.common.errors import UserError
from utils.runs.state import CHECKSUM, Facts, check_resume_compatible, decisions_of, read_state, write_state
from utils.runs.state import FACTS as KEY
from utils.storage.weights import StorageOptions
from utils.training.optim import Optimization

MEANS = {"smooth": 0.1 + 0.2, "weight": 0.1, "clipped": 0.0}
METRICS = {"bad_steps": 0, "validated_at": 1, "means": {"train": MEANS}}
METRICS_2 = {"bad_steps": 0, "validated_at": 1, **MEANS}


def saved(folder: Path, names: tuple[str, ...] = ("lora",)) -> Path:
    """A state after two steps."""
    learner = small_learner(names, ema_decay=0.9)
    for seed in range(2):
        take_step(learner, seed)
    path = folder / "checkpoints" / "state-00000002.safetensors"
    path.parent.mkdir(exist_ok=True)
    write_state(path, learner.state_dict(), FACTS, METRICS)
    return path


def content(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


@pytest.mark.parametrize("names", [("lora",), ("student", "critic")])
def test_a_learner_survives_the_way_to_a_file_and_back(tmp_path, names):
    path = saved(tmp_path, names)
    state = read_state(path)
    assert (state.step, state.facts, state.metrics, state.run_folder) == (2, FACTS, METRICS, tmp_path)
    learner = small_learner(names, ema_decay=0.9)
    state.restore(learner)
    write_state(tmp_path / "again.safetensors", learner.state_dict(), FACTS, METRICS)
    (first, facts), (second, again) = content(path), content(tmp_path / "again.safetensors")
    assert facts == again and first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_lora_is_no_state_and_the_state_of_its_step_is_named_where_it_is_still_there(tmp_path):
    state = saved(tmp_path)
    lora = state.with_name("fox-00000002-ema_high_noise.safetensors")
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 5)}, lora)
    said = f"^{lora} is a LoRA, and a run resumes from a state: give "
    with pytest.raises(UserError, match=f"{said}{state}$"):
        read_state(lora)
    state.unlink()
    with pytest.raises(UserError, match=f"{said}one in {state.parent}; {state.name} has been removed$"):
        read_state(lora)


def test_a_state_of_format_2_is_restored_with_its_means_as_those_of_the_ordinary_phase(tmp_path):
    path = saved(tmp_path)
    today, (tensors, _) = read_state(path), content(path)
    edited(as_format_2)(path)
    assert b'\\"format\\": 2' in path.read_bytes()
    state = read_state(path)
    assert state.metrics == METRICS and (state.step, state.facts) == (today.step, today.facts)
    learner = small_learner(ema_decay=0.9)
    state.restore(learner)
    write_state(tmp_path / "again.safetensors", learner.state_dict(), state.facts, state.metrics)
    again, _ = content(tmp_path / "again.safetensors")
    assert tensors.keys() == again.keys() and all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    assert read_state(tmp_path / "again.safetensors").metrics == METRICS


def test_decisions_survive_the_way_to_a_file_and_a_file_of_before_has_none(tmp_path):
    learner, path = small_learner(), tmp_path / "state-00000000.safetensors"
    decided = {"device": "NVIDIA H200", "compile": "on", "quantised_matmul": "off"}
    write_state(path, learner.state_dict(), replace(FACTS, decided=decided), METRICS)
    assert read_state(path).facts == replace(FACTS, decided=decided)
    edited(lambda facts: facts.pop("decided"))(path)
    assert b"NVIDIA" not in path.read_bytes()
    assert read_state(path).facts == FACTS and read_state(path).facts.decided == {}


def test_another_base_than_that_of_the_saved_run_is_refused_unless_it_is_allowed(tmp_path, capsys):
    learner, path = small_learner(), tmp_path / "state-00000000.safetensors"
    base = {"the base model's transformer": "00", "--fuse_lora style.safetensors": "11"}
    write_state(path, learner.state_dict(), replace(FACTS, base=base), METRICS)

    def check(allowed: bool, **now: str) -> None:
        names = {"transformer": "the base model's transformer", "style": "--fuse_lora style.safetensors", "new": "new"}
        given = {names[name]: digest for name, digest in now.items()}
        options = Optimization(learning_rate=0.01, max_train_steps=10)
        check_resume_compatible(read_state(path), options, FACTS.data, allowed, {"lora": 1}, given)

    check(False, transformer="00", style="11", new="22")
    with pytest.raises(UserError) as raised:
        check(False, transformer="00", style="12")
    line = "--fuse_lora style.safetensors has another content: its hash was 11, is 12"
    assert line in str(raised.value) and "transformer" not in str(raised.value)
    with pytest.raises(UserError, match="the base model's transformer has another content: its hash was 00, is 01"):
        check(False, transformer="01", style="11")
    check(True, transformer="00", style="12")
    assert f"resuming with changes:\n  {line}" in capsys.readouterr().out
    edited(lambda facts: facts.pop("base"))(path)
    assert read_state(path).facts == FACTS
    check(False, transformer="01", style="12")


def test_the_means_of_several_phases_survive_the_way_to_a_file_and_back(tmp_path):
    learner, path = small_learner(EXPERTS), tmp_path / "state-00000000.safetensors"
    means = {"high_noise": MEANS, "low_noise": {"smooth": 1 / 3, "weight": 2 / 3, "clipped": 1.0}}
    write_state(path, learner.state_dict(), FACTS, METRICS | {"means": means})
    assert read_state(path).metrics["means"] == means


def test_two_experts_that_have_taken_different_numbers_of_steps_continue_from_a_file_in_the_middle_of_a_phase(tmp_path):
    unbroken, path = two_experts(), tmp_path / "state-00000010.safetensors"
    for _ in range(10):
        take_turn(unbroken)
    write_state(path, unbroken.state_dict(), FACTS, METRICS)
    resumed = two_experts()
    for _ in range(5):
        take_turn(unbroken)
    read_state(path).restore(resumed)
    assert [trainable.updater.step_count for trainable in resumed.trainables.values()] == [7, 3] and resumed.step == 10
    for _ in range(5):
        take_turn(resumed)
    for learner, name in ((unbroken, "first"), (resumed, "second")):
        write_state(tmp_path / name, learner.state_dict(), FACTS, METRICS)
    (first, facts), (second, again) = content(tmp_path / "first"), content(tmp_path / "second")
    assert facts == again and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("metrics", [METRICS, METRICS_2])
def test_a_state_of_a_newer_format_is_refused_with_its_number(tmp_path, metrics):
    path = saved(tmp_path)
    edited(lambda facts: facts.update(format=4, metrics=metrics))(path)
    with pytest.raises(UserError, match="has the state format 4: it was written by a newer version"):
        read_state(path)


def test_a_state_past_the_steps_of_the_run_is_refused(tmp_path):
    state = read_state(saved(tmp_path))
    check_resume_compatible(state, Optimization(), FACTS.data, allowed=True, steps={"lora": 2})
    with pytest.raises(UserError, match=r"state-00000002\.safetensors is of step 2, past the 1 step of this run"):
        check_resume_compatible(state, Optimization(), FACTS.data, allowed=True, steps={"lora": 1})


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("auto", "int8", True),
        ("auto", "bf16", False),
        ("auto", "auto", True),
        ("bf16", "int8", False),
        ("int8", "auto", False),
    ],
)
def test_what_the_machine_decided_may_be_given_as_an_option_when_resumed(tmp_path, before, now, same):
    path = tmp_path / "run" / "checkpoints" / "state-00000000.safetensors"
    path.parent.mkdir(parents=True)
    facts = Facts({"weight_dtype": before}, FACTS.data, {"device": "GPU A", "weight_dtype": "int8"})
    write_state(path, small_learner().state_dict(), facts, METRICS)
    with nullcontext() if same else pytest.raises(UserError, match=f"--weight_dtype was {before}, is {now}"):
        check_resume_compatible(read_state(path), StorageOptions(weight_dtype=now), FACTS.data, False, {"lora": 1})


def test_a_state_of_other_trainables_or_with_more_steps_of_one_is_refused(tmp_path):
    learner = small_learner(("high_noise", "low_noise"))
    for _ in range(3):
        learner.begin_step()
        for parameter in learner.trainables["high_noise"].adapter.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        learner.update("high_noise", max_grad_norm=1.0)
    path = tmp_path / "run" / "checkpoints" / "state-00000003.safetensors"
    path.parent.mkdir(parents=True)
    write_state(path, learner.state_dict(), FACTS, METRICS)
    state = read_state(path)
    assert state.steps_taken == {"high_noise": 3, "low_noise": 0}
    check_resume_compatible(state, Optimization(), FACTS.data, True, {"high_noise": 3, "low_noise": 1})
    past = "past the 2 steps of the high_noise expert in this run: raise --max_train_steps, or --high_max_train_steps"
    with pytest.raises(UserError, match=past):
        check_resume_compatible(state, Optimization(), FACTS.data, True, {"high_noise": 2, "low_noise": 9})
    with pytest.raises(UserError, match="holds high_noise, low_noise, this run trains high_noise: see --expert"):
        check_resume_compatible(state, Optimization(), FACTS.data, True, {"high_noise": 9})


@pytest.mark.parametrize(
    ("names", "steps", "message"),
    [
        ((), (), "holds lora, critic, this run trains lora: see --few_step"),
        (("lora", "critic"), (1, 1), "is of step 2, past the 1 step of this run: raise --max_train_steps$"),
        (("lora", "critic"), (1, 2), "is past the 1 update of the LoRA of this run: lower --gen_update_interval"),
        (
            ("low_noise", "low_noise_critic"),
            (1, 1),
            "is of step 2, past the 1 step of the low_noise expert in this run: raise .* or --low_max_train_steps$",
        ),
        (("low_noise", "low_noise_critic"), (1, 9), "past the 1 update of the LoRA of the low_noise expert in this"),
    ],
)
def test_a_student_or_critic_with_more_steps_than_this_run_is_refused_by_the_option(tmp_path, names, steps, message):
    state = read_state(saved(tmp_path, names or ("lora", "critic")))
    given = dict(zip(names, steps, strict=True)) or {"lora": 9}
    with pytest.raises(UserError, match=message):
        check_resume_compatible(state, Optimization(), FACTS.data, True, given)
    check_resume_compatible(state, Optimization(), FACTS.data, True, dict.fromkeys(state.steps_taken, 2))


@pytest.mark.parametrize("limits", [{}, {"limit": 0.75}])
def test_means_survive_with_a_limit_and_those_of_earlier_versions_have_none(tmp_path, limits):
    means, path = MEANS | limits, tmp_path / "checkpoints" / "state-00000000.safetensors"
    path.parent.mkdir()
    write_state(path, small_learner().state_dict(), FACTS, {**METRICS, "means": {"critic": means}})
    assert read_state(path).metrics["means"] == {"critic": means}
    for wrong in ({"limit": math.inf}, {"other": 1.0}):
        write_state(path, small_learner().state_dict(), FACTS, {**METRICS, "means": {"critic": means | wrong}})
        with pytest.raises(UserError, match="is not a training state"):
            read_state(path)


def test_every_flipped_bit_is_found(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    text = whole.index(b"learning_rate")
    for at in (text, header, header + 1, (header + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"state-00000002\.safetensors"):
            read_state(path)


def edited(change) -> object:
    """Rewrites the facts of a state and forges its checksum."""

    def apply(path: Path) -> None:
        tensors, metadata = content(path)
        facts = json.loads(metadata[KEY])
        change(facts)
        rewrite(path, tensors, facts)

    return apply


def replaced(name: str, tensor: Tensor | None) -> object:
    """Replaces or removes a tensor of a state and forges its checksum."""

    def apply(path: Path) -> None:
        tensors, metadata = content(path)
        assert name in tensors or tensor is not None
        tensors.pop(name, None)
        rewrite(path, tensors if tensor is None else tensors | {name: tensor}, json.loads(metadata[KEY]))

    return apply


def rewrite(path: Path, tensors: dict[str, Tensor], facts: object) -> None:
    from utils.runs.state import _checksum

    text = json.dumps(facts)
    save_file(tensors, path, metadata={KEY: text, CHECKSUM: _checksum(tensors, text)})


def as_format_2(facts: dict) -> None:
    facts.update(format=2, metrics=METRICS_2)


def lora(facts: dict) -> dict:
    return facts["learner"]["trainables"]["lora"]


BAD = {
    "no facts": lambda path: save_file(content(path)[0], path),
    "facts that are no JSON": lambda path: save_file(content(path)[0], path, metadata={KEY: "{"}),
    "facts that are a list": lambda path: rewrite(path, content(path)[0], []),
    "facts that are a number": lambda path: rewrite(path, content(path)[0], 7),
    "facts nested without end": lambda path: save_file(content(path)[0], path, metadata={KEY: "[" * 100_000}),
    "a newer format": edited(lambda f: f.update(format=4)),
    "metrics of format 2": edited(lambda f: f.update(metrics=METRICS_2)),
    "metrics that do not belong to format 2": edited(lambda f: f.update(format=2)),
    "format 2 without a mean": edited(lambda f: f.update(format=2, metrics={**METRICS_2, "weight": None})),
    "format 2 with something unknown": edited(lambda f: f.update(format=2, metrics={**METRICS_2, "other": 1})),
    "a format of another type": edited(lambda f: f.update(format="2")),
    "no options": edited(lambda f: f.pop("options")),
    "options that are a list": edited(lambda f: f.update(options=[])),
    "no data": edited(lambda f: f.pop("data")),
    "data that is a number": edited(lambda f: f.update(data=3)),
    "decisions that are a list": edited(lambda f: f.update(decided=["on"])),
    "a base that is a list": edited(lambda f: f.update(base=["00"])),
    "a hash that is a number": edited(lambda f: f.update(base={"the base model's transformer": 1})),
    "decisions that are null": edited(lambda f: f.update(decided=None)),
    "a decision that is a number": edited(lambda f: f.update(decided={"device": "GPU", "compile": 1})),
    "a fingerprint that is a number": edited(lambda f: f["data"].update({"clips/a.mp4": 5})),
    "no metrics": edited(lambda f: f.pop("metrics")),
    "no means": edited(lambda f: f["metrics"].pop("means")),
    "means that are a list": edited(lambda f: f["metrics"].update(means=[MEANS])),
    "means of a phase that are a number": edited(lambda f: f["metrics"].update(means={"train": 0.5})),
    "means without their weight": edited(lambda f: f["metrics"]["means"]["train"].pop("weight")),
    "an unknown mean": edited(lambda f: f["metrics"]["means"]["train"].update(other=0.5)),
    "a mean that is text": edited(lambda f: f["metrics"]["means"]["train"].update(smooth="0.5")),
    "a mean that is not finite": edited(
        lambda f: f["metrics"]["means"].update(low_noise={**MEANS, "smooth": math.nan})
    ),
    "a validated step that is a fraction": edited(lambda f: f["metrics"].update(validated_at=0.5)),
    "an unknown metric": edited(lambda f: f["metrics"].update(other=1)),
    "a fraction of a bad step": edited(lambda f: f["metrics"].update(bad_steps=0.5)),
    "no learner": edited(lambda f: f.pop("learner")),
    "a learner that is text": edited(lambda f: f.update(learner="lora")),
    "no step": edited(lambda f: f["learner"].pop("step")),
    "a negative step": edited(lambda f: f["learner"].update(step=-1)),
    "a step that is true": edited(lambda f: f["learner"].update(step=True)),
    "a step that is a fraction": edited(lambda f: f["learner"].update(step=2.5)),
    "no trainables": edited(lambda f: f["learner"].pop("trainables")),
    "trainables that are a list": edited(lambda f: f["learner"].update(trainables=[1])),
    "no optimizer": edited(lambda f: lora(f).pop("optimizer")),
    "an optimizer that is text": edited(lambda f: lora(f).update(optimizer="adamw")),
    "groups that are text": edited(lambda f: lora(f)["optimizer"].update(groups="abc")),
    "an optimizer state that is a list": edited(lambda f: lora(f)["optimizer"].update(state=[])),
    "a step count that is text": edited(lambda f: lora(f)["optimizer"].update(step_count="2")),
    "no parameters": replaced("trainables/lora/parameters/down", None),
    "moments of a wrong size": replaced("trainables/lora/optimizer/state/down/exp_avg", torch.ones(1)),
    "empty moments": replaced("trainables/lora/optimizer/state/down/exp_avg", torch.ones(0)),
    "no moments": replaced("trainables/lora/optimizer/state/down/exp_avg", None),
    "no random state": replaced("random/cpu", None),
    "a random state of zeros": replaced("random/cpu", torch.zeros(16, dtype=torch.uint8)),
    "a tensor without a place": replaced("somewhere/else", torch.ones(1)),
    "a tensor in place of a branch": replaced("trainables/lora", torch.ones(1)),
    "a tensor below a number": replaced("step/deeper", torch.ones(1)),
    "a tensor without a name": replaced("", torch.ones(1)),
    "an average that is not finite": replaced("trainables/lora/ema/up", torch.full((6, 2), math.inf)),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("a state"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", BAD.values(), ids=BAD.keys())
def test_a_damaged_state_is_refused_with_its_name_before_anything_changes(tmp_path, damage):
    path = saved(tmp_path)
    damage(path)
    learner = small_learner(ema_decay=0.9)
    take_step(learner, seed=3)
    before = [p.detach().clone() for p in learner.trainables["lora"].adapter.parameters.values()]
    with pytest.raises(UserError, match=r"state-00000002\.safetensors"):
        read_state(path).restore(learner)
    after = learner.trainables["lora"].adapter.parameters.values()
    assert learner.step == 1 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("saved", "dtype"),
    [
        ({}, "fp32"),
        ({"device": "the CPU"}, "fp32"),
        ({"device": "GPU A"}, "bf16"),
        ({"device": "GPU A", "weight_dtype": "int8"}, "int8"),
    ],
)
def test_states_of_earlier_versions_had_one_dtype_for_each_kind_of_device(tmp_path, saved, dtype):
    path = tmp_path / "run" / "checkpoints" / "state-00000000.safetensors"
    path.parent.mkdir(parents=True)
    write_state(path, small_learner().state_dict(), Facts({}, FACTS.data, saved), METRICS)
    decisions = decisions_of(read_state(path), torch.device("cpu"), changes_allowed=False)
    assert decisions.saved == {"device": "the CPU", "weight_dtype": dtype} | saved
    if saved.get("device") == "GPU A":
        with pytest.raises(UserError, match=f"weight_dtype was {dtype} on GPU A, and is fp32 on the CPU"):
            decisions.take("weight_dtype", lambda: "fp32")
    assert decisions_of(None, torch.device("cpu"), changes_allowed=False) == Decisions("the CPU")
