"""What the loop is shown of a session."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from utils.encoding.conditioning import Batch, Cond
from utils.runs.session import Session


def session(**parts: object) -> Session:
    names = ("learner", "schedule", "experts", "samples", "plan", "steps_per_epoch", "validation", "preview")
    empty = dict.fromkeys((*names, "further", "kept", "needed"))
    return Session(**empty | parts)


def test_validation_clips_come_one_after_another_to_the_device():
    clips = [Batch(torch.full((1, 2), float(n)), Cond(torch.ones(1, 1, 1))) for n in range(3)]
    seen = session(validation=clips).watched(torch.device("meta"))
    assert [clip.latents.device.type for clip in seen] == ["meta"] * 3


def test_previews_are_shown_with_the_further_loras_beside():
    beside: list[object] = []

    @contextmanager
    def with_further(loras: object):
        beside.append(loras)
        yield
        beside.append("closed")

    preview = SimpleNamespace(generate=lambda predict: [*beside, predict])
    experts = SimpleNamespace(beside=with_further, predict="velocity")
    assert session(experts=experts, further={"a": ()}).show(preview) == [{"a": ()}, "velocity"]
    assert beside[-1] == "closed"
