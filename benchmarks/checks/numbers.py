"""The accuracy of bf16: loss and LoRA gradients of one step, compared with an fp32 reference."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.contest import COSINE_LIMIT
from benchmarks.measure import Clock, Row, Sizes, at_least, cosine, count_tokens, skipped
from benchmarks.models import Inputs, Trainee, diffusers_trainee, our_trainee, random_inputs, rounded_trainee

# Memory of the fp32 reference of the 1.3B model at 10,000 tokens. Devices with less compare a shallower model.
FULL_DEPTH_BYTES = 16e9
SHALLOW_LAYERS = 8


def check(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """Our bf16 model, the same with a bf16 residual stream (an open question), and the diffusers model."""
    shape = replace(sizes.shape, num_layers=_depth(sizes, device))
    inputs = random_inputs(sizes, sizes.video, device)
    yield Row("depth", shape.num_layers, "blocks", f"{count_tokens(sizes.video)} tokens, random weights")
    # By default, convolutions would compute in TF32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        reference = _measure(lambda: our_trainee(shape, sizes, device, torch.float32), inputs)
    compared: dict[str, Callable[[], Trainee[nn.Module]]] = {
        "ours": lambda: our_trainee(shape, sizes, device),
        "ours, bf16 residual": lambda: rounded_trainee(shape, sizes, device),
        "diffusers + PEFT": lambda: diffusers_trainee(shape, sizes, device),
    }
    for name, build in compared.items():
        try:
            yield from _compare(name, reference, _measure(build, inputs), limited=name == "ours")
        except ModuleNotFoundError as error:
            yield skipped(name, f"{error.name} is not installed")


def _depth(sizes: Sizes, device: torch.device) -> int:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < FULL_DEPTH_BYTES:
        return min(sizes.reference_layers, SHALLOW_LAYERS)
    return sizes.reference_layers


def _measure(build: Callable[[], Trainee[nn.Module]], inputs: Inputs) -> tuple[float, list[Tensor]]:
    """Loss and gradients of a model, which is freed before the next one is built."""
    trainee = build()
    loss = trainee.loss(inputs)
    value, grads = loss.item(), list(torch.autograd.grad(loss, trainee.parameters))
    del trainee, loss
    gc.collect()  # replaced forwards and their modules refer to each other
    return value, grads


def _compare(
    name: str, reference: tuple[float, list[Tensor]], measured: tuple[float, list[Tensor]], limited: bool
) -> Iterator[Row]:
    (true_loss, true_grads), (loss, grads) = reference, measured
    yield Row(f"{name}: relative loss difference", abs(loss - true_loss) / true_loss, comparison="fp32 reference")
    pairs = list(zip(grads, true_grads, strict=True))
    together = cosine(*(torch.cat([grad.flatten() for grad in side]) for side in (grads, true_grads)))
    label = f"{name}: cosine of all LoRA gradients"
    if limited:
        yield at_least(label, together, COSINE_LIMIT)
    else:
        yield Row(label, together, comparison="fp32 reference")
    worst = min(cosine(grad, true) for grad, true in pairs)
    yield Row(f"{name}: worst cosine of one matrix", worst, comparison=f"of {len(pairs)} matrices")
