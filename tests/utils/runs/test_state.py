"""A state file is restored exactly; a damaged or foreign one is refused with its name, and nothing has changed."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.runs import FACTS, small_learner, take_step
from utils.common.errors import UserError
from utils.runs.state import CHECKSUM, read_state, write_state
from utils.runs.state import FACTS as KEY

METRICS = {"bad_steps": 0, "validated_at": 1, "smooth": 0.5, "weight": 0.1, "clipped": 0.0}


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


def lora(facts: dict) -> dict:
    return facts["learner"]["trainables"]["lora"]


BAD = {
    "no facts": lambda path: save_file(content(path)[0], path),
    "facts that are no JSON": lambda path: save_file(content(path)[0], path, metadata={KEY: "{"}),
    "facts that are a list": lambda path: rewrite(path, content(path)[0], []),
    "facts that are a number": lambda path: rewrite(path, content(path)[0], 7),
    "facts nested without end": lambda path: save_file(content(path)[0], path, metadata={KEY: "[" * 100_000}),
    "a newer format": edited(lambda f: f.update(format=3)),
    "a format of another type": edited(lambda f: f.update(format="2")),
    "no options": edited(lambda f: f.pop("options")),
    "options that are a list": edited(lambda f: f.update(options=[])),
    "no data": edited(lambda f: f.pop("data")),
    "data that is a number": edited(lambda f: f.update(data=3)),
    "a fingerprint that is a number": edited(lambda f: f["data"].update({"clips/a.mp4": 5})),
    "no metrics": edited(lambda f: f.pop("metrics")),
    "a metric that is text": edited(lambda f: f["metrics"].update(smooth="0.5")),
    "a metric that is not finite": edited(lambda f: f["metrics"].update(smooth=math.nan)),
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
