"""Encoding on a stream of its own: what waits for what, with streams that only write down what they are asked for."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from utils.encoding.conditioning import Batch, Cond
from utils.encoding.side_stream import SideStream

DEVICE = torch.device("cpu")


class Streams:
    """Stands for CUDA's: the current stream, and in `log` what happened on which, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[object, ...]] = []
        self.main = self.now = self.make("main")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.make("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.now)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(
            Tensor, "record_stream", lambda tensor, stream: self.log.append((stream.name, "uses", tensor))
        )

    def make(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device=DEVICE, wait_stream=lambda other: self.log.append((name, "waits for", other.name))
        )

    def used(self, tensor: Tensor, stream: SimpleNamespace) -> None:
        self.log.append((stream.name, "uses", tensor))

    @contextmanager
    def on(self, stream: SimpleNamespace):
        before, self.now = self.now, stream
        yield
        self.now = before


@pytest.fixture
def streams(monkeypatch) -> Streams:
    return Streams(monkeypatch)


def test_a_batch_waits_for_nothing_and_what_comes_after_waits_for_it(streams):
    side = SideStream(DEVICE)
    assert streams.log == [("side", "waits for", "main")], "the encoders may still be on their way"
    streams.log.clear()
    batch = Batch(torch.ones(1, 2, 3, 4, 4), Cond(torch.ones(1, 5, 6), channels=torch.ones(1, 2, 3, 4, 4)))

    def make() -> Batch:
        streams.log.append((streams.now.name, "encodes"))
        return batch

    found = side.encode(make)
    assert streams.log[:2] == [("side", "encodes"), ("main", "waits for", "side")]
    used = streams.log[2:]
    assert [entry[:2] for entry in used] == [("main", "uses")] * 3
    assert [entry[2] for entry in used] == [batch.latents, batch.cond.text, batch.cond.channels]
    assert found.latents is batch.latents and found.cond.text is batch.cond.text and found.cond.image is None


def test_memory_is_measured_and_held_on_the_stream(streams, monkeypatch):
    allocated = iter([100])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: streams.log.append(("reset",)))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 164)
    side = SideStream(DEVICE)

    def make() -> Batch:
        streams.log.append((streams.now.name, "encodes"))
        return Batch(torch.ones(1), Cond(torch.ones(1)))

    assert side.peak_of(make) == 64
    assert streams.log.index(("reset",)) < streams.log.index(("side", "encodes"))
    empty = torch.empty

    def watched(*size: int, **given: object) -> Tensor:
        streams.log.append((streams.now.name, "holds"))
        return empty(*size, **given)

    monkeypatch.setattr(torch, "empty", watched)
    assert side.hold(64).nbytes == 64 and streams.log[-1] == ("side", "holds")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_batch_is_made_while_the_step_before_still_computes():
    device = torch.device("cuda")
    side, work = SideStream(device), torch.randn(4096, 4096, device=device)
    source, step, made = torch.randn(256, 256), torch.cuda.Event(), torch.cuda.Event()

    def make() -> Batch:
        values = source.pin_memory().to(device, non_blocking=True)
        batch = Batch(values @ values, Cond(values))
        made.record()
        return batch

    side.encode(make)  # the libraries are loaded
    torch.cuda.synchronize()
    for _ in range(200):
        work = work @ work / 64
    step.record()
    batch = side.encode(make)
    made.synchronize()
    assert not step.query(), "the batch has waited for the step"
    assert torch.allclose(batch.latents.cpu(), source @ source, atol=1e-2)
