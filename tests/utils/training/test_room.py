"""The room on the device is what is left of it; what blocks keep is what they are seen to keep."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from tests.followed import kept_bytes
from tests.tiny import TINY_SHAPE
from tests.trainees import SITUATIONS, answers, equal, inputs_of, prepare_again, trainee
from utils.training import room
from utils.training.checkpoint_plan import AUTO, LADDER, CheckpointPlan
from utils.training.memory import Memory, TrainingPass
from utils.training.room import kept_per_token, measure_room, saved_bytes
from wan.modules.model import WanModel

FP32, BF16 = torch.float32, torch.bfloat16
WIDTH, HEADS = TINY_SHAPE.dim, TINY_SHAPE.num_heads
GB = 1 << 30


def prepared_model(situation: str = "text", memory: Memory = Memory(AUTO), dtype: torch.dtype = FP32):  # noqa: B008
    model, parameters = trainee(SITUATIONS[situation], dtype)
    prepare_again(model, memory, CheckpointPlan(memory.checkpointing, len(model.blocks)))
    return model, parameters, inputs_of(model, SITUATIONS[situation])


@pytest.fixture
def available(monkeypatch) -> int:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GB))
    return 8 * GB


def test_on_the_cpu_three_quarters_of_what_is_free_are_room(available):
    model, parameters, inputs = prepared_model()
    runs = []
    found = measure_room(model, lambda: runs.append(answers(model, parameters, inputs)), reserve=GB)
    assert len(runs) == 1
    assert found.free == 0.75 * available - GB
    assert found.tokens == 3 * 18 and set(found.costs) == set(LADDER)
    assert found.working == int(2 * found.costs["none"] * found.tokens)


def test_measuring_changes_no_number_and_leaves_the_passes_as_they_were(available):
    model, parameters, inputs = prepared_model()
    passes = [block.forward for block in model.blocks]
    expected, found = answers(model, parameters, inputs), []
    measure_room(model, lambda: found.extend(answers(model, parameters, inputs)), 0)
    assert equal(found, expected)
    assert all(block.forward is own for block, own in zip(model.blocks, passes, strict=True))


def test_a_run_that_fails_leaves_the_passes_as_they_were():
    model, _, _ = prepared_model()
    own = model.blocks[0].forward

    def fail() -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        measure_room(model, fail, 0)
    assert model.blocks[0].forward is own


def test_passes_without_gradients_are_not_measured(available, monkeypatch):
    model, parameters, inputs = prepared_model()
    measured = []
    own = room.kept_per_token
    monkeypatch.setattr(room, "kept_per_token", lambda *args: measured.append(torch.is_grad_enabled()) or own(*args))

    def run() -> None:
        with torch.no_grad():
            model(*[tensor[:1] for tensor in inputs])
        answers(model, parameters, inputs)
        answers(model, parameters, inputs)

    assert measure_room(model, run, 0).tokens == 3 * 18
    assert measured == [True]


@pytest.mark.parametrize(("share", "usable"), [(1.0, 60 + 30), (0.95, 60 + 30), (0.5, 50)])
def test_on_a_gpu_the_room_is_what_is_unused_beside_what_is_resident_and_no_more_than_allowed(
    monkeypatch, share, usable
):
    """100 GB in all, 60 of them unused, 30 reserved by PyTorch, of which 20 are allocated before and 27 at the peak."""
    model, _, _ = prepared_model()
    order = []
    values = {
        "synchronize": lambda: order.append("synchronize"),
        "memory_allocated": lambda: 20 * GB,
        "reset_peak_memory_stats": lambda: order.append("reset"),
        "max_memory_allocated": lambda: 27 * GB,
        "memory_reserved": lambda device=None: 30 * GB,
        "mem_get_info": lambda device=None: (60 * GB, 100 * GB),
        "get_per_process_memory_fraction": lambda device=None: share,
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, value)
    free, working = room._measure_cuda(lambda: order.append("run"))
    assert order == ["synchronize", "reset", "run", "synchronize"]
    assert working == 7 * GB
    assert free == int((usable - 20 - 0.05 * 100 * share) * GB)


# ---------------------------------------------------------------------------------------------------------------- costs


def costs_of(situation: str, memory: Memory, dtype: torch.dtype) -> dict[str, float]:
    model, parameters, inputs = prepared_model(situation, memory, dtype)
    found = {}
    block = model.blocks[0]
    own = block.forward

    def watched(x, *conditions):
        found.update(kept_per_token(own, x, *conditions))
        return own(x, *conditions)

    assert isinstance(own, TrainingPass)
    block.forward = watched
    answers(model, parameters, inputs)
    return found


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("situation", "attentions"), [("text", 2), ("images", 3)])
@pytest.mark.parametrize("stream", [FP32, BF16])
def test_the_costs_of_strategies_are_those_of_their_tensors(situation, attentions, stream, fuse):
    costs = costs_of(situation, Memory(AUTO, fuse=fuse, stream=stream), BF16)
    attention = attentions * (WIDTH * BF16.itemsize + HEADS * 4)
    assert costs["full"] == costs["offload"] == WIDTH * stream.itemsize  # on the CPU, main memory is all there is
    assert costs["selective"] >= costs["full"] + attention
    assert costs["none"] > 2 * costs["selective"]
    assert list(costs) == list(LADDER) and sorted(costs.values()) == list(costs.values())


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("situation", ["text", "images"])
def test_no_block_keeps_more_than_its_costs(situation, fuse):
    costs = costs_of(situation, Memory(AUTO, fuse=fuse, stream=BF16), BF16)
    model, parameters, inputs = prepared_model(situation, dtype=BF16)
    for strategy in LADDER:
        kept, _ = kept_bytes(Memory(strategy, fuse=fuse, stream=BF16), model, parameters, inputs)
        assert kept <= costs[strategy] + 1e-6, strategy


def test_a_fused_block_costs_less():
    plain, fused = (costs_of("text", Memory(AUTO, fuse=fuse), FP32)["none"] for fuse in (False, True))
    assert fused < 0.8 * plain


def test_bytes_are_counted_once_for_each_storage_and_never_for_parameters_and_what_is_shared():
    x, weight = torch.ones(6, 8, requires_grad=True), torch.nn.Parameter(torch.ones(6, 8))
    size = 6 * 8 * 4
    assert saved_bytes(lambda: x.exp(), []) == size
    assert saved_bytes(lambda: (y := x.exp()) * y.view(8, 6).view(6, 8), []) == size
    assert saved_bytes(lambda: x * weight, [None]) == size
    assert saved_bytes(lambda: x.exp().exp(), []) == 2 * size
    assert saved_bytes(lambda: x + 1, []) == 0
    assert saved_bytes(lambda: (x + 1)[:2].sin(), []) == size  # a view keeps all of its storage
    assert saved_bytes(lambda: x.sin().sin(), [None, x]) == saved_bytes(lambda: x.sin().sin(), [x[:2]]) == size


def test_the_plan_that_is_settled_by_the_room_gives_the_same_numbers(available):
    model, parameters = trainee()
    plan = CheckpointPlan(AUTO, 2)
    prepare_again(model, Memory(AUTO), plan)
    assert isinstance(model, WanModel)
    inputs = inputs_of(model)
    expected = answers(model, parameters, inputs)
    plan.settle(measure_room(model, lambda: answers(model, parameters, inputs), 0))
    assert plan.strategies(54) == ["none", "none"]
    assert equal(answers(model, parameters, inputs), expected)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_where_only_later_blocks_are_trained_everything_costs_what_a_trained_block_keeps(available, fuse):
    costs = []
    for situation in ("text", "one layer"):
        model, parameters, inputs = prepared_model(situation, Memory(AUTO, fuse=fuse))
        found = measure_room(model, lambda m=model, p=parameters, i=inputs: answers(m, p, i), 0)
        costs.append(found.costs["none"])
    assert costs[1] > 0.5 * costs[0]
