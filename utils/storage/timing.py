"""Which way to multiply with quantised weights is the fastest on this device: measured, not assumed."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.common.console import say
from utils.storage.formats import quantise
from utils.storage.linear import QuantisedLinear

WARMUPS, REPEATS = 3, 7
WORTH = 0.98  # of the time: what is hardly faster is not worth its rounding


def is_faster_in_codes(format: str, size: tuple[int, int], rows: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a layer of this size (O, I) multiplies so many rows faster in codes than in values. Says what was found.

    Times a product and its way back of the three: codes, values made of codes, and a weight in `dtype`.
    """
    with torch.device(device):
        plain = nn.Linear(size[1], size[0], dtype=dtype).requires_grad_(False)
        x, grad = torch.randn(rows, size[1], dtype=dtype), torch.randn(rows, size[0], dtype=dtype)
    layer = QuantisedLinear(plain, quantise(plain.weight, format))
    in_values = _seconds(lambda: (layer.product(x), layer.product_backward(grad)), device)
    layer.in_codes = True
    try:
        in_codes = _seconds(lambda: (layer.product(x), layer.product_backward(grad)), device)
    except RuntimeError as error:  # whatever a kernel raises that this device does not have
        say(f"{format}: this device does not multiply it ({str(error).splitlines()[0]})")
        return False
    unquantised = _seconds(lambda: (plain(x), grad @ plain.weight), device)
    faster = in_codes < WORTH * in_values
    times = (
        f"{1e3 * in_codes:.2f} ms in codes, {1e3 * in_values:.2f} ms in values, {1e3 * unquantised:.2f} ms in {dtype}"
    )
    gain = "" if min(in_codes, in_values) < unquantised else f": {format} saves memory, not time"
    say(f"a product of {rows:,} tokens takes {times}{gain}")
    return faster


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
