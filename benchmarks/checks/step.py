"""The speed and memory of a training step (forward, backward, update), compared with diffusers and PEFT."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.contest import Contestant, admit, ratio_rows, speed_rows, take_turns
from benchmarks.launches import launches
from benchmarks.measure import Clock, Row, Sizes, count_tokens, gemm_rate
from benchmarks.models import Trainee, compiled, diffusers_trainee, fused, our_trainee, random_inputs, step_flops
from utils.training.memory import Memory
from wan.configs import FAMILIES

PEER = "diffusers + PEFT, checkpointing"
VIDEO_TARGET, IMAGE_TARGET = 1.6, 2.0  # times the speed of the peer, on an H200
STRATEGIES = ("none", "selective", "full")
FUSED = {f"fused, {strategy}": fused(strategy) for strategy in STRATEGIES}
COMPILED = {f"compiled, {strategy}": compiled(strategy) for strategy in STRATEGIES}
SHAPES = {"5B": FAMILIES["wan2.2-ti2v-5B"].shape, "14B": FAMILIES["wan2.1-t2v-14B"].shape}


def video(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """At the trainer's default token limit."""
    yield from contest(sizes, FUSED, device, clock, VIDEO_TARGET)


def video_compiled(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """The same with compiled blocks."""
    yield from contest(sizes, COMPILED, device, clock, VIDEO_TARGET)


def images(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """At the size of an image, where launching a kernel takes longer than running it."""
    yield from contest(replace(sizes, video=sizes.image), FUSED, device, clock, IMAGE_TARGET)


def images_compiled(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """The same with compiled blocks."""
    yield from contest(replace(sizes, video=sizes.image), COMPILED, device, clock, IMAGE_TARGET)


def long(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """At 81 frames of 832x480."""
    memories = {name: FUSED[name] for name in ("fused, full", "fused, selective")}
    yield from contest(_few_steps(replace(sizes, video=sizes.long)), memories, device, clock)


def of_5b(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """A few blocks of the shape of Wan2.2-TI2V-5B."""
    yield from _shallow("5B", sizes, device, clock)


def of_14b(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """A few blocks of the shape of Wan2.1-T2V-14B."""
    yield from _shallow("14B", sizes, device, clock)


def _shallow(name: str, sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    shape = replace(SHAPES[name], num_layers=sizes.shallow_layers)
    yield Row("depth", shape.num_layers, "blocks", f"of {SHAPES[name].num_layers}")
    shallow = _few_steps(replace(sizes, shape=shape))
    yield from contest(shallow, FUSED, device, clock)
    yield from contest(replace(shallow, video=sizes.long), {"fused, full": FUSED["fused, full"]}, device, clock)


def _few_steps(sizes: Sizes) -> Sizes:
    return replace(sizes, steps=max(2, sizes.steps // 4), warmups=min(2, sizes.warmups))


def contest(
    sizes: Sizes,
    memories: Mapping[str, Memory],
    device: torch.device,
    clock: Clock,
    target: float | None = None,
) -> Iterator[Row]:
    """Ours under each strategy and the peer, on the latents `sizes.video`."""
    builders: dict[str, Callable[[], Trainee[nn.Module]]] = {
        name: partial(our_trainee, sizes.shape, sizes, device, memory=memory) for name, memory in memories.items()
    }
    builders[PEER] = partial(diffusers_trainee, sizes.shape, sizes, device)
    yield from timed(sizes, builders, PEER, device, clock, target)


def timed(
    sizes: Sizes,
    builders: Mapping[str, Callable[[], Trainee[nn.Module]]],
    peer: str,
    device: torch.device,
    clock: Clock,
    target: float | None = None,
) -> Iterator[Row]:
    """The steps of all that are built, in turns, on the latents `sizes.video`; each compared with the peer."""
    inputs = random_inputs(sizes, sizes.video, device)
    contestants: list[Contestant] = []
    for admitted in admit(builders, inputs, sizes, device):
        if isinstance(admitted, Row):
            yield admitted
        else:
            contestants.append(admitted)
            yield Row(f"{admitted.name}: first pass", admitted.first, "s", "with compiling, where there is any")
    yield from take_turns(contestants, inputs, sizes.steps, device, clock)
    tokens = count_tokens(sizes.video)
    flops = step_flops(sizes.shape, tokens, sizes.rank)
    for contestant in contestants:
        yield from speed_rows(contestant, flops, tokens, gemm_rate(sizes.gemm_side, device))
    yield from ratio_rows(contestants, peer, target)
    for contestant in contestants:
        yield from launches(contestant, partial(contestant.step, inputs), device)
