"""The speed and memory of a training step (forward, backward, update), compared with diffusers and PEFT."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.contest import Contestant, admit, ratio_rows, speed_rows, take_turns
from benchmarks.measure import Clock, Row, Sizes, count_tokens, gemm_rate
from benchmarks.models import LEAN, Trainee, diffusers_trainee, our_trainee, random_inputs, step_flops

PEER = "diffusers + PEFT, checkpointing"
VIDEO_TARGET, IMAGE_TARGET = 1.6, 2.0  # times the speed of the peer, on an H200


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
    for admitted in admit(builders, inputs, sizes, device):
        if isinstance(admitted, Row):
            yield admitted
        else:
            contestants.append(admitted)
    yield from take_turns(contestants, inputs, sizes.steps, device, clock)
    tokens = count_tokens(grid)
    flops = step_flops(shape, tokens, sizes.rank)
    for contestant in contestants:
        yield from speed_rows(contestant, flops, tokens, gemm_rate(sizes.gemm_side, device))
    yield from ratio_rows(contestants, PEER, target)
