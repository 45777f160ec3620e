"""A fused block is the plain block up to rounding, keeps less, and steps aside where a layer is more than plain."""

import copy
import math
from dataclasses import replace

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.adapted import ALPHA, RANK, fill
from tests.tiny import tiny_transformer
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
from utils.adapters.initial import load_lora
from utils.adapters.lora import adapter_parameters, add_lora, extract_lora, select_modules, speaking
from utils.training.checkpointing import STRATEGIES
from utils.training.fused import FusedBlock
from utils.training.learner import Trainable
from utils.training.memory import Memory, in_fp32
from utils.training.optimizers import OptimizerSpec
from wan.modules.model import WanModel

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_in_fp32_velocity_and_gradients_are_those_of_the_plain_block(situation):
    model, parameters = trainee(situation)
    inputs = inputs_of(model, situation)
    expected = answers(model, parameters, inputs)
    prepare_again(model, Memory(fuse=True))
    found = answers(model, parameters, inputs)
    assert relative_error(found, expected) < 1e-5
    assert all(a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("stream", [FP32, BF16], ids=["fp32 stream", "bf16 stream"])
@pytest.mark.parametrize("situation", [s for s in SITUATIONS if s != "one layer"])
def test_in_bf16_the_error_is_no_larger_than_that_of_the_plain_block(situation, stream):
    """Against the same weights and inputs in fp32: the velocity's, and that of the gradients in the mean."""
    situation = SITUATIONS[situation]
    model, parameters = trainee(situation, BF16)
    exact, own = trainee(situation)
    exact.load_state_dict(model.state_dict())
    inputs = [tensor.bfloat16().float() if tensor.ndim > 2 else tensor for tensor in inputs_of(model, situation)]
    reference = answers(exact, own, inputs)
    errors = []
    for fuse in (False, True):
        prepare_again(model, Memory(fuse=fuse, stream=stream))
        pairs = zip(answers(model, parameters, inputs), reference, strict=True)
        each = [relative_error([a], [b]) for a, b in pairs]
        errors.append((each[0], sum(each[1:]) / len(each[1:])))
    (plain_velocity, plain_gradients), (velocity, gradients) = errors
    assert velocity <= 1.1 * plain_velocity and gradients <= 1.1 * plain_gradients


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_a_rounded_stream_is_rounded_once_at_the_end_of_a_block_and_its_gradient_at_the_beginning(fuse, dtype):
    """Inside a block the stream is fp32, whatever the dtype that it comes and goes in."""
    situation, seen = SITUATIONS["images and held frame"], []
    model, _ = prepared(Memory("full", fuse=fuse), situation, dtype)
    block = model.blocks[0].forward
    model.blocks[0].forward = lambda *args: seen.extend(args) or block(*args)
    with torch.no_grad():
        model(*inputs_of(model, situation))
    stream = seen[0].to(BF16)
    outputs, gradients = [], []
    grad = torch.linspace(-1, 1, stream.numel()).view_as(stream).to(BF16)
    for each in (FP32, BF16):
        x = stream.to(each).requires_grad_()
        out = block.eager(x, *seen[1:])
        assert out.dtype == each
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad(out, x, grad.to(each))[0])
    assert torch.equal(outputs[0].to(BF16), outputs[1]) and torch.equal(gradients[0].to(BF16), gradients[1])
    assert not torch.equal(outputs[0], outputs[1].float()) and not torch.equal(gradients[0], gradients[1].float())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("situation", [s for s in SITUATIONS if s != "control"])
def test_the_gradients_of_matrices_in_bf16_are_the_rounded_ones_of_the_same_matrices_in_fp32(situation, fuse, dtype):
    """The patch embedding of a control LoRA is PEFT's: with matrices in bf16 it computes in bf16."""
    situation, found = SITUATIONS[situation], []
    for each in (FP32, BF16):
        model, parameters = prepared(Memory(fuse=fuse), situation, dtype)
        for parameter in parameters:
            parameter.data = parameter.data.to(BF16).to(each)
        found.append(answers(model, parameters, inputs_of(model, situation)))
    (velocity, *exact), (answered, *rounded) = found
    assert torch.equal(velocity, answered) and all(gradient.dtype == BF16 for gradient in rounded)
    assert equal([gradient.to(BF16) for gradient in exact], rounded) and all(gradient.any() for gradient in rounded)


def test_a_control_lora_in_bf16_gets_finite_gradients_close_to_those_in_fp32():
    situation, found = SITUATIONS["control"], []
    for each in (FP32, BF16):
        model, parameters = prepared(Memory(fuse=True), situation)
        for parameter in parameters:
            parameter.data = parameter.data.to(BF16).to(each)
        found.append(answers(model, parameters, inputs_of(model, situation)))
    assert all(gradient.dtype == BF16 for gradient in found[1][1:])
    assert relative_error(found[1], found[0]) < 0.02


def gradient_of_input(model: WanModel, inputs: list[Tensor]) -> Tensor:
    """The gradient of the input of the first block."""
    seen: list[Tensor] = []
    forward = model.blocks[0].forward

    def watched(x: Tensor, *conditions: Tensor) -> Tensor:
        seen.append(x.detach().requires_grad_())
        return forward(seen[0], *conditions)

    model.blocks[0].forward = watched
    try:
        return torch.autograd.grad(loss_of(model(*inputs)), seen)[0]
    finally:
        model.blocks[0].forward = forward


@pytest.mark.parametrize("silent", [False, True], ids=["speaking", "silent"])
def test_the_gradient_of_the_input_is_that_of_the_plain_block_also_without_adapters(silent):
    situation = SITUATIONS["images and held frame"]
    model, _ = trainee(situation)
    inputs, found = inputs_of(model, situation), []
    for fuse in (False, True):
        prepare_again(model, Memory(fuse=fuse))
        with speaking(model, None if silent else "default"):
            found.append([gradient_of_input(model, inputs)])
    assert relative_error(found[1], found[0]) < 1e-5


def two_adapters() -> tuple[WanModel, list[Tensor]]:
    model, _ = trainee()
    fill(add_lora(model, select_modules(model, ("attn",)), RANK, 2 * ALPHA, "second"), seed=5)
    return model, inputs_of(model)


@pytest.mark.parametrize("strategy", ["none", "selective"])
def test_who_speaks_may_change_between_passes(strategy):
    model, inputs = two_adapters()
    results = {}
    for fuse in (False, True):
        prepare_again(model, Memory(strategy, fuse=fuse))
        for turn in range(2):
            for name in ("default", "second"):
                parameters = list(adapter_parameters(model, name).values())
                with speaking(model, name):
                    results[fuse, turn, name] = answers(model, parameters, inputs)
    for name in ("default", "second"):
        assert relative_error(results[True, 0, name], results[False, 0, name]) < 1e-5
        assert equal(results[True, 0, name], results[True, 1, name])
    assert relative_error(results[True, 0, "second"][:1], results[True, 0, "default"][:1]) > 1e-3


def test_several_adapters_speak_together():
    model, inputs = two_adapters()
    parameters = [p for name in ("default", "second") for p in adapter_parameters(model, name).values()]
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_adapter([name for name in ("default", "second") if name in module.lora_A])
    expected = answers(model, parameters, inputs)
    prepare_again(model, Memory(fuse=True))
    assert relative_error(answers(model, parameters, inputs), expected) < 1e-5


def test_an_adapter_that_comes_later_is_read():
    model, parameters = trainee(replace(SITUATIONS["text"], targets=("self_attn.q",)))
    inputs = inputs_of(model)
    prepare_again(model, Memory(fuse=True))
    before = answers(model, parameters, inputs)
    more = add_lora(model, select_modules(model, ("ffn.0",)), RANK, ALPHA, "second")
    fill(more, seed=2)
    with speaking(model, "second"):
        after = answers(model, more, inputs)
    prepare_again(model, Memory())
    with speaking(model, "second"):
        assert relative_error(after, answers(model, more, inputs)) < 1e-5
    assert not torch.equal(after[0], before[0])


# ------------------------------------------------------------------------------------------------------- stepping aside


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}], ids=lambda changes: next(iter(changes)))
def test_a_block_with_a_lora_that_is_not_plain_is_the_plain_block_bit_for_bit(changes):
    model = tiny_transformer()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["self_attn.q", "ffn.2"], **changes)
    peft.inject_adapter_in_model(config, model)
    fill([parameter for name, parameter in model.named_parameters() if "lora_A" in name or "lora_B" in name])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = inputs_of(model)
    expected = answers(model, parameters, inputs)
    for strategy in STRATEGIES:
        prepare_again(model, Memory(strategy, fuse=True))
        assert equal(answers(model, parameters, inputs), expected)


def test_dropout_drops_the_same_as_in_the_plain_block():
    model = tiny_transformer()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["cross_attn.v"], lora_dropout=0.5)
    peft.inject_adapter_in_model(config, model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fill(parameters)
    model.train()
    inputs, found = inputs_of(model), []
    for fuse in (False, True, True):
        prepare_again(model, Memory(fuse=fuse))
        torch.manual_seed(len(found) // 2)
        found.append(answers(model, parameters, inputs))
    assert equal(found[0], found[1]) and not equal(found[0], found[2])


@pytest.mark.parametrize(
    "name", ["blocks.0.modulation", "blocks.0.norm3.weight", "blocks.0.self_attn.norm_q.weight", "blocks.0.ffn.0.bias"]
)
@pytest.mark.parametrize("stream", [FP32, BF16], ids=["fp32 stream", "bf16 stream"])
def test_whatever_else_of_a_block_is_trained_has_its_gradient(name, stream):
    model = tiny_transformer()
    parameter = model.get_parameter(name).requires_grad_()
    inputs, found = inputs_of(model), []
    for fuse in (False, True):
        prepare_again(model, Memory(fuse=fuse, stream=stream))
        found.append(answers(model, [parameter], inputs))
    assert found[1][1].any() and relative_error(found[1], found[0]) < (1e-5 if stream == FP32 else 0.02)


def test_modulation_that_needs_a_gradient_has_it():
    model, _ = trainee()
    parameter = model.get_parameter("time_projection.1.weight").requires_grad_()
    inputs = inputs_of(model)
    expected = answers(model, [parameter], inputs)
    prepare_again(model, Memory(fuse=True))
    assert equal(answers(model, [parameter], inputs), expected)


def test_only_the_block_with_the_unusual_layer_steps_aside():
    model, parameters = trainee()
    inputs = inputs_of(model)
    expected = answers(model, parameters, inputs)
    layer = model.blocks[1].ffn[0].base_layer
    own = layer.forward
    layer.forward = lambda x: own(x)
    prepare_again(model, Memory(fuse=True))
    plain_runs = [0, 0]
    for index, block in enumerate(model.blocks):
        plain = block.forward.fused.plain

        def counted(*args, plain=plain, index=index):
            plain_runs[index] += 1
            return plain(*args)

        block.forward.fused.plain = counted
    assert relative_error(answers(model, parameters, inputs), expected) < 1e-5
    assert plain_runs == [0, 1]


def test_a_fused_block_is_called_as_the_plain_one_with_and_without_an_image():
    for name in ("text", "images"):
        model, _ = trainee(SITUATIONS[name])
        fused = []
        for block in model.blocks:
            fused.append(block.forward)
            block.forward = FusedBlock(block, in_fp32(block.forward))
        inputs = inputs_of(model, SITUATIONS[name])
        velocity = model(*inputs)
        for block, plain in zip(model.blocks, fused, strict=True):
            block.forward = plain
        assert relative_error([velocity.detach()], [model(*inputs).detach()]) < 1e-5


# ----------------------------------------------------------------------------------------------------- successive steps


def forget_conversions(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        vars(parameter).pop("_converted", None)


class Matrices:
    """An adapter that has no file."""

    def __init__(self, model: WanModel) -> None:
        self.parameters = adapter_parameters(model)


def trained(strategy: str, fresh: bool) -> list[Tensor]:
    """The velocities of a training whose adapter changes in every way; `fresh`: without conversions from before."""
    model, parameters = prepared(Memory(strategy, fuse=True, stream=BF16), Situation(batch=1), BF16)
    other, _ = trainee(Situation(batch=1), BF16)
    trainable = Trainable("lora", Matrices(model), OptimizerSpec(0.1, 0.01, "constant", 0, 9), ema_decay=0.9)
    inputs, velocities = inputs_of(model, Situation(batch=1)), []

    def step(scale: float = 1.0) -> None:
        if fresh:
            forget_conversions(parameters)
        velocity = model(*inputs)
        velocities.append(velocity.detach())
        (loss_of(velocity) * scale).backward()
        trainable.step(max_grad_norm=1.0)

    step()
    saved = copy.deepcopy(trainable.state_dict())
    step()
    step(math.nan)  # a skipped update
    step()
    trainable.load_state_dict(saved)
    step()
    load_lora(model, extract_lora(other, {}))
    step()
    step()
    return velocities


@pytest.mark.parametrize("strategy", ["none", "selective", "offload"])
def test_no_step_reads_matrices_from_before_an_update(strategy):
    velocities = trained(strategy, fresh=False)
    assert equal(velocities, trained(strategy, fresh=True))
    first, second, after_second, after_skipped, restored, loaded, last = velocities
    assert torch.equal(after_second, after_skipped) and torch.equal(restored, second) and torch.equal(loaded, first)
    assert not any(torch.equal(first, other) for other in (second, after_second, last))


def test_gradients_of_several_batches_add_up():
    model, parameters = prepared(Memory("selective", fuse=True))
    batches = [inputs_of(model, seed=seed) for seed in range(3)]
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for inputs in batches:
        for total, gradient in zip(expected, answers(model, parameters, inputs)[1:], strict=True):
            total += gradient
    for inputs in batches:
        loss_of(model(*inputs)).backward()
    assert equal([parameter.grad for parameter in parameters], expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_forward_passes_may_come_before_their_backward_passes(strategy):
    model, parameters = prepared(Memory(strategy, fuse=True))
    first, second = inputs_of(model, seed=0), inputs_of(model, seed=1)
    expected = [answers(model, parameters, inputs)[1:] for inputs in (first, second)]
    losses = [loss_of(model(*inputs)) for inputs in (first, second)]
    with torch.no_grad():
        model(*first)
    found = [torch.autograd.grad(loss, parameters) for loss in reversed(losses)][::-1]
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
