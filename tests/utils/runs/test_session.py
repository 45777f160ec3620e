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


class Exporting:
    """A learner that notes whether its parameters have the values that are exported."""

    is_open = False

    @contextmanager
    def as_exported(self):
        self.is_open = True
        yield
        self.is_open = False


def test_validation_clips_come_one_after_another_to_the_device():
    clips = [Batch(torch.full((1, 2), float(n)), Cond(torch.ones(1, 1, 1))) for n in range(3)]
    learner = Exporting()

    def validate(seen, seed):
        return [clip.latents.device.type for clip in seen], seed, learner.is_open

    schedule = SimpleNamespace(phases=[SimpleNamespace(name="lora", validate=validate)])
    losses = session(validation=clips, learner=learner, schedule=schedule).validate(torch.device("meta"), 7)
    assert losses == {"lora": (["meta"] * 3, 7, True)} and not learner.is_open


def test_previews_are_shown_with_the_further_loras_beside():
    beside: list[object] = []

    @contextmanager
    def with_further(loras: object):
        beside.append(loras)
        yield
        beside.append("closed")

    learner = Exporting()
    preview = SimpleNamespace(generate=lambda predict: [*beside, predict, learner.is_open])
    experts = SimpleNamespace(beside=with_further, predict="velocity")
    shown = session(learner=learner, experts=experts, further={"a": ()}).show(preview)
    assert shown == [{"a": ()}, "velocity", True]
    assert beside[-1] == "closed"
