"""Products are made of codes where that is measured to be faster, and what was measured is said."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from utils.storage import products, timing
from utils.storage.linear import QuantisedLinear
from utils.storage.timing import REPEATS, WARMUPS, is_faster_in_codes

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SIZE, ROWS = (96, 48), 32


def asked(monkeypatch, *seconds: float) -> list[torch.dtype]:
    """Makes values, codes and plain weights take so long, in this order; in which dtype each run answered."""
    times, ran = list(seconds), []

    def take(run: Callable[[], tuple[Tensor, Tensor]], device: torch.device) -> float:
        answer, grad = run()
        assert answer.shape == (ROWS, SIZE[0]) and grad.shape == (ROWS, SIZE[1])
        ran.append(answer.dtype)
        return times.pop(0)

    monkeypatch.setattr(timing, "_seconds", take)
    return ran


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("format", ["fp8", "fp8_scaled", "int8"])
@pytest.mark.parametrize(
    ("in_values", "in_codes", "faster", "saves_time"),
    [(3, 1, True, True), (3, 2.5, True, False), (3, 4, False, False), (1, 0.99, False, True), (1, 0.97, True, True)],
)
def test_the_faster_way_is_taken_and_all_three_times_are_said(
    format, in_values, in_codes, faster, saves_time, monkeypatch, capsys
):
    ran = asked(monkeypatch, in_values / 1e3, in_codes / 1e3, 2e-3)
    assert is_faster_in_codes(format, SIZE, ROWS, CPU, BF16) is faster
    times = f"{in_codes:.2f} ms in codes, {in_values:.2f} ms in values, 2.00 ms in torch.bfloat16"
    ending = "" if saves_time else f": {format} saves memory, not time"
    assert said(capsys) == f"a product of 32 tokens takes {times}{ending}"
    assert ran == [BF16] * 3


def test_the_second_time_is_that_of_codes(monkeypatch, capsys):
    made: list[str] = []
    for owner, name in ((products, "forward"), (products, "backward"), (QuantisedLinear, "values")):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, own=own, name=name: made.append(name) or own(*args))
    asked(monkeypatch, 2e-3, 1e-3, 3e-3)
    is_faster_in_codes("int8", SIZE, ROWS, CPU, BF16)
    assert made == ["values", "values", "forward", "backward"]
    said(capsys)


def test_a_device_that_does_not_multiply_codes_takes_values_and_the_reason_is_said(monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("_scaled_mm is not for compute capability 8.6\nmore")

    monkeypatch.setattr(products, "forward", refuse)
    assert is_faster_in_codes("fp8_scaled", SIZE, ROWS, CPU, BF16) is False
    assert said(capsys) == "fp8_scaled: this device does not multiply it (_scaled_mm is not for compute capability 8.6)"


def test_the_time_is_the_median_of_what_follows_the_warm_up(monkeypatch):
    clock, durations = [0.0], iter([100.0] * WARMUPS + [5.0, 1.0, 50.0, 2.0, 3.0, 4.0, 60.0])

    def run() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert REPEATS == 7 and timing._seconds(run, CPU) == 4.0
    assert next(durations, None) is None
