"""What a training step launches, and what it waits for."""

from collections.abc import Callable, Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.checks.synchronisations import synchronisations
from benchmarks.contest import Contestant
from benchmarks.measure import Row, skipped


def launches(contestant: Contestant, step: Callable[[], None], device: torch.device) -> Iterator[Row]:
    """Kernels, synchronisations and exposed transfers of one step, which is taken once for each."""
    name, wait = contestant.name, contestant.trainee.transfer_wait
    if device.type == "cuda":
        yield Row(f"{name}: kernels", count_kernels(step), "per step")
        places = synchronisations(step, device)
        yield Row(f"{name}: synchronisations", len(places), "per step", f"first at {places[0]}" if places else "")
    else:
        yield skipped(f"{name}: kernels and synchronisations", "no GPU")
    if wait is not None:
        wait()
        step()
        yield Row(f"{name}: exposed transfer", wait(), "s", "the device waits for it, one step")


def count_kernels(step: Callable[[], None]) -> int:
    """The kernels of a step on the GPU, without copies and fills."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    # The optimizer marks its step, which is an event of the device too.
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)
