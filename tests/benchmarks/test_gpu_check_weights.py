"""The groups of the GPU check about weights in codes, and weights that wait in main memory, on a small model."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from benchmarks.checks import quantised, step, waiting_weights
from benchmarks.measure import FAILED, Clock, skipped
from tests.sizes import CPU, SHAPE, TINY, values
from utils.storage.streaming import PlainLane


def test_reading_fp8_is_compared_number_by_number(monkeypatch):
    rows = list(quantised.dequantised(TINY, CPU, Clock(60)))
    assert len(rows) == 4 * 2 * 3
    assert {row.verdict for row in rows} == {"equal"}
    calls, read = [], quantised.Quantised.values

    def unlike(stored, dtype):
        calls.append(stored)
        weight = read(stored, dtype)
        weight[0, 0] += len(calls) % 2
        return weight

    monkeypatch.setattr(quantised.Quantised, "values", unlike)
    first, *_ = quantised.dequantised(TINY, CPU, Clock(60))
    assert first.failed and first.value == 1


def test_codes_and_values_of_every_format_are_compared_number_by_number(monkeypatch):
    rows = values(quantised.stored(TINY, CPU, Clock(60)))
    assert len(rows) == 4 * (1 + 3)
    assert {row.verdict for row in rows.values()} == {"equal"}
    made, quantise = [], quantised.quantise

    def unlike(weight, format):
        made.append(format)
        codes = quantise(weight, format)
        codes.codes.view(torch.uint8).view(-1)[0] ^= len(made) % 2
        return codes

    monkeypatch.setattr(quantised, "quantise", unlike)
    rows = values(quantised.stored(TINY, CPU, Clock(60)))
    failed = {name for name, row in rows.items() if row.failed}
    assert failed == {f"{format}: codes unlike the CPU's" for format in ("fp8", "fp8_scaled")}
    assert rows["int8: codes unlike the CPU's"].value == rows["nf4: codes unlike the CPU's"].value == 1


@pytest.mark.parametrize(("format", "verdict"), [("int8", FAILED), ("nf4", "")])
def test_values_that_differ_from_the_cpus_fail_except_those_of_bitsandbytes(monkeypatch, format, verdict):
    calls, read = [], quantised.QuantisedLinear.values

    def unlike(layer, dtype):
        calls.append(layer)
        return read(layer, dtype) + len(calls) % 2

    monkeypatch.setattr(quantised.QuantisedLinear, "values", unlike)
    rows = values(quantised.stored(TINY, CPU, Clock(60)))
    row = rows[f"{format} to float32: numbers unlike the CPU's, of the same codes"]
    assert (row.value, row.verdict) == (48 * 48, verdict)


def test_without_bitsandbytes_the_other_formats_are_measured(monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    rows = values(quantised.stored(TINY, CPU, Clock(60)))
    assert rows["nf4"] == skipped("nf4", "bitsandbytes is not installed")
    assert len(rows) == 3 * (1 + 3) + 1
    assert not any("nf4" in name for name, _ in quantised._builders(TINY, CPU))


CODED = ("fp8", "fp8_scaled", "int8")
# As many tokens as kernels for codes need.
WIDE = replace(TINY, video=(2, 8, 6))


def test_weights_in_codes_change_the_gradients_a_little():
    rows = values(quantised.accuracy(WIDE, CPU, Clock(60)))
    together = {name.split(":")[0]: row.value for name, row in rows.items() if "cosine of all" in name}
    assert set(together) == {*CODED, "nf4", *(f"{name}, products of codes" for name in CODED)}
    assert all(0.8 < value < 0.99999 for value in together.values())
    assert together["fp8"] < together["int8"] and together["nf4"] < together["int8"]
    assert all(together[f"{name}, products of codes"] < together[name] for name in CODED)


def test_steps_with_weights_in_codes_are_timed_against_bf16_weights():
    rows = values(quantised.step(WIDE, CPU, Clock(60)))
    for name in (*CODED, "nf4", *(f"{name}, products of codes" for name in CODED)):
        assert rows[f"{name}: step, median"].value > 0
        assert rows[f"{name}: times the speed of bf16"].value > 0


@pytest.mark.parametrize("group", [waiting_weights.weights, waiting_weights.weights_14b])
def test_weights_in_main_memory_are_compared_with_those_on_the_device(monkeypatch, group):
    monkeypatch.setattr(waiting_weights, "SHAPES", {"14B": SHAPE})
    rows = values(group(replace(TINY, shallow_layers=3), CPU, Clock(60)))
    assert rows["depth"].value == (2 if group is waiting_weights.weights else 3)
    same = [row for name, row in rows.items() if "that differ" in name]
    assert len(same) == 2 * 3 and {row.verdict for row in same} == {"equal"}
    for format in ("bf16", "fp8_scaled"):
        for strategy in ("full", "offload"):
            name = f"{format}, weights in main memory, {strategy}"
            assert rows[f"{name}: times the speed of {format}, weights on the device"].value > 0


def test_weights_that_come_too_late_fail(monkeypatch):
    copy = PlainLane.copy

    def late(lane, slot, host):
        return copy(lane, slot, host) if torch._C._current_graph_task_id() == -1 else None

    monkeypatch.setattr(PlainLane, "copy", late)
    sizes = replace(TINY, shape=replace(SHAPE, num_layers=4))
    rows = values(islice(waiting_weights.weights(sizes, CPU, Clock(60)), 1 + 2 * 3))
    for strategy in ("full", "offload"):
        label = f"{strategy}: weights in main memory, pass 1, and on the device: that differ"
        assert rows[label].failed


def test_weights_that_wait_are_no_memory_of_the_device():
    def resident(streams):
        build = waiting_weights._build(replace(TINY, shape=replace(SHAPE, num_layers=6)), CPU, "full", None, streams)
        return step.Contestant("ours", build).resident

    linear = 2 * (8 * 48**2 + 2 * 48 * 96)  # bytes of a block, in bf16
    assert resident(False) - resident(True) == pytest.approx((6 - 2) * linear, rel=0.01)


def test_steps_of_many_blocks_are_tried_in_ever_smaller_gpus(monkeypatch):
    monkeypatch.setattr(waiting_weights, "SHAPES", {"14B": SHAPE})
    taken, take_step = [], waiting_weights.Contestant.step

    def limited(contestant, inputs):
        taken.append(contestant.name)
        if "on the device" in contestant.name and len(taken) > 9 + 3:
            raise torch.OutOfMemoryError("too much")
        take_step(contestant, inputs)

    monkeypatch.setattr(waiting_weights.Contestant, "step", limited)
    rows = values(waiting_weights.weights_capped(replace(TINY, deep_layers=3, caps=(1, 2)), CPU, Clock(60)))
    assert rows["depth"].value == 3
    measured = [name for name in rows if name.endswith("step, median")]
    sizes = ("the whole device", "2 GB", "1 GB")
    assert measured == [f"weights in main memory, {size}: step, median" for size in sizes] + [
        "weights on the device, the whole device: step, median"
    ]
    assert rows["weights on the device, 2 GB: step"].comparison.startswith("out of memory")
    assert not any(row.failed for row in rows.values())
