"""The speed and memory of a training step (forward, backward, update), compared with diffusers and PEFT.

Latents, text and noise are given. All contestants stay in one process and take turns step by step, each from an idle
device, so that a change of clock speed or load affects all of them.
"""

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.measure import Clock, Row, Sizes, count_tokens, gemm_rate, p90, peak_bytes, seconds, skipped
from benchmarks.models import LEAN, Inputs, Trainee, diffusers_trainee, our_trainee, random_inputs, step_flops
from utils.training.optim import OptimizerSpec, ParameterGroup, Updater

PEER = "diffusers + PEFT, checkpointing"
VIDEO_TARGET, IMAGE_TARGET = 1.6, 2.0  # times the speed of the peer, on an H200
SPEC = OptimizerSpec(learning_rate=1e-5, weight_decay=0.01, schedule="constant", warmup_steps=0, total_steps=1000)


@dataclass
class Contestant:
    """A trainee with its optimizer, and its measurements."""

    name: str
    trainee: Trainee[nn.Module]
    times: list[float] = field(default_factory=list)  # seconds per step
    peak: int = 0  # bytes during a step, beyond those allocated between steps

    def __post_init__(self) -> None:
        named = {str(index): parameter for index, parameter in enumerate(self.trainee.parameters)}
        self.updater = Updater([ParameterGroup(named)], SPEC)

    def step(self, inputs: Inputs) -> None:
        """Takes one training step."""
        self.trainee.loss(inputs).backward()
        self.updater.step(max_grad_norm=1.0)

    def turn(self, inputs: Inputs, device: torch.device) -> float:
        """Takes one step and returns its seconds. Updates `peak`."""
        spent = 0.0

        def timed() -> None:
            nonlocal spent
            spent = seconds(lambda: self.step(inputs), device)

        self.peak = max(self.peak, peak_bytes(timed, device))
        return spent

    @property
    def resident(self) -> int:
        """Bytes that stay allocated between steps: weights, buffers and the optimizer's state."""
        states = [value for state in self.updater.optimizer.state.values() for value in state.values()]
        return sum(t.nbytes for t in (*self.trainee.model.parameters(), *self.trainee.model.buffers(), *states))


def video(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """At the trainer's default token limit."""
    yield from _contest(sizes, sizes.video, VIDEO_TARGET, device, clock)


def images(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """At the size of an image, where launching a kernel takes longer than running it."""
    yield from _contest(sizes, sizes.image, IMAGE_TARGET, device, clock)


def _contest(
    sizes: Sizes, grid: tuple[int, int, int], target: float, device: torch.device, clock: Clock
) -> Iterator[Row]:
    shape, inputs = sizes.shape, random_inputs(sizes, grid, device)
    builders: dict[str, Callable[[], Trainee[nn.Module]]] = {
        "ours, checkpointing": lambda: our_trainee(shape, sizes, device),
        "ours, no checkpointing": lambda: our_trainee(shape, sizes, device, memory=LEAN),
        PEER: lambda: diffusers_trainee(shape, sizes, device),
    }
    contestants: list[Contestant] = []
    for name, build in builders.items():
        admitted = _admit(name, build, inputs, sizes, device)
        if isinstance(admitted, Row):
            gc.collect()
            torch.cuda.empty_cache()  # the next one needs the memory
            yield admitted
        else:
            contestants.append(admitted)
    turns = sum(contestant.times.pop() for contestant in contestants)
    if sizes.steps * turns > clock.left():
        yield skipped("steps", f"{sizes.steps} rounds of {turns:.1f} s are more than the {clock.left():.0f} s left")
        return
    for _ in range(sizes.steps):
        for contestant in list(contestants):
            try:
                contestant.times.append(contestant.turn(inputs, device))
            except torch.OutOfMemoryError:
                contestants.remove(contestant)
                yield skipped(contestant.name, "out of memory together with the others")
    tokens = count_tokens(grid)
    flops = step_flops(shape, tokens, sizes.rank)
    for contestant in contestants:
        yield from _rows(contestant, flops, tokens, gemm_rate(sizes.gemm_side, device))
    yield from _ratios(contestants, target)


def _admit(
    name: str, build: Callable[[], Trainee[nn.Module]], inputs: Inputs, sizes: Sizes, device: torch.device
) -> Contestant | Row:
    """A contestant after its warm-up, with the time of the last warm-up step; a row if it cannot take part."""
    try:
        contestant = Contestant(name, build())
        for _ in range(sizes.warmups):
            contestant.times = [contestant.turn(inputs, device)]
        contestant.peak = 0  # the first step also allocated the optimizer's state, which counts as resident
        return contestant
    except ModuleNotFoundError as error:
        return skipped(name, f"{error.name} is not installed")
    except torch.OutOfMemoryError:
        return skipped(name, "out of memory")


def _rows(contestant: Contestant, flops: float, tokens: int, ceiling: float) -> Iterator[Row]:
    name, times = contestant.name, contestant.times
    median = statistics.median(times)
    yield Row(f"{name}: step, median", median, "s", f"p90 {p90(times):.4g} s, {len(times)} steps of {tokens} tokens")
    yield Row(f"{name}: speed", tokens / median, "tokens/s")
    reached = f"of {ceiling / 1e12:.4g} TFLOP/s in a matrix product"
    yield Row(f"{name}: model FLOP utilisation", 100 * flops / median / ceiling, "%", reached)
    if contestant.peak:
        yield Row(f"{name}: peak memory", (contestant.resident + contestant.peak) / 1e9, "GB", "allocated, its own")


def _ratios(contestants: list[Contestant], target: float) -> Iterator[Row]:
    medians = {contestant.name: statistics.median(contestant.times) for contestant in contestants}
    peer = medians.pop(PEER, None)
    if peer is None:
        return
    for name, median in medians.items():
        verdict = "reached" if peer / median >= target else "missed"
        yield Row(f"{name}: times the speed of {PEER}", peer / median, "x", f"target >= {target:g} on an H200", verdict)
