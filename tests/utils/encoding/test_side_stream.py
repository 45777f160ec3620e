"""Encoding on a stream of its own: what waits for what, with streams that only write down what they are asked for."""

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from utils.encoding.conditioning import Batch, Cond
from utils.encoding.side_stream import SideStream

DEVICE = torch.device("cpu")


class Streams(threading.local):
    """Stands for CUDA's: each thread has a current stream, and in `log` is what happened on which, in order."""

    log: list[tuple[object, ...]] = []

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.make("main")
        if threading.current_thread() is threading.main_thread():
            self.log.clear()
            monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.make("side"))
            monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.now)
            monkeypatch.setattr(torch.cuda, "stream", self.on)
            monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.note(stream.name, "uses", tensor))

    def note(self, *entry: object) -> None:
        self.log.append(entry)

    def make(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            device=DEVICE,
            wait_stream=lambda other: self.note(name, "waits for", other.name),
            wait_event=lambda event: self.note(name, "waits for", event),
            record_event=lambda: f"event {len(self.log)}",
        )

    @contextmanager
    def on(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


@pytest.fixture
def streams(monkeypatch) -> Streams:
    return Streams(monkeypatch)


def make_batch(value: int) -> Batch:
    return Batch(torch.full((1, 2, 3, 4, 4), float(value)), Cond(torch.ones(1, 5, 6), channels=torch.ones(1, 2)))


def counted(last: int, ended: list[str]) -> Generator[int, None, None]:
    try:
        yield from range(last)
    finally:
        ended.append("ended")


def test_batches_are_made_by_a_thread_on_the_side_and_the_main_stream_waits_for_each(streams):
    side, ended, threads = SideStream(DEVICE), [], set()
    assert streams.log == [("side", "waits for", "main")], "the encoders may still be on their way"
    streams.log.clear()

    def encode(value: int) -> Batch:
        threads.add(threading.current_thread().name)
        streams.note(streams.now.name, "encodes", value)
        return make_batch(value)

    batches = list(side.encoded(counted(5, ended), encode))
    assert [batch.latents[0, 0, 0, 0, 0].item() for batch in batches] == [0, 1, 2, 3, 4] and ended == ["ended"]
    assert len(threads) == 1 and threading.current_thread().name not in threads
    assert [entry for entry in streams.log if entry[1] == "encodes"] == [("side", "encodes", n) for n in range(5)]
    for batch in batches:
        parts = batch.latents, batch.cond.text, batch.cond.channels
        used = [place for place, (_, what, whom) in enumerate(streams.log) if any(whom is part for part in parts)]
        assert len(used) == 3 and all(streams.log[place][:2] == ("main", "uses") for place in used)
        assert streams.log[used[0] - 1][:2] == ("main", "waits for")
    waited = [entry[2] for entry in streams.log if entry[1] == "waits for"]
    assert len(set(waited)) == 5


def test_the_next_batch_is_made_while_one_is_in_use_and_no_other(streams):
    made = [threading.Event() for _ in range(9)]

    def encode(value: int) -> Batch:
        made[value].set()
        return make_batch(value)

    ended: list[str] = []
    batches = SideStream(DEVICE).encoded(counted(9, ended), encode)
    for number in range(3):
        next(batches)
        assert made[number + 1].wait(20) and not made[number + 2].is_set()
    batches.close()
    assert ended == ["ended"] and not made[5].is_set()


@pytest.mark.parametrize("bad", [0, 2])
def test_an_error_of_encoding_comes_in_its_place_and_ends_all(streams, bad):
    def encode(value: int) -> Batch:
        if value == bad:
            raise OSError("lost")
        return make_batch(value)

    ended, threads = list[str](), threading.active_count()
    batches = SideStream(DEVICE).encoded(counted(9, ended), encode)
    for _ in range(bad):
        next(batches)
    with pytest.raises(OSError, match="lost"):
        next(batches)
    assert ended == ["ended"] and threading.active_count() == threads


def test_an_error_of_loading_ends_all_too(streams):
    def failing() -> Generator[int, None, None]:
        yield 0
        yield 1
        raise OSError("lost")

    batches = SideStream(DEVICE).encoded(failing(), make_batch)
    next(batches)
    with pytest.raises(OSError, match="lost"):
        next(batches)


def test_memory_is_measured_and_held_on_the_stream(streams, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: streams.note("", "reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 164)
    empty = torch.empty

    def watched(*size: int, **given: object) -> Tensor:
        streams.note(streams.now.name, "holds")
        return empty(*size, **given)

    monkeypatch.setattr(torch, "empty", watched)
    held = SideStream(DEVICE).hold_peak_of(lambda: streams.note(streams.now.name, "encodes"))
    assert held.nbytes == 64 and streams.log[1:] == [("", "reset"), ("side", "encodes"), ("side", "holds")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_are_made_while_a_long_step_still_computes():
    """More is asked of the device for a step than it lets wait."""
    device = torch.device("cuda")
    source = torch.randn(8, 256, 256)
    events = [torch.cuda.Event() for _ in range(4)]

    def encode(value: int) -> Batch:
        values = source[value].pin_memory().to(device, non_blocking=True)
        for _ in range(1500):
            values = values @ values / 16
        events[value].record()
        return Batch(values, Cond(values))

    step, overlapped = torch.cuda.Event(), 0
    work = torch.randn(4096, 4096, device=device)
    for value, batch in enumerate(SideStream(device).encoded((n for n in range(4)), encode)):
        expected = source[value].to(device)
        for _ in range(1500):
            expected = expected @ expected / 16
        assert torch.equal(batch.latents, expected)
        for _ in range(1500):
            work = work @ work / 64
        step.record()
        if value < 3:
            events[value + 1].synchronize()
            overlapped += not step.query()
    assert overlapped >= 2, "batches have waited for steps"
