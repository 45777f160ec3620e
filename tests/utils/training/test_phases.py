"""A phase trains what it names, and nothing else."""

from functools import partial

import pytest
import torch
from torch import Tensor

import train_wan_lora
from tests.tiny import TINY_SHAPE, tiny_shape, tiny_transformer
from utils.adapters.attach import AdapterOptions, LoraAdapter
from utils.adapters.lora import add_lora, select_modules
from utils.common.options import parse_options
from utils.diffusion.flow import sample_noisy
from utils.diffusion.objectives import Loss
from utils.encoding.conditioning import Batch, Cond, make_predict
from utils.training.experts import Experts
from utils.training.learner import Learner, Trainable
from utils.training.memory import Memory, prepare
from utils.training.optimizers import OptimizerSpec
from utils.training.phases import Phase, Schedule, make_phase
from wan.configs import FAMILIES

SPEC = OptimizerSpec(learning_rate=1e-2, weight_decay=0.0, schedule="constant", warmup_steps=0, total_steps=10)
NAMES = ("student", "critic")


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    return Batch(latents, Cond(torch.randn(1, 5, TINY_SHAPE.text_dim, generator=generator)))


def two_adapters(checkpointing: str) -> dict[str, LoraAdapter]:
    torch.manual_seed(0)

    def attach(model) -> dict[str, LoraAdapter]:
        for name in NAMES:
            add_lora(model, select_modules(model, ["attn"]), rank=2, alpha=2, adapter=name)
        return {name: LoraAdapter(model, AdapterOptions(), name) for name in NAMES}

    return prepare(tiny_transformer(), Memory(checkpointing), attach)


def values(adapter: LoraAdapter) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in adapter.parameters.values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_each_of_two_phases_changes_its_own_adapter_alone(checkpointing):
    adapters = two_adapters(checkpointing)
    learner = Learner([Trainable(name, adapter, SPEC) for name, adapter in adapters.items()])
    predict, timestep = make_predict(adapters["student"].model), torch.tensor([500.0])

    def loss(batch: Batch) -> Loss:
        return Loss(predict(batch.latents, timestep, batch.cond).square().mean())

    phases = [
        Phase(name, adapter.speaking, predict, loss, partial(learner.update, name, 1.0), lambda: 0, (), adapter.model)
        for name, adapter in adapters.items()
    ]
    learner.begin_step(len(phases))
    for phase in phases:
        before = {name: values(adapter) for name, adapter in adapters.items()}
        with phase.speaking():
            phase.loss(make_batch()).value.backward()
        phase.step()
        changed = {name for name, adapter in adapters.items() if not same(before[name], values(adapter))}
        assert changed == {phase.name}
    assert learner.step == 1 and learner.is_whole


# ------------------------------------------------------------------------------------------------------------- experts

A14B = FAMILIES["wan2.2-i2v-A14B"]


def expert_phases(flags: str) -> tuple[Learner, list[Phase], Experts]:
    """The two phases that the trainer makes, on small experts."""
    opts = parse_options(train_wan_lora.Options, flags.split())
    roles, adapters = opts.roles(A14B), {}
    for seed, role in enumerate(roles):
        torch.manual_seed(seed)
        model = tiny_transformer(tiny_shape(A14B), seed)
        add_lora(model, select_modules(model, ["attn"]), rank=2, alpha=2)
        adapters[role.name] = LoraAdapter(model, role.opts)
    learner = Learner([Trainable(role.trainable, adapters[role.name], role.opts.optimizer_spec) for role in roles])
    experts = Experts({name: a.model for name, a in adapters.items()}, A14B.boundaries, torch.device("cpu"))
    loss = partial(train_wan_lora.training_loss, negative=None)
    phases = [make_phase(role, adapters[role.name], experts, learner, loss) for role in roles]
    return learner, phases, experts


def i2v_batch() -> Batch:
    batch = make_batch()
    return Batch(batch.latents, Cond(batch.cond.text, channels=torch.ones(1, 20, 2, 4, 6)))


def test_an_experts_phase_changes_its_own_lora_alone_at_its_own_noise_levels_and_rate(monkeypatch):
    learner, phases, experts = expert_phases("--learning_rate 1e-2 --low_learning_rate 1e-3 --shift 5")
    assert [phase.name for phase in phases] == ["high_noise", "low_noise"] == list(learner.trainables)
    seen, sample_noisy = [], train_wan_lora.sample_noisy

    def watched(*args):
        seen.append(sample_noisy(*args).sigma.item())
        return sample_noisy(*args)

    monkeypatch.setattr(train_wan_lora, "sample_noisy", watched)
    for phase, (low, high), rate in zip(phases, ((0.9, 1.0), (0.0, 0.9)), (1e-2, 1e-3), strict=True):
        before = {name: values(trainable.adapter) for name, trainable in learner.trainables.items()}
        learner.begin_step()
        with phase.speaking():
            assert experts.active == phase.name
            for _ in range(8):
                phase.loss(i2v_batch()).value.backward()
        assert phase.step().learning_rate == rate
        changed = {
            name for name, trainable in learner.trainables.items() if not same(before[name], values(trainable.adapter))
        }
        assert changed == {phase.name}
        assert len(seen) == 8 and all(low <= sigma <= high for sigma in seen)
        assert phase.sigmas == pytest.approx([low + (high - low) * quantile for quantile in (0.1, 0.3, 0.5, 0.7, 0.9)])
        seen.clear()
    assert learner.step == 2


@pytest.mark.parametrize(("kind", "low"), [("overlap", (0.0, 0.95)), ("all", (0.0, 1.0))])
def test_a_wider_range_has_the_levels_of_the_shifted_distribution_and_is_validated_as_ever(monkeypatch, kind, low):
    """By the distribution function of the levels: it is uniform where the levels are those of one distribution."""
    _, (_, phase), _ = expert_phases(f"--shift 5 --expert_range {kind}")
    seen = []
    monkeypatch.setattr(train_wan_lora, "sample_noisy", lambda *args: seen.append(args[1:]) or sample_noisy(*args))
    with phase.speaking():
        phase.loss(i2v_batch())
    ((shift, interval),) = seen
    assert shift == 5 and interval == pytest.approx(low)
    levels = sample_noisy(torch.zeros(20_000, 1, 1, 1, 1), shift, interval).sigma
    below = [(levels <= low[1] * share).float().mean().item() for share in (0.25, 0.5, 0.75)]
    unshifted = [sigma / (5 - 4 * sigma) for sigma in (low[1] * share for share in (0.25, 0.5, 0.75, 1.0))]
    assert below == pytest.approx([value / unshifted[-1] for value in unshifted[:-1]], abs=0.02)
    assert phase.sigmas == pytest.approx([0.9 * quantile for quantile in (0.1, 0.3, 0.5, 0.7, 0.9)])


def test_an_expert_is_validated_at_its_own_noise_levels_with_its_own_lora():
    _, phases, experts = expert_phases("")
    low = phases[1]
    losses = low.validate([i2v_batch()], seed=5)
    assert losses.sigmas == low.sigmas and losses.values.shape == (5,) and experts.active == "low_noise"
    assert not torch.allclose(losses.values, phases[0].validate([i2v_batch()], seed=5).values)


# --------------------------------------------------------------------------------------------------------------- turns


def make_schedule(steps: tuple[int, ...], turn: int, taken: dict[str, int]) -> Schedule:
    """Phases named by letters, which have taken so many steps."""
    turns = [[Phase(letter, None, None, None, None, partial(taken.__getitem__, letter), (), None)] for letter in taken]
    return Schedule(turns, steps, turn)


def turns(steps: tuple[int, ...], turn: int, taken: tuple[int, ...] = (0, 0)) -> str:
    """Who is due in each step of a run from there on, a letter each."""
    counts = dict(zip("hl"[: len(steps)], taken, strict=False))
    schedule, order = make_schedule(steps, turn, counts), ""
    while sum(counts.values()) < schedule.total_steps:
        (phase,) = schedule.due()
        counts[phase.name] += 1
        order += phase.name
    return order


@pytest.mark.parametrize(
    ("steps", "turn", "expected"),
    [
        ((6,), 1, "hhhhhh"),
        ((6,), 200, "hhhhhh"),
        ((4, 4), 1, "hlhlhlhl"),
        ((4, 4), 2, "hhllhhll"),
        ((5, 5), 2, "hhllhhllhl"),
        ((3, 3), 200, "hhhlll"),
        ((2, 6), 2, "hhllllll"),
        ((6, 2), 2, "hhllhhhh"),
        ((5, 1), 2, "hhlhhh"),
        ((1, 3), 2, "hlll"),
    ],
)
def test_experts_take_turns_high_first_until_each_has_taken_its_own_steps(steps, turn, expected):
    assert turns(steps, turn) == expected
    assert tuple(expected.count(letter) for letter in "hl"[: len(steps)]) == steps


@pytest.mark.parametrize("steps", [(5, 8), (8, 5), (7, 7), (1, 9), (4,)])
def test_a_run_that_is_resumed_at_any_step_goes_on_in_the_turn_in_which_it_was_interrupted(steps):
    for turn in range(1, 11):
        whole = turns(steps, turn)
        for step in range(len(whole)):
            taken = tuple(whole[:step].count(letter) for letter in "hl"[: len(steps)])
            assert turns(steps, turn, taken) == whole[step:]


@pytest.mark.parametrize(
    ("steps", "turn", "taken", "expected"),
    [
        ((4, 4), 2, (2, 4), "hh"),  # the high expert was to take 2, and now takes 4
        ((8, 8), 3, (5, 5), "hlhhll"),  # both were to take 5: unfinished turns are finished first
        ((4, 6), 2, (4, 2), "llll"),
        ((6, 6), 5, (4, 2), "hlllhl"),  # turns were of 2, and are now of 5
    ],
)
def test_a_run_whose_options_have_changed_still_gives_each_expert_its_own_steps(steps, turn, taken, expected):
    assert turns(steps, turn, taken) == expected


def test_a_step_of_experts_is_one_update():
    schedule = make_schedule((5, 3), 2, {"h": 2, "l": 1})
    assert schedule.total_steps == 8 and schedule.updates_taken == 3


# ------------------------------------------------------------------------------------------------ a student's phases


def student_and_critic(every: int, turns: int = 1, length: int = 1) -> tuple[Schedule, dict[str, int]]:
    """The phases of students, "s", and critics, "c", numbered by their experts, and what each has taken."""
    taken = {f"{letter}{turn}": 0 for turn in range(turns) for letter in "sc"}
    count = {name: partial(taken.__getitem__, name) for name in taken}
    phases = {n: Phase(n, None, None, None, None, count[n], (), None, every if "s" in n else 1) for n in taken}
    return Schedule([[phases[f"s{turn}"], phases[f"c{turn}"]] for turn in range(turns)], (7,) * turns, length), taken


def order_of(schedule: Schedule, taken: dict[str, int], steps: int) -> list[str]:
    """Who is due in each of so many steps."""
    order = []
    for _ in range(steps):
        due = [phase.name for phase in schedule.due()]
        for name in due:
            taken[name] += 1
        order.append(" ".join(due))
    return order


def test_a_student_is_due_in_the_last_of_so_many_steps_of_its_critic():
    schedule, taken = student_and_critic(every=3)
    assert order_of(schedule, taken, 7) == ["c0", "c0", "s0 c0", "c0", "c0", "s0 c0", "c0"]
    assert schedule.total_steps == 7 and schedule.updates_taken == 9


def test_students_of_two_experts_count_the_steps_of_their_own_turns():
    schedule, taken = student_and_critic(every=2, turns=2, length=3)
    assert order_of(schedule, taken, 10) == [
        "c0", "s0 c0", "c0", "c1", "s1 c1", "c1", "s0 c0", "c0", "s0 c0", "s1 c1",
    ]  # fmt: skip


def test_a_resumed_run_has_the_order_of_the_whole_one():
    for step in range(14):
        schedule, taken = student_and_critic(every=2, turns=2, length=3)
        whole = order_of(schedule, taken, 14)
        schedule, taken = student_and_critic(every=2, turns=2, length=3)
        assert order_of(schedule, taken, step) + order_of(schedule, taken, 14 - step) == whole
