"""Block inputs that wait in main memory: what their copies cost."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.checks.step import FUSED, timed
from benchmarks.measure import Clock, Row, Sizes, median_seconds, skipped
from benchmarks.models import Trainee, fused, our_trainee

KEPT = "fused, full"
PARKED = "fused, offload"
BYTES_PER_GEMM_SIDE = 2**15  # 256 MiB at the full size


def link(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """Copies between page-locked main memory and the GPU, each way alone and both at once."""
    if device.type != "cuda":
        yield skipped("link", "no GPU")
        return
    size = sizes.gemm_side * BYTES_PER_GEMM_SIDE
    hosts = [torch.ones(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    devices = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    copies = {
        "to the GPU": [(devices[0], hosts[0])],
        "from the GPU": [(hosts[1], devices[1])],
        "both at once": [(devices[0], hosts[0]), (hosts[1], devices[1])],
    }

    def copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        current = torch.cuda.current_stream(device)
        for (target, source), stream in zip(pairs, streams, strict=False):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
        for stream in streams:
            current.wait_stream(stream)

    for name, pairs in copies.items():
        spent = median_seconds(partial(copy, pairs), device)
        yield Row(f"copy {name}", len(pairs) * size / spent / 1e9, "GB/s", f"{size / 1e6:.0f} MB each, page-locked")


def offload(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """At the trainer's default token limit, against inputs that stay on the GPU."""
    yield from _against_full(sizes, device, clock)


def offload_long(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """The same at 81 frames of 832x480."""
    few = replace(sizes, video=sizes.long, steps=max(2, sizes.steps // 4), warmups=min(2, sizes.warmups))
    yield from _against_full(few, device, clock)


def _against_full(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    memories = {KEPT: FUSED[KEPT], PARKED: fused("offload")}
    builders: dict[str, Callable[[], Trainee[nn.Module]]] = {
        name: partial(our_trainee, sizes.shape, sizes, device, memory=memory) for name, memory in memories.items()
    }
    yield from timed(sizes, builders, KEPT, device, clock)
