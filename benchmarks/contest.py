"""Training steps of several contestants in one process, in turns, after they agree on loss and gradients.

Latents, text and noise are given. The contestants take turns step by step, each from an idle device, so that a change
of clock speed or load affects all of them.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.measure import FAILED, Clock, Row, Sizes, at_least, cosine, p90, peak_bytes, seconds, skipped
from benchmarks.models import Inputs, Trainee
from utils.training.optim import Updater
from utils.training.optimizers import OptimizerSpec, ParameterGroup

SPEC = OptimizerSpec(learning_rate=1e-5, weight_decay=0.01, schedule="constant", warmup_steps=0, total_steps=1000)
COSINE_LIMIT = 0.999  # of all LoRA gradients in bf16
MATRIX_LIMIT = 0.98  # of those of one matrix: small ones hardly show in the cosine of all
FP32_LIMIT = 1e-4  # relative difference of the loss, and of all LoRA gradients, in fp32
LOSS_LIMIT = 5e-3  # relative difference of the loss in bf16


def updater_of(trainee: Trainee[nn.Module]) -> Updater:
    named = {str(index): parameter for index, parameter in enumerate(trainee.parameters)}
    return Updater([ParameterGroup(named)], SPEC)


@dataclass
class Contestant:
    """A trainee with its optimizer, and its measurements."""

    name: str
    trainee: Trainee[nn.Module]
    times: list[float] = field(default_factory=list)  # seconds per step
    first: float = 0.0  # seconds of the first forward and backward pass, in which code is compiled
    loss: float = 0.0  # of the first pass
    gradients: list[Tensor] = field(default_factory=list)  # of the first pass, on the CPU
    peak: int = 0  # bytes during a step, beyond those allocated between steps
    reserved: int = 0  # bytes that the allocator holds for it

    def __post_init__(self) -> None:
        self.updater = updater_of(self.trainee)

    def begin(self, inputs: Inputs, device: torch.device) -> None:
        """Computes loss and gradients once, without an update."""

        def compute() -> None:
            loss = self.trainee.loss(inputs)
            loss.backward()
            self.loss = loss.item()

        self.first = seconds(compute, device)
        for parameter in self.trainee.parameters:
            assert parameter.grad is not None
            self.gradients.append(parameter.grad.cpu())
            parameter.grad = None

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
        tensors = (*self.trainee.model.parameters(), *self.trainee.model.buffers(), *states)
        # Weights that flow to the device share memory there.
        memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(memory.values())

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def admit(
    builders: Mapping[str, Callable[[], Trainee[nn.Module]]], inputs: Inputs, sizes: Sizes, device: torch.device
) -> Iterator[Contestant | Row]:
    """The contestants after their warm-up, with the time of its last step; a row for each that cannot take part."""
    for name, build in builders.items():
        admitted = _admit(name, build, inputs, sizes, device)
        if isinstance(admitted, Row):
            gc.collect()
            torch.cuda.empty_cache()  # the next one needs the memory
        yield admitted


def _admit(
    name: str, build: Callable[[], Trainee[nn.Module]], inputs: Inputs, sizes: Sizes, device: torch.device
) -> Contestant | Row:
    on_gpu = device.type == "cuda"
    held = torch.cuda.memory_reserved(device) if on_gpu else 0
    try:
        contestant = Contestant(name, build())
        contestant.begin(inputs, device)
        for _ in range(sizes.warmups):
            contestant.times = [contestant.turn(inputs, device)]
    except ModuleNotFoundError as error:
        return skipped(name, f"{error.name} is not installed")
    except torch.OutOfMemoryError:
        return skipped(name, "out of memory")
    contestant.peak = 0  # the first step also allocated the optimizer's state, which counts as resident
    contestant.reserved = torch.cuda.memory_reserved(device) - held if on_gpu else 0
    return contestant


def take_turns(
    contestants: list[Contestant], inputs: Inputs, steps: int, device: torch.device, clock: Clock
) -> Iterator[Row]:
    """Times the steps of all contestants. Those that run out of memory leave with a row; all, if the time is short."""
    turns = sum(contestant.times.pop() for contestant in contestants)
    if steps * turns > clock.left():
        contestants.clear()
        yield skipped("steps", f"{steps} rounds of {turns:.1f} s are more than the {clock.left():.0f} s left")
    for _ in range(steps):
        for contestant in list(contestants):
            try:
                contestant.times.append(contestant.turn(inputs, device))
            except torch.OutOfMemoryError:
                contestants.remove(contestant)
                yield skipped(contestant.name, "out of memory together with the others")


def agreement(ours: Contestant, peer: Contestant, dtype: torch.dtype) -> Iterator[Row]:
    """Whether loss and LoRA gradients of the first pass are those of the peer, as far as the dtype lets them."""
    name = f"{ours.name} and {peer.name}"
    difference = abs(ours.loss - peer.loss) / abs(peer.loss)
    mine, theirs = (torch.cat([gradient.flatten() for gradient in c.gradients]).double() for c in (ours, peer))
    if dtype == torch.bfloat16:
        yield _at_most(f"{name}: relative loss difference", difference, LOSS_LIMIT)
        yield at_least(f"{name}: cosine of all LoRA gradients", cosine(mine, theirs), COSINE_LIMIT)
        worst = min(cosine(a, b) for a, b in zip(ours.gradients, peer.gradients, strict=True))
        yield at_least(f"{name}: worst cosine of one matrix", worst, MATRIX_LIMIT)
        return
    yield _at_most(f"{name}: relative loss difference", difference, FP32_LIMIT)
    error = ((mine - theirs).norm() / theirs.norm()).item()
    yield _at_most(f"{name}: relative difference of all LoRA gradients", error, FP32_LIMIT)


def _at_most(name: str, value: float, limit: float) -> Row:
    return Row(name, value, comparison=f"limit <= {limit:g}", verdict="ok" if value <= limit else FAILED)


def speed_rows(contestant: Contestant, flops: float, tokens: int, ceiling: float) -> Iterator[Row]:
    """Seconds, tokens per second, use of the device's matrix products of `ceiling` FLOP/s, and memory."""
    name, times, median = contestant.name, contestant.times, contestant.median
    spread = f"p90 {p90(times):.4g} s, {min(times):.4g} to {max(times):.4g} s"
    yield Row(f"{name}: step, median", median, "s", f"{spread}, {len(times)} steps of {tokens} tokens")
    yield Row(f"{name}: speed", tokens / median, "tokens/s")
    reached = f"of {ceiling / 1e12:.4g} TFLOP/s in a matrix product"
    yield Row(f"{name}: model FLOP utilisation", 100 * flops / median / ceiling, "%", reached)
    if contestant.peak:
        yield Row(f"{name}: peak memory", (contestant.resident + contestant.peak) / 1e9, "GB", "allocated, its own")
        yield Row(f"{name}: reserved memory", contestant.reserved / 1e9, "GB", "held by the allocator after warm-up")


def ratio_rows(contestants: list[Contestant], peer: str, target: float | None = None) -> Iterator[Row]:
    """How many times as fast as the peer each of the others is; nothing where the peer does not take part."""
    medians = {contestant.name: contestant.median for contestant in contestants}
    theirs = medians.pop(peer, None)
    if theirs is None:
        return
    for name, median in medians.items():
        ratio = theirs / median
        comparison = "" if target is None else f"target >= {target:g} on an H200"
        verdict = "" if target is None else "reached" if ratio >= target else "missed"
        yield Row(f"{name}: times the speed of {peer}", ratio, "x", comparison, verdict)
