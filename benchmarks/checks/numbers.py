"""The accuracy of bf16: loss and LoRA gradients of one step, compared with an fp32 reference."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.contest import COSINE_LIMIT
from benchmarks.measure import Clock, Row, Sizes, at_least, cosine, count_tokens, skipped
from benchmarks.models import (
    CHECKPOINTING,
    Inputs,
    Trainee,
    compiled,
    diffusers_trainee,
    fused,
    our_trainee,
    random_inputs,
)
from utils.training.memory import Memory
from wan.modules.model import WanShape

# Memory of the fp32 reference of the 1.3B model at 10,000 tokens. Devices with less compare a shallower model.
FULL_DEPTH_BYTES = 16e9
SHALLOW_LAYERS = 8
PEER = "diffusers + PEFT"


Numbers = tuple[float, list[Tensor]]  # the loss, and all LoRA gradients
Build = Callable[[WanShape], Trainee[nn.Module]]


def check(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """The model's plain operations, fused blocks with either stream, and the diffusers model."""
    memories = {
        "plain": CHECKPOINTING,
        "fused, fp32 stream": replace(fused("full"), stream=torch.float32),
        "fused": fused("full"),
    }
    yield from _against_fp32(sizes, device, memories, {PEER: lambda shape: diffusers_trainee(shape, sizes, device)})


def compiled_blocks(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """Compiled blocks that keep everything, and those that keep their input."""
    memories = {f"compiled, {strategy}": compiled(strategy) for strategy in ("none", "full")}
    yield from _against_fp32(sizes, device, memories, {})


def _against_fp32(
    sizes: Sizes, device: torch.device, memories: Mapping[str, Memory], peers: Mapping[str, Build]
) -> Iterator[Row]:
    """Ours under each of these strategies, with limits, and peers without."""
    shape = replace(sizes.shape, num_layers=_depth(sizes, device))
    inputs = random_inputs(sizes, sizes.video, device)
    yield Row("depth", shape.num_layers, "blocks", f"{count_tokens(sizes.video)} tokens, random weights")
    # By default, convolutions would compute in TF32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        reference = measure(lambda: our_trainee(shape, sizes, device, torch.float32), inputs)
    builds: dict[str, Build] = {
        name: partial(our_trainee, sizes=sizes, device=device, memory=memory) for name, memory in memories.items()
    }
    for name, build in (builds | dict(peers)).items():
        try:
            yield from compare(name, reference, measure(partial(build, shape), inputs), limited=name in memories)
        except ModuleNotFoundError as error:
            yield skipped(name, f"{error.name} is not installed")
        except torch.OutOfMemoryError:
            yield skipped(name, "out of memory")


def _depth(sizes: Sizes, device: torch.device) -> int:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < FULL_DEPTH_BYTES:
        return min(sizes.reference_layers, SHALLOW_LAYERS)
    return sizes.reference_layers


def measure(build: Callable[[], Trainee[nn.Module]], inputs: Inputs) -> Numbers:
    """Loss and gradients of a model, which is freed before the next one is built."""
    trainee = build()
    loss = trainee.loss(inputs)
    value, grads = loss.item(), list(torch.autograd.grad(loss, trainee.parameters))
    del trainee, loss
    gc.collect()  # replaced forwards and their modules refer to each other
    return value, grads


def compare(
    name: str,
    reference: Numbers,
    measured: Numbers,
    limited: bool,
    against: str = "fp32 reference",
) -> Iterator[Row]:
    """How far loss and gradients are from those of a reference."""
    (true_loss, true_grads), (loss, grads) = reference, measured
    yield Row(f"{name}: relative loss difference", abs(loss - true_loss) / true_loss, comparison=against)
    pairs = list(zip(grads, true_grads, strict=True))
    together = cosine(*(torch.cat([grad.flatten() for grad in side]) for side in (grads, true_grads)))
    label = f"{name}: cosine of all LoRA gradients"
    if limited:
        yield at_least(label, together, COSINE_LIMIT)
    else:
        yield Row(label, together, comparison=against)
    worst = min(cosine(grad, true) for grad, true in pairs)
    yield Row(f"{name}: worst cosine of one matrix", worst, comparison=f"of {len(pairs)} matrices")
