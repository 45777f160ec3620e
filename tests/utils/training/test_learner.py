"""A learner is restored exactly, or refuses before anything has changed."""

import copy
import math

import pytest
import torch
from torch import Tensor

from tests.runs import EXPERT_SPECS, SPEC, SmallLora, settings, small_learner, take_step, take_turn, two_experts
from utils.common.errors import RunError, UserError
from utils.runs.run import write_checkpoint
from utils.runs.state import read_state
from utils.training.learner import WATCHED_STEP, Learner, Trainable
from utils.training.optim import learning_rate_factor

METRICS = {"bad_steps": 0, "validated_at": -1, "means": {}}


def values_of(learner: Learner) -> list[Tensor]:
    """Every number of a learner, copied."""
    return [tensor.clone() for tensor in leaves(learner.state_dict()) if isinstance(tensor, Tensor)]


def leaves(tree: object) -> list[object]:
    return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [tree]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("names", [("lora",), ("student", "critic")])
def test_a_restored_learner_continues_like_the_one_that_was_saved(names):
    first = small_learner(names, ema_decay=0.9)
    for seed in range(3):
        take_step(first, seed)
    saved = copy.deepcopy(first.state_dict())
    second = small_learner(names, ema_decay=0.9)
    torch.manual_seed(77)
    second.load_state_dict(saved)
    assert second.step == 3 and equal(values_of(first), values_of(second))
    assert torch.equal(torch.get_rng_state(), saved["random"]["cpu"])
    for learner in (first, second):
        take_step(learner, seed=9)
    assert equal(values_of(first)[:-1], values_of(second)[:-1]) and second.step == 4


@pytest.mark.parametrize(("steps", "counts"), [(3, [3, 0]), (7, [7, 0]), (10, [7, 3]), (14, [7, 7])])
def test_trainables_that_take_turns_are_each_restored_at_their_own_place_of_their_schedule(steps, counts):
    first, second = two_experts(), two_experts()
    for _ in range(steps):
        take_turn(first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.step == steps and equal(values_of(first), values_of(second))
    assert [trainable.updater.step_count for trainable in second.trainables.values()] == counts
    expected = [
        SPEC.learning_rate * learning_rate_factor(n, spec) for n, spec in zip(counts, EXPERT_SPECS, strict=True)
    ]
    for learner in (first, second):
        assert [trainable.updater.learning_rate for trainable in learner.trainables.values()] == expected


def test_an_update_of_one_expert_leaves_the_other_as_it_was():
    learner = two_experts()
    for _ in range(9):
        take_turn(learner)
    before = copy.deepcopy(learner.trainables["high_noise"].state_dict())
    take_turn(learner)
    after = learner.trainables["high_noise"].state_dict()
    for was, now in zip(leaves(before), leaves(after), strict=True):
        assert torch.equal(was, now) if isinstance(was, Tensor) else was == now


def test_the_learning_rate_of_a_restored_learner_is_that_of_its_own_options():
    first = small_learner()
    take_step(first)
    second = small_learner()
    second.trainables["lora"].updater.schedule.base_lrs = [0.5]
    second.load_state_dict(first.state_dict())
    assert second.trainables["lora"].updater.optimizer.param_groups[0]["lr"] == 0.5


def test_an_average_that_was_not_saved_starts_from_the_parameters():
    first = small_learner()
    take_step(first)
    second = small_learner(ema_decay=0.9)
    second.load_state_dict(first.state_dict())
    trainable = second.trainables["lora"]
    assert all(torch.equal(trainable.ema.values[name], p) for name, p in trainable.adapter.parameters.items())


def test_a_step_is_whole_before_its_first_update_and_after_its_last():
    learner = small_learner(("student", "critic"))
    seen = [learner.is_whole]
    learner.begin_step(num_updates=2)
    seen.append(learner.is_whole)
    for name, trainable in learner.trainables.items():
        for parameter in trainable.adapter.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        learner.update(name, 1.0)
        seen.append(learner.is_whole)
    assert seen == [True, True, False, True] and learner.step == 1


def test_an_update_that_fails_leaves_no_whole_step(monkeypatch):
    learner = small_learner()
    learner.begin_step()
    monkeypatch.setattr(learner.trainables["lora"], "step", lambda max_grad_norm: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learner.update("lora", 1.0)
    assert not learner.is_whole and learner.step == 0


def test_a_step_that_was_interrupted_before_its_update_is_repeated_with_the_same_random_numbers():
    learner = small_learner()
    torch.manual_seed(5)
    take_step(learner)
    learner.begin_step()
    expected = torch.rand(3)
    saved = copy.deepcopy(learner.state_dict())
    torch.rand(100)
    small_learner().load_state_dict(saved)
    assert torch.equal(torch.rand(3), expected)


def test_the_random_state_is_read_once_in_a_step(monkeypatch):
    learner, reads, get_rng_state = small_learner(), [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: reads.append(None) or get_rng_state())
    take_step(learner)
    assert len(reads) == 1


def test_an_adapter_that_moves_is_not_taken_for_one_that_does_not():
    learner = small_learner()
    for seed in range(WATCHED_STEP + 1):
        take_step(learner, seed)
    assert learner.step == WATCHED_STEP + 1


def test_an_adapter_with_a_zero_matrix_after_ten_updates_is_reported():
    trainable = Trainable("lora", SmallLora(0.0), SPEC)
    trainable.adapter.parameters["up"].data.zero_()
    for number in range(WATCHED_STEP):
        for parameter in trainable.adapter.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        if number < WATCHED_STEP - 1:
            trainable.step(0.0)
    with pytest.raises(RunError, match="2 matrices of the lora are still zero"):
        trainable.step(0.0)


def moments(state: dict) -> dict:
    return state["trainables"]["lora"]["optimizer"]["state"]["down"]


def parameters(state: dict) -> dict:
    return state["trainables"]["lora"]["parameters"]


UNFIT = {
    "another adapter": lambda s: parameters(s).update(other=torch.ones(1)),
    "a missing matrix": lambda s: parameters(s).pop("up"),
    "a matrix of another rank": lambda s: parameters(s).update(down=torch.ones(3, 4)),
    "a matrix of another dtype": lambda s: parameters(s).update(down=torch.ones(2, 4, dtype=torch.bfloat16)),
    "a matrix that is not finite": lambda s: parameters(s)["down"].fill_(math.nan),
    "an average of another shape": lambda s: s["trainables"]["lora"]["ema"].update(up=torch.ones(1)),
    "an average that is not finite": lambda s: s["trainables"]["lora"]["ema"]["up"].fill_(math.inf),
    "an average in bf16": lambda s: s["trainables"]["lora"]["ema"].update(up=torch.ones(6, 2, dtype=torch.bfloat16)),
    "moments of a wrong size": lambda s: moments(s).update(exp_avg=torch.ones(1)),
    "moments of a transposed shape": lambda s: moments(s).update(exp_avg_sq=torch.ones(4, 2)),
    "moments in another dtype": lambda s: moments(s).update(exp_avg=torch.ones(2, 4, dtype=torch.float64)),
    "moments that are not finite": lambda s: moments(s)["exp_avg"].fill_(math.nan),
    "a negative second moment": lambda s: moments(s)["exp_avg_sq"].fill_(-1.0),
    "a negative counter": lambda s: moments(s)["step"].fill_(-1.0),
    "a counter that is no tensor": lambda s: moments(s).update(step=3),
    "a missing moment": lambda s: moments(s).pop("exp_avg"),
    "no moments after an update": lambda s: moments(s).clear(),
    "an unknown moment": lambda s: moments(s).update(other=torch.ones(2, 4)),
    "moments of another parameter": lambda s: s["trainables"]["lora"]["optimizer"]["state"].update(other={}),
    "a negative number of updates": lambda s: s["trainables"]["lora"]["optimizer"].update(step_count=-1),
    "a number of updates that is text": lambda s: s["trainables"]["lora"]["optimizer"].update(step_count="3"),
    "another number of groups": lambda s: s["trainables"]["lora"]["optimizer"]["groups"].append({}),
    "an unknown setting": lambda s: s["trainables"]["lora"]["optimizer"]["groups"][0].update(other=1.0),
    "a setting that is not finite": lambda s: s["trainables"]["lora"]["optimizer"]["groups"][0].update(eps=math.nan),
    "another trainable": lambda s: s["trainables"].update(critic=s["trainables"]["lora"]),
    "no random state": lambda s: s["random"].clear(),
    "a random state of another size": lambda s: s["random"].update(cpu=torch.zeros(7, dtype=torch.uint8)),
    "a random state of another dtype": lambda s: s["random"].update(cpu=torch.zeros(5056)),
}


@pytest.mark.parametrize("damage", UNFIT.values(), ids=UNFIT.keys())
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(damage):
    source = small_learner(ema_decay=0.9)
    take_step(source)
    saved = copy.deepcopy(source.state_dict())
    damage(saved)
    learner = small_learner(ema_decay=0.9)
    take_step(learner, seed=3)
    before, random = values_of(learner), torch.get_rng_state()
    with pytest.raises(UserError):
        learner.load_state_dict(saved)
    assert equal(values_of(learner), before) and torch.equal(torch.get_rng_state(), random)


def test_the_average_of_a_trainable_follows_its_number_of_updates():
    learner = small_learner(ema_decay=0.9)
    trainable = learner.trainables["lora"]
    expected = {name: parameter.detach().clone() for name, parameter in trainable.adapter.parameters.items()}
    for step in range(1, 4):
        take_step(learner, step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in trainable.adapter.parameters.items():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    assert all(torch.allclose(trainable.ema.values[name], value) for name, value in expected.items())


def test_the_random_state_of_a_whole_step_is_the_one_after_it():
    learner = small_learner()
    learner.begin_step()
    torch.rand(7)
    take_step_without_begin(learner)
    assert torch.equal(learner.state_dict()["random"]["cpu"], torch.get_rng_state())


def take_step_without_begin(learner: Learner) -> None:
    for parameter in learner.trainables["lora"].adapter.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    learner.update("lora", 1.0)


def test_a_restored_learner_is_between_steps():
    source = small_learner()
    take_step(source)
    learner = small_learner()
    learner.begin_step(num_updates=2)
    take_step_without_begin(learner)
    assert not learner.is_whole
    learner.load_state_dict(source.state_dict())
    assert learner.is_whole and learner.step == 1


def test_the_parameters_of_a_learner_are_those_of_all_its_trainables():
    learner = small_learner(("student", "critic"))
    own = [list(trainable.adapter.parameters.values()) for trainable in learner.trainables.values()]
    assert [id(parameter) for parameter in learner.parameters] == [id(parameter) for each in own for parameter in each]
    assert len(own) == 2 and all(own)


def student_and_critic() -> Learner:
    return Learner([Trainable("lora", SmallLora(), SPEC, 0.9), Trainable("critic", SmallLora(), SPEC, exported=False)])


def test_a_critic_is_in_the_state_and_never_a_file(tmp_path):
    learner = student_and_critic()
    take_step(learner)
    assert list(learner.exported) == ["lora"] and list(learner.trainables) == ["lora", "critic"]
    (tmp_path / "checkpoints").mkdir()
    written = write_checkpoint(tmp_path / "checkpoints", learner, settings(tmp_path), METRICS)
    names = ["state-00000001", "wan-lora-00000001", "wan-lora-00000001-ema"]
    assert sorted(path.stem for path in (tmp_path / "checkpoints").iterdir()) == names
    assert [path.stem for path in written] == ["wan-lora-00000001"]
    state, again = read_state(tmp_path / "checkpoints" / f"{names[0]}.safetensors"), student_and_critic()
    assert state.steps_taken == {"lora": 1, "critic": 1}
    state.restore(again)
    before = [parameter.detach().clone() for parameter in again.parameters]
    for each in (learner, again):
        take_step(each, seed=9)
    assert equal([*again.parameters], [*learner.parameters]) and not equal([*again.parameters], before)


# ----------------------------------------------------------------------------------------------------- matrices in bf16


def learner_in_bf16(ema_decay: float = 0.0) -> Learner:
    adapter = SmallLora()
    for parameter in adapter.parameters.values():
        parameter.data = parameter.data.bfloat16()
    return Learner([Trainable("lora", adapter, SPEC, ema_decay)])


def take_step_in_bf16(learner: Learner, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    learner.begin_step()
    for parameter in learner.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
    learner.update("lora", max_grad_norm=1.0)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_restored_learner_in_bf16_continues_like_the_one_that_was_saved(ema_decay):
    first, second = learner_in_bf16(ema_decay), learner_in_bf16(0.9)
    for seed in range(3):
        take_step_in_bf16(first, seed)
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(saved)
    averages = second.trainables["lora"].ema.values
    assert all(value.dtype == torch.float32 for value in averages.values())
    if not ema_decay:
        assert all(torch.equal(averages[name], value.float()) for name, value in parameters(saved).items())
        second.trainables["lora"].ema = None
    assert equal(values_of(first), values_of(second))
    for learner in (first, second):
        take_step_in_bf16(learner, 9)
    assert equal(values_of(first)[:-1], values_of(second)[:-1])
    dtypes = {tensor.dtype for tensor in moments(first.state_dict()).values()}
    assert dtypes == {torch.bfloat16, torch.float32} and parameters(saved)["up"].dtype == torch.bfloat16


def test_a_state_of_matrices_in_another_dtype_is_refused_and_the_message_says_what_to_do():
    for saved, learner in ((small_learner(), learner_in_bf16()), (learner_in_bf16(), small_learner())):
        before = values_of(learner)
        with pytest.raises(UserError, match="--adapter_dtype must be the one it was saved with"):
            learner.load_state_dict(saved.state_dict())
        assert equal(before, values_of(learner))
