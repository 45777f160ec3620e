"""Weights that wait in main memory: whether the numbers of training stay the same, and what their copies cost."""

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import nn

from benchmarks.checks.equality import deterministic, differing, differing_row
from benchmarks.checks.numbers import Numbers
from benchmarks.checks.plan import capped
from benchmarks.checks.step import SHAPES, timed
from benchmarks.contest import Contestant
from benchmarks.measure import FAILED, Clock, Row, Sizes, count_tokens, seconds, skipped
from benchmarks.models import Inputs, Trainee, fused, random_inputs, with_adapter
from benchmarks.weights import stored_transformer
from utils.diffusion.objectives import squared_error
from utils.storage.streaming import Ring, Stream, assign_slots

STRATEGIES = ("full", "offload")
FORMATS = {"bf16": None, "fp8_scaled": "fp8_scaled"}
RESIDENT, STREAMED = "weights on the device", "weights in main memory"
STEPS = 3
Build = Callable[[], Trainee[nn.Module]]


def weights(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """All blocks of 1.3B in main memory, against all on the device."""
    yield from _against_resident(sizes, device, clock)


def weights_14b(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """A few blocks of the shape of Wan2.1-T2V-14B."""
    yield from _against_resident(_of_14b(sizes, sizes.shallow_layers), device, clock)


def weights_capped(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """More blocks of 14B than fit into a small GPU: in which size of a GPU steps fit, everything else offloaded too."""
    deep = _of_14b(sizes, sizes.deep_layers)
    inputs = random_inputs(deep, deep.video, device)
    yield Row("depth", deep.shape.num_layers, "blocks", f"of {SHAPES['14B'].num_layers}")
    for name, streams in ((STREAMED, True), (RESIDENT, False)):
        try:
            contestant = Contestant(name, _build(deep, device, "offload", streams=streams))
            _release(device)
        except torch.OutOfMemoryError:
            yield skipped(name, "out of memory, when the weights are made")
            continue
        yield from _under_caps(contestant, inputs, deep, device)
        del contestant
        _release(device)


def _of_14b(sizes: Sizes, layers: int) -> Sizes:
    return replace(sizes, shape=replace(SHAPES["14B"], num_layers=layers))


def _build(
    sizes: Sizes, device: torch.device, strategy: str, format: str | None = None, streams: bool = True
) -> Trainee[nn.Module]:
    """Fused blocks; if it `streams`, the weights of all of them are in main memory."""
    model = stored_transformer(sizes.shape, device, format)
    stream = None
    if streams:
        count = len(model.blocks)
        stream = Stream(model, assign_slots(count, count), Ring(device))
    return with_adapter(model, sizes, fused(strategy), stream=stream)


def _against_resident(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    yield Row("depth", sizes.shape.num_layers, "blocks", f"{count_tokens(sizes.video)} tokens")
    inputs = random_inputs(sizes, sizes.video, device)
    with deterministic():
        for strategy in STRATEGIES:
            yield from _same_numbers(sizes, device, strategy, inputs)
    few = replace(sizes, steps=max(2, sizes.steps // 4), warmups=min(2, sizes.warmups))
    for name, format in FORMATS.items():
        builders: dict[str, Build] = {f"{name}, {RESIDENT}": partial(_build, sizes, device, "full", format, False)}
        builders |= {f"{name}, {STREAMED}, {s}": partial(_build, sizes, device, s, format) for s in STRATEGIES}
        yield from timed(few, builders, f"{name}, {RESIDENT}", device, clock)
        _release(device)


def _same_numbers(sizes: Sizes, device: torch.device, strategy: str, inputs: Inputs) -> Iterator[Row]:
    """Bit for bit. Kernels may differ from run to run, so that what is on the device runs twice, too."""
    reference, again = _passes(_build(sizes, device, strategy, streams=False), inputs)
    repeats = differing(reference, again) == 0
    yield _row(f"{strategy}: {RESIDENT}, twice", reference, again, "" if repeats else "not deterministic")
    for number, found in enumerate(_passes(_build(sizes, device, strategy), inputs), start=1):
        label = f"{strategy}: {STREAMED}, pass {number}, and on the device"
        yield _row(label, reference, found, FAILED if repeats else "as two runs of one")
    _release(device)


def _row(name: str, reference: Numbers, other: Numbers, otherwise: str) -> Row:
    return differing_row(name, reference, other, otherwise, "tensors, the velocity and all gradients")


def _passes(trainee: Trainee[nn.Module], inputs: Inputs) -> list[Numbers]:
    """Two passes, forward and backward: the loss, and the velocity with all gradients."""
    found = []
    for _ in range(2):
        velocity = trainee.velocity(inputs.latents, inputs.noisy.timestep, inputs.text, inputs.image)
        loss = squared_error(velocity, inputs.noisy.velocity)
        gradients = torch.autograd.grad(loss, trainee.parameters)
        found.append((loss.item(), [velocity.detach(), *gradients]))
    return found


def _under_caps(contestant: Contestant, inputs: Inputs, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The steps in smaller and smaller GPUs, until they do not fit any more."""
    for cap in (None, *sorted(sizes.caps, reverse=True)):
        size = "the whole device" if cap is None else f"{cap} GB"
        label = f"{contestant.name}, {size}"
        with nullcontext() if cap is None else capped(cap * 10**9, device):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            try:
                spent = [seconds(partial(contestant.step, inputs), device) for _ in range(STEPS)]
            except torch.OutOfMemoryError:
                yield Row(f"{label}: step", comparison="out of memory; smaller ones are not tried")
                return
            yield Row(
                f"{label}: step, median", median(spent), "s", f"{STEPS} steps of {count_tokens(sizes.video)} tokens"
            )
            if device.type == "cuda":
                held = f"{torch.cuda.max_memory_reserved(device) / 1e9:.2f} GB reserved"
                yield Row(f"{label}: peak memory", torch.cuda.max_memory_allocated(device) / 1e9, "GB", held)


def _release(device: torch.device) -> None:
    gc.collect()  # replaced forwards and their modules refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
