"""Codes are multiplied where that is measured to be faster, and what was measured is said."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from utils.storage import products, timing
from utils.storage.linear import QuantisedLinear
from utils.storage.timing import MOST_ROWS, REPEATS, WARMUPS, Times, faster_matmul, time_products

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SIZE, ROWS = (96, 48), 32


def asked(monkeypatch, *seconds: float) -> list[tuple[torch.dtype, int]]:
    """Makes values, plain weights and codes take so long, in this order; the dtype and the rows of each."""
    times, ran = list(seconds), []

    def take(run: Callable[[], tuple[Tensor, Tensor]], device: torch.device) -> float:
        answer, grad = run()
        assert answer.shape == (len(answer), SIZE[0]) and grad.shape == (len(answer), SIZE[1])
        ran.append((answer.dtype, len(answer)))
        return times.pop(0)

    monkeypatch.setattr(timing, "_seconds", take)
    return ran


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("format", ["fp8", "fp8_scaled", "int8"])
def test_values_plain_weights_and_codes_are_timed_with_the_rows_of_a_batch(format, monkeypatch, capsys):
    ran = asked(monkeypatch, 3.0, 2.0, 1.0)
    assert time_products(format, SIZE, ROWS, CPU, BF16) == Times(format, ROWS, BF16, 1.0, 3.0, 2.0)
    assert ran == [(BF16, ROWS)] * 3 and said(capsys) == ""


def test_of_more_rows_only_so_many_are_timed(monkeypatch):
    monkeypatch.setattr(timing, "MOST_ROWS", ROWS)
    ran = asked(monkeypatch, 3.0, 2.0, 1.0)
    assert time_products("int8", SIZE, 10**9, CPU, BF16).rows == ROWS < MOST_ROWS
    assert ran == [(BF16, ROWS)] * 3


def test_the_way_of_codes_multiplies_codes_forward_and_values_backward(monkeypatch):
    made: list[str] = []
    for owner, name in ((products, "multiply"), (QuantisedLinear, "values")):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, own=own, name=name: made.append(name) or own(*args))
    asked(monkeypatch, 2.0, 3.0, 1.0)
    time_products("int8", SIZE, ROWS, CPU, BF16)
    assert made == ["values", "values", "multiply", "values"]


def test_a_device_without_a_kernel_has_no_time_for_codes_and_memory_that_runs_out_is_no_missing_kernel(monkeypatch):
    def refuse(error: RuntimeError) -> None:
        def raise_it(*_: object) -> Tensor:
            raise error

        monkeypatch.setattr(products, "multiply", raise_it)

    asked(monkeypatch, 3.0, 2.0, 3.0, 2.0)
    refuse(RuntimeError("_scaled_mm is not for compute capability 8.6"))
    assert time_products("fp8_scaled", SIZE, ROWS, CPU, BF16) == Times("fp8_scaled", ROWS, BF16, None, 3.0, 2.0)
    refuse(torch.OutOfMemoryError("too large"))
    with pytest.raises(torch.OutOfMemoryError):
        time_products("fp8_scaled", SIZE, ROWS, CPU, BF16)


@pytest.mark.parametrize(
    ("in_values", "in_codes", "chosen", "saves_time"),
    [
        (3, 1, "on", True),
        (3, 2.5, "on", False),
        (3, 4, "off", False),
        (1, 0.99, "off", True),
        (1, 0.97, "on", True),
        (1, 4, "off", True),
    ],
)
def test_the_faster_way_is_taken_and_all_three_times_are_said(in_values, in_codes, chosen, saves_time, capsys):
    assert faster_matmul(Times("int8", 4096, BF16, in_codes / 1e3, in_values / 1e3, 2e-3)) == chosen
    times = f"{in_codes:.2f} ms with it, {in_values:.2f} ms without it, and 2.00 ms with bfloat16 weights"
    ending = "" if saves_time else ": int8 saves memory, not time"
    assert said(capsys) == f"--quantised_matmul {chosen}: a product of 4,096 tokens takes {times}{ending}"


def test_a_device_without_a_kernel_takes_values_and_that_is_said(capsys):
    assert faster_matmul(Times("fp8", 4096, BF16, None, 1e-3, 2e-3)) == "off"
    assert said(capsys) == "--quantised_matmul off: this GPU does not multiply fp8"


def test_the_time_is_the_median_of_what_follows_the_warm_up(monkeypatch):
    clock, durations = [0.0], iter([100.0] * WARMUPS + [5.0, 1.0, 50.0, 2.0, 3.0, 4.0, 60.0])

    def run() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert REPEATS == 7 and timing._seconds(run, CPU) == 4.0
    assert next(durations, None) is None
