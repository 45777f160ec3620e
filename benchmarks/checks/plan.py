"""What `--gradient_checkpointing auto` chooses on smaller GPUs, and whether that fits.

A smaller GPU is a limit for torch's allocator, which is passed on to the measurement; the CUDA context comes on top.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from unittest.mock import patch

import torch

from benchmarks.contest import Contestant
from benchmarks.measure import FAILED, Clock, Row, Sizes, count_tokens, skipped
from benchmarks.models import Inputs, fused, our_trainee, random_inputs
from utils.training.checkpoint_plan import AUTO, Room
from utils.training.memory import TrainingPass
from utils.training.optim import bytes_of_first_step
from utils.training.room import measure_room

STEPS = 3
Grid = tuple[int, int, int]


def check(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """At the trainer's default token limit."""
    yield from _under_caps(sizes, sizes.video, device)


def long(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """At 81 frames of 832x480."""
    yield from _under_caps(sizes, sizes.long, device)


def _under_caps(sizes: Sizes, grid: Grid, device: torch.device) -> Iterator[Row]:
    for cap in (*sizes.caps, None):
        name = "the whole device" if cap is None else f"{cap} GB"
        try:
            with capped(None if cap is None else cap * 10**9, device):
                yield from _planned(name, sizes, grid, device)
        except torch.OutOfMemoryError:
            yield skipped(name, "out of memory, with all block inputs in main memory")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def capped(limit: int | None, device: torch.device) -> Iterator[None]:
    """Inside, torch allocates at most so many bytes of the GPU, and says that it has no more."""
    if limit is None or device.type != "cuda":
        yield
        return
    real = torch.cuda.mem_get_info

    def info(*_: object) -> tuple[int, int]:
        unused, _total = real(device)
        return min(unused, limit - torch.cuda.memory_reserved(device)), limit

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    try:
        with patch.object(torch.cuda, "mem_get_info", info):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _planned(name: str, sizes: Sizes, grid: Grid, device: torch.device) -> Iterator[Row]:
    """What is chosen, and the next steps. Raises torch.OutOfMemoryError where even offloading all does not fit."""
    inputs, tokens = random_inputs(sizes, grid, device), count_tokens(grid)
    trainee = our_trainee(sizes.shape, sizes, device, memory=fused(AUTO))
    training_pass = trainee.model.blocks[0].forward
    assert isinstance(training_pass, TrainingPass)
    plan = training_pass.plan
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    reserve = bytes_of_first_step(trainee.parameters)
    room = measure_room(trainee.model, lambda: torch.autograd.grad(trainee.loss(inputs), trainee.parameters), reserve)
    plan.settle(room)
    chosen = plan.strategies(tokens)
    runs = ", ".join(f"{len(list(group))} {strategy}" for strategy, group in groupby(chosen))
    yield Row(f"{name}: chosen", runs, "blocks", f"{tokens} tokens; room for {room.free / 1e9:.2f} GB of activations")
    predicted = resident + reserve + _predicted(room, chosen, tokens)
    yield Row(f"{name}: predicted peak", predicted / 1e9, "GB", "weights, LoRA, optimizer and activations")
    yield from _steps(name, Contestant("ours", trainee), inputs, predicted, device)


def _steps(name: str, contestant: Contestant, inputs: Inputs, predicted: float, device: torch.device) -> Iterator[Row]:
    """Whether the next steps fit, and how far their peak is from the predicted one."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    label = f"{name}: steps that fit"
    for done in range(STEPS):
        try:
            contestant.step(inputs)
        except torch.OutOfMemoryError:
            yield Row(label, done, "", f"of {STEPS}", f"{FAILED}: out of memory")
            return
    yield Row(label, STEPS, "", f"of {STEPS}", "ok")
    if not on_gpu:
        yield skipped(f"{name}: measured peak", "no GPU")
        return
    torch.cuda.synchronize(device)
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    ratio = f"{peak / predicted:.3f} of the predicted; {reserved / 1e9:.2f} GB reserved"
    yield Row(f"{name}: measured peak", peak / 1e9, "GB", ratio)


def _predicted(room: Room, chosen: list[str], tokens: int) -> float:
    """Bytes of activations at the peak, by what was measured with all block inputs in main memory."""
    kept = sum(room.costs[strategy] - room.costs["offload"] for strategy in chosen)
    return room.working * tokens / room.tokens + kept * tokens
