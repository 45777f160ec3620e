"""Experts with a student and a critic each: who speaks, and what is moved while experts are exchanged."""

import pytest
import torch
from torch import Tensor

from tests.adapted import fill
from tests.experts import A14B, COND, HIGH, LOW, Moves, draw
from tests.tiny import tiny_shape, tiny_transformer
from utils.adapters.attach import AdapterOptions, AdapterPlan, LoraAdapter
from utils.adapters.lora import adapter_parameters
from utils.encoding.conditioning import make_predict
from utils.training.experts import Experts
from utils.training.few_step import CRITIC, STUDENT
from wan.modules.model import WanModel

CPU, DEVICE = torch.device("cpu"), torch.device("meta")
ADAPTERS = (STUDENT, CRITIC)


def pair() -> tuple[dict[str, WanModel], dict[str, LoraAdapter]]:
    """Both experts by name, and their students; all adapters change the answers, each in its own way."""
    models = {name: tiny_transformer(tiny_shape(A14B), seed) for seed, name in enumerate((HIGH, LOW))}
    plan = AdapterPlan(AdapterOptions(lora_rank=2), copies=(CRITIC,))
    students = {name: plan.attach(model) for name, model in models.items()}
    for seed, (student, name) in enumerate((student, name) for student in students.values() for name in ADAPTERS):
        fill(list(student.named(name).parameters.values()), seed)
    return models, students


def names_of(model: WanModel) -> tuple[set[str], set[str]]:
    """Of its adapters, and of its base."""
    adapters = {name for each in ADAPTERS for name in adapter_parameters(model, each)}
    return adapters, {name for name, _ in (*model.named_parameters(), *model.named_buffers())} - adapters


def test_both_adapters_stay_on_the_device_and_only_the_base_moves():
    models, _ = pair()
    own, base = names_of(models[HIGH])
    assert len(own) == 2 * 2 * 2 * 8 and sum(CRITIC in name for name in own) == len(own) / 2  # 2 blocks of 8
    with Moves(models) as moves:
        experts = Experts(models, A14B.boundaries, DEVICE)
        assert {device for *_, device in moves.seen} == {"meta"}
        assert {each: {name for of, name, _ in moves.seen if of == each} for each in models} == {HIGH: own, LOW: own}
        moves.seen.clear()
        experts.activate(LOW)
    moved = {(HIGH, name, "cpu") for name in base} | {(LOW, name, "meta") for name in base}
    assert set(moves.seen) == moved and len(moves.seen) == len(moved)


@torch.no_grad()
def answers(experts: Experts, adapters: dict[str, LoraAdapter]) -> dict[str, Tensor]:
    """What each adapter of each expert says."""
    found = {}
    for expert in (HIGH, LOW, HIGH):
        for name in ADAPTERS:
            with experts.speaking(expert, adapters[expert].named(name).speaking):
                found[f"{expert} {name}"] = make_predict(experts.models[expert])(draw(), torch.tensor([500.0]), COND)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_expert_answers_for_another_and_the_former_one_is_back_with_its_own_adapter(name):
    models, students = pair()
    experts, timestep = Experts(models, A14B.boundaries, CPU), torch.tensor([500.0])
    expected = answers(experts, students)
    assert len({float(answer.sum()) for answer in expected.values()}) == 4
    for own, other in ((LOW, HIGH), (HIGH, LOW)):
        with experts.speaking(own, students[own].named(name).speaking):
            with experts.answering(other, students[other].speaking) as predict:
                assert experts.active == other
                assert torch.equal(predict(draw(), timestep, COND), expected[f"{other} {STUDENT}"])
            assert experts.active == own
            assert torch.equal(make_predict(models[own])(draw(), timestep, COND), expected[f"{own} {name}"])


@torch.no_grad()
def test_an_expert_that_answers_itself_is_not_moved(monkeypatch):
    models, students = pair()
    experts = Experts(models, A14B.boundaries, CPU)
    monkeypatch.setattr(experts, "_exchange", lambda coming: pytest.fail("nothing is to be exchanged"))
    with experts.answering(HIGH, students[HIGH].speaking) as predict:
        predict(draw(), torch.tensor([950.0]), COND)
    assert experts.active == HIGH


def test_gradients_of_the_expert_that_waits_are_kept_while_the_other_answers():
    """A batch that is accumulated after another begins with samples of the other expert."""
    models, students = pair()
    experts = Experts(models, A14B.boundaries, CPU)
    parameters = list(students[LOW].parameters.values())

    def accumulate(between: bool) -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        with experts.speaking(LOW, students[LOW].speaking):
            for batch in range(2):
                if between:
                    with torch.no_grad(), experts.answering(HIGH, students[HIGH].speaking) as predict:
                        predict(draw(), torch.tensor([950.0]), COND)
                velocity = make_predict(models[LOW])(draw() + batch, torch.tensor([500.0]), COND)
                velocity.square().mean().backward()
        return [parameter.grad.clone() for parameter in parameters]

    plain, exchanged = accumulate(False), accumulate(True)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(plain, exchanged, strict=True))
    assert all(parameter.grad is None for parameter in students[HIGH].parameters.values())
