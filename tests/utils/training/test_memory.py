"""Strategies change what is kept in memory, and no number; parameter names stay."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.tiny import TINY_SHAPE, tiny_shape, tiny_transformer
from tests.trainees import (
    SITUATIONS,
    Situation,
    answers,
    equal,
    inputs_of,
    loss_of,
    prepare_again,
    prepared,
    relative_error,
    trainee,
)
from utils.common.decisions import Decisions
from utils.common.errors import UserError
from utils.storage.weights import hold_as
from utils.training import compilation, memory
from utils.training.checkpoint_plan import AUTO, CheckpointPlan, Room
from utils.training.checkpointing import STRATEGIES
from utils.training.memory import Memory, MemoryOptions, TrainingPass, prepare
from wan.configs import FAMILIES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stream", [FP32, BF16], ids=["fp32 stream", "bf16 stream"])
@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_velocity_and_gradients_are_bit_for_bit_those_without_a_strategy(situation, stream, dtype, fuse):
    results = {}
    model, parameters = trainee(situation, dtype)
    for strategy in STRATEGIES:
        prepare_again(model, Memory(strategy, fuse=fuse, stream=stream))
        results[strategy] = answers(model, parameters, inputs_of(model, situation))
        assert all(tensor.isfinite().all() and tensor.any() for tensor in results[strategy])
    assert all(equal(results["none"], found) for found in results.values())


def test_blocks_may_follow_different_strategies():
    model, parameters = trainee()
    inputs = inputs_of(model)
    expected = answers(model, parameters, inputs)
    tokens = 3 * 3 * 2 * 3
    plan = CheckpointPlan(AUTO, 2)
    plan.settle(Room(2 * tokens, 1, tokens, {"offload": 0, "full": 1, "selective": 1.5, "none": 9}))
    assert plan.strategies(tokens) == ["full", "offload"]
    model, parameters = prepared(Memory(AUTO), plan=plan)
    assert equal(answers(model, parameters, inputs), expected)


@pytest.mark.parametrize("strategy", ["none", "full"])
def test_the_whole_model_trains_under_every_strategy(strategy):
    """Where base weights are trained, a fused block is the block's own."""
    results = []
    for memory_ in (Memory(), Memory(strategy, fuse=True)):
        model = tiny_transformer(tiny_shape(FAMILIES["wan2.1-flf2v-14B-720P"])).requires_grad_(True)
        prepare(model, memory_, lambda _: None)
        results.append(answers(model, list(model.parameters()), inputs_of(model, SITUATIONS["images"])))
    assert equal(*results)


def test_the_stream_is_rounded_before_and_after_each_block_and_nowhere_else():
    model, parameters = trainee()
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda x, *rest, plain=plain: plain(x.bfloat16().float(), *rest).bfloat16().float()
    inputs = inputs_of(model)
    expected = answers(model, parameters, inputs)
    rounded, own = prepared(Memory(stream=BF16))
    assert equal(answers(rounded, own, inputs), expected)
    exact, own = prepared(Memory("full"))
    assert not equal(answers(exact, own, inputs), expected)


@pytest.mark.parametrize("fuse", [False, True])
def test_what_follows_the_blocks_reads_an_fp32_stream(fuse):
    model, _ = prepared(Memory("full", fuse=fuse, stream=BF16), dtype=BF16)
    seen = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    between = model.blocks[1].forward
    model.blocks[1].forward = lambda x, *rest: seen.append(x.dtype) or between(x, *rest)
    model(*inputs_of(model))
    assert seen == [BF16, FP32]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_gradients_the_answer_is_that_of_the_plain_block_bit_for_bit(strategy, fuse):
    plain, _ = trainee(dtype=BF16)
    model, parameters = prepared(Memory(strategy, fuse=fuse, stream=BF16), dtype=BF16)
    inputs = inputs_of(model)
    with torch.no_grad():
        assert equal([model(*inputs)], [plain(*inputs)])
    answers(model, parameters, inputs)
    with torch.inference_mode():
        assert equal([model(*inputs)], [plain(*inputs)])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_names_of_parameters_and_modules_stay(strategy):
    plain, _ = trainee()
    model, parameters = prepared(Memory(strategy, fuse=True, stream=BF16))
    for _ in range(2):
        assert list(plain.state_dict()) == list(model.state_dict())
        assert [name for name, _ in plain.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert [name for name, _ in plain.named_modules()] == [name for name, _ in model.named_modules()]
        answers(model, parameters, inputs_of(model))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_first_block_trains_although_its_input_needs_no_gradient(strategy, fuse):
    model, _ = prepared(Memory(strategy, fuse=fuse))
    loss_of(model(*inputs_of(model))).backward()
    up = model.blocks[0].self_attn.q.lora_B["default"].weight
    assert up.grad.isfinite().all() and up.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("strategy", "again"), [("none", []), ("selective", [1, 0]), ("full", [1, 0]), ("offload", [1, 0])]
)
def test_each_block_runs_again_in_the_backward_pass_and_only_there(strategy, again):
    model, _ = prepared(Memory(strategy))
    calls = []
    for index, block in enumerate(model.blocks):
        block.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
    loss = loss_of(model(*inputs_of(model)))
    assert calls == [0, 1]
    loss.backward()
    assert calls == [0, 1, *again]


def saved_bytes(memory_: Memory) -> int:
    model, _ = prepared(memory_)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        model(*inputs_of(model))
    return sum(sizes)


def test_less_is_saved_for_the_backward_pass():
    everything = saved_bytes(Memory())
    assert saved_bytes(Memory("full")) < everything / 4
    assert saved_bytes(Memory(fuse=True)) < everything


def test_strategies_are_applied_after_the_adapter_and_in_their_order(monkeypatch):
    order = []
    for part in ("FusedBlock", "checkpointed", "compiled"):
        own = getattr(memory, part)
        monkeypatch.setattr(
            memory, part, lambda forward, *rest, own=own, part=part: order.append(part) or own(forward, *rest)
        )
    monkeypatch.setattr(memory, "compiled", lambda forward: order.append("compiled") or forward)

    def attach(model):
        assert not any("forward" in vars(block) for block in model.blocks)
        order.append("attach")
        return "it"

    model = trainee()[0]
    assert prepare(model, Memory("full", compile=True), attach) == "it"
    model(*inputs_of(model))
    assert order == ["attach", "checkpointed", "compiled"] + ["checkpointed", "compiled"]
    order.clear()
    model = trainee()[0]
    prepare(model, Memory("full", fuse=True), attach)
    model(*inputs_of(model))
    assert order == ["attach", "FusedBlock", "FusedBlock", "checkpointed", "checkpointed"]


def test_without_a_strategy_blocks_stay_as_they_are():
    model = tiny_transformer()
    assert prepare(model, Memory(), lambda model: model) is model
    assert not any("forward" in vars(block) for block in model.blocks)
    prepare(model, Memory("full"), lambda _: None)
    assert all(isinstance(block.forward, TrainingPass) for block in model.blocks)


def test_models_that_take_turns_may_share_a_plan():
    plan = CheckpointPlan(AUTO, 2)
    models = [prepared(Memory(AUTO), plan=plan) for _ in range(2)]
    first = [answers(*each, inputs_of(each[0])) for each in models]
    plan.settle(Room(10**9, 1, 54, {"offload": 0, "full": 1, "selective": 2, "none": 3}))
    again = [answers(*each, inputs_of(each[0])) for each in models]
    assert equal(first[0], first[1]) and equal(first[0], again[0]) and equal(first[0], again[1])


@pytest.mark.parametrize(
    ("opts", "device", "expected"),
    [
        (MemoryOptions(), CUDA, Memory(AUTO, fuse=True, stream=BF16)),
        (MemoryOptions(), CPU, Memory(AUTO)),
        (MemoryOptions("full"), CUDA, Memory("full", fuse=True, stream=BF16)),
        (MemoryOptions("full", fp32_stream=True), CUDA, Memory("full", fuse=True)),
        (MemoryOptions("none"), CUDA, Memory(fuse=True, stream=BF16)),
        (MemoryOptions("none", compile="on"), CUDA, Memory(compile=True, stream=BF16)),
        (MemoryOptions("offload", compile="on"), CPU, Memory("offload", compile=True)),
    ],
)
def test_what_is_done_for_a_run_follows_from_its_options_and_device(opts, device, expected, monkeypatch):
    monkeypatch.setattr(compilation, "why_not", lambda _: None)
    compile = opts.compiles(device, TINY_SHAPE, 1e3, Decisions("here"))
    assert opts.memory(hold_as("auto", device), compile) == expected


def test_a_long_run_of_a_large_model_is_compiled_where_a_compiler_works(monkeypatch, capsys):
    large = replace(TINY_SHAPE, dim=1536, num_layers=30)
    monkeypatch.setattr(compilation, "why_not", lambda _: None)
    decisions = Decisions("here")
    assert MemoryOptions().compiles(CUDA, large, 1e8, decisions)
    # Resumed, it is compiled however few steps are left.
    resumed = partial(Decisions, "here", decisions.table())
    assert MemoryOptions().compiles(CUDA, large, 1.0, resumed())
    monkeypatch.setattr(compilation, "why_not", lambda _: "no compiler")
    assert not MemoryOptions().compiles(CUDA, large, 1e8, Decisions("here"))
    assert not MemoryOptions(compile="off").compiles(CUDA, large, 1e8, resumed())
    for mode, known in (("on", Decisions("here")), ("auto", resumed())):  # asked for, or as the run began
        with pytest.raises(UserError, match="no compiler"):
            MemoryOptions(compile=mode).compiles(CUDA, large, 1e8, known)
    capsys.readouterr()


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_blocks_before_the_first_that_is_trained_keep_nothing_whatever_the_strategy(fuse, monkeypatch):
    model, _ = prepared(Memory("full", fuse=fuse), SITUATIONS["one layer"])
    asked: list[int] = []
    choose = CheckpointPlan.strategies
    monkeypatch.setattr(CheckpointPlan, "strategies", lambda plan, tokens: asked.append(1) or choose(plan, tokens))
    saved: list[Tensor] = []
    seen: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda _block, args: seen.append(args[0]))
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(*inputs_of(model, SITUATIONS["one layer"]))
    assert len(asked) == 1 and saved  # block 1 alone
    assert not seen[0].requires_grad and seen[0].grad_fn is None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_an_image_embedding_is_trained_through_blocks_without_adapters(strategy, fuse, monkeypatch):
    situation = Situation("wan2.1-i2v-14B-480P", ("img_emb.*",))
    results, asked = [], []
    choose = CheckpointPlan.strategies
    monkeypatch.setattr(CheckpointPlan, "strategies", lambda plan, tokens: asked.append(1) or choose(plan, tokens))
    for strategies in (Memory(), Memory(strategy, fuse=fuse)):
        model, parameters = prepared(strategies, situation)
        results.append(answers(model, parameters, inputs_of(model, situation)))
    assert relative_error(results[1], results[0]) < 1e-5
    assert len(asked) == (TINY_SHAPE.num_layers if Memory(strategy, fuse=fuse) != Memory() else 0)
    assert all(gradient.abs().max() > 0 for gradient in results[1][1:])
