"""What `--gradient_checkpointing auto` chooses on smaller GPUs, and whether that fits.

A smaller GPU is a limit for torch's allocator, as `--vram` sets it; the CUDA context comes on top.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby

import torch

from benchmarks.contest import Contestant, updater_of
from benchmarks.measure import FAILED, Clock, Row, Sizes, count_tokens, skipped
from benchmarks.models import Inputs, fused, our_trainee, random_inputs
from utils.training.calibration import Workload
from utils.training.cards import CARDS
from utils.training.checkpoint_plan import AUTO, Room
from utils.training.forecast import CONTEXT, Setting, forecast
from utils.training.memory import TrainingPass
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
    """Inside, torch allocates at most so many bytes of the GPU."""
    if limit is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))  # of the current device
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _planned(name: str, sizes: Sizes, grid: Grid, device: torch.device) -> Iterator[Row]:
    """What is chosen, and the next steps. Raises torch.OutOfMemoryError where even offloading all does not fit."""
    inputs, tokens = random_inputs(sizes, grid, device), count_tokens(grid)
    trainee = our_trainee(sizes.shape, sizes, device, memory=fused(AUTO))
    training_pass = trainee.model.blocks[0].forward
    assert isinstance(training_pass, TrainingPass)
    plan = training_pass.plan
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    reserve = updater_of(trainee).bytes_of_first_step()
    room = measure_room(trainee.model, lambda: torch.autograd.grad(trainee.loss(inputs), trainee.parameters), reserve)
    plan.settle(room)
    chosen = plan.strategies(tokens)
    runs = ", ".join(f"{len(list(group))} {strategy}" for strategy, group in groupby(chosen))
    yield Row(f"{name}: chosen", runs, "blocks", f"{tokens} tokens; room for {room.free / 1e9:.2f} GB of activations")
    predicted = resident + reserve + _predicted(room, chosen, tokens)
    yield Row(f"{name}: predicted peak", predicted / 1e9, "GB", "weights, LoRA, optimizer and activations")
    work = Workload(sizes.shape, tokens, rank=sizes.rank)
    foreseen = forecast(work, Setting("bf16", 0, tuple(chosen)), CARDS["h200"]).device.total - CONTEXT
    yield Row(f"{name}: forecast peak", foreseen / 1e9, "GB", "the same, before anything is loaded (--plan)")
    yield from _steps(name, Contestant("ours", trainee), inputs, {"predicted": predicted, "forecast": foreseen}, device)


def _steps(
    name: str, contestant: Contestant, inputs: Inputs, expected: Mapping[str, float], device: torch.device
) -> Iterator[Row]:
    """Whether the next steps fit, and how far their peak is from what was expected."""
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
    ratios = ", ".join(f"{peak / value:.3f} of the {kind}" for kind, value in expected.items())
    yield Row(f"{name}: measured peak", peak / 1e9, "GB", f"{ratios}; {reserved / 1e9:.2f} GB reserved")


def _predicted(room: Room, chosen: list[str], tokens: int) -> float:
    """Bytes of activations at the peak, by what was measured with all block inputs in main memory."""
    kept = sum(room.costs[strategy] - room.costs["offload"] for strategy in chosen)
    return room.working * tokens / room.tokens + kept * tokens
