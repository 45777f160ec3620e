"""Which way to multiply with quantised weights is the fastest on this device: measured, not assumed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.common.console import say
from utils.storage.formats import quantise
from utils.storage.linear import QuantisedLinear, product, product_backward

MOST_ROWS = 8192
WARMUPS, REPEATS = 3, 7
WORTH = 0.98  # of the time: what is hardly faster is not worth its rounding


@dataclass(frozen=True)
class Times:
    """Seconds of a product of `rows` tokens and its way back, by how the weight is held."""

    format: str
    rows: int
    dtype: torch.dtype
    in_codes: float | None  # None where the device has no kernel for it
    in_values: float
    unquantised: float


def time_products(format: str, size: tuple[int, int], rows: int, device: torch.device, dtype: torch.dtype) -> Times:
    """Times a layer of this size (O, I): codes multiplied, values made of codes, and a weight in `dtype`.

    Of more than MOST_ROWS so many are timed. Leaves no memory reserved.
    """
    times = _time_products(format, size, min(rows, MOST_ROWS), device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return times


def _time_products(format: str, size: tuple[int, int], rows: int, device: torch.device, dtype: torch.dtype) -> Times:
    with torch.device(device):
        plain = nn.Linear(size[1], size[0], dtype=dtype).requires_grad_(False)
        x, grad = torch.randn(rows, size[1], dtype=dtype), torch.randn(rows, size[0], dtype=dtype)
    layer = QuantisedLinear(plain, quantise(plain.weight, format))
    in_values = _seconds(lambda: (product(layer, x), product_backward(layer, grad)), device)
    unquantised = _seconds(lambda: (product(plain, x), product_backward(plain, grad)), device)
    layer.in_codes = True
    try:
        in_codes = _seconds(lambda: (product(layer, x), product_backward(layer, grad)), device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # whatever a kernel raises that this device does not have
        in_codes = None
    return Times(format, rows, dtype, in_codes, in_values, unquantised)


def faster_matmul(times: Times) -> str:
    """What --quantised_matmul auto means: on or off. Says why."""
    name = str(times.dtype).removeprefix("torch.")
    if times.in_codes is None:
        say(f"--quantised_matmul off: this GPU does not multiply {times.format}")
        return "off"
    chosen = "on" if times.in_codes < WORTH * times.in_values else "off"
    with_it, without, plain = (f"{1e3 * each:.2f} ms" for each in (times.in_codes, times.in_values, times.unquantised))
    gain = (
        "" if min(times.in_codes, times.in_values) < times.unquantised else f": {times.format} saves memory, not time"
    )
    say(
        f"--quantised_matmul {chosen}: a product of {times.rows:,} tokens takes {with_it} with it, {without} without "
        f"it, and {plain} with {name} weights{gain}"
    )
    return chosen


def _seconds(run: Callable[[], tuple[Tensor, Tensor]], device: torch.device) -> float:
    """The median duration of a run."""
    durations = []
    for repeat in range(WARMUPS + REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        durations += [time.perf_counter() - started] if repeat >= WARMUPS else []
    return statistics.median(durations)
