"""What a step launches and waits for."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import launches
from benchmarks.contest import Contestant
from benchmarks.measure import Sizes
from benchmarks.models import fused, our_trainee
from wan.modules.model import WanShape

CPU = torch.device("cpu")
SHAPE = WanShape(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=24, freq_dim=32)


def test_only_a_strategy_that_waits_for_transfers_has_a_row_of_them():
    for strategy, is_reported in (("full", False), ("offload", True)):
        trainee = our_trainee(SHAPE, Sizes(rank=4), CPU, memory=fused(strategy))
        assert (trainee.transfer_wait is not None) == is_reported
        rows = {row.name for row in launches.launches(Contestant("ours", trainee), lambda: None, CPU)}
        assert ("ours: exposed transfer" in rows) == is_reported


def test_what_is_reported_after_a_step_is_the_row():
    taken, reported = [], iter([9.0, 0.25])
    trainee = replace(our_trainee(SHAPE, Sizes(rank=4), CPU), transfer_wait=lambda: next(reported))
    contestant = Contestant("ours", trainee)
    rows = {row.name: row for row in launches.launches(contestant, lambda: taken.append(1), CPU)}
    assert rows["ours: exposed transfer"].value == 0.25
    assert len(taken) == 1


def test_kernels_are_counted_without_copies_fills_marks_and_host_operations(monkeypatch: pytest.MonkeyPatch):
    def event(name: str, device: DeviceType = DeviceType.CUDA, marked: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=marked)

    seen = [event("gemm"), event("Memcpy HtoD"), event("Memset"), event("Optimizer.step", marked=True)]
    seen += [event("aten::mm", DeviceType.CPU), event("gemm")]
    taken = []
    profiler = nullcontext(SimpleNamespace(events=lambda: seen))
    monkeypatch.setattr(launches, "profile", lambda activities: profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: taken.append("waited"))
    assert launches.count_kernels(lambda: taken.append("step")) == 2
    assert taken == ["step", "waited"]
