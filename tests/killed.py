"""The trainer in a process that is killed at a given place: python -m tests.killed PLACE STEP COUNT, then its flags.

PLACE is "what:when", and COUNT which time of it in that step. As after kill -9, nothing of Python runs any more.
"""

import os
import signal
import sys
from typing import Any

import torch
from torch import nn

import train_wan_lora
from utils.adapters.attach import LoraAdapter
from utils.runs import run as runs
from utils.training.ema import Ema
from utils.training.few_step import FewStep
from utils.training.optim import Updater

STUDENT, CRITIC = PHASES = ("student", "critic")
BEFORE, BACKWARD, AFTER = "before", "backward", "after"


class Killer:
    """Watches what a step of few-step distillation does. In the rehearsal, which belongs to no step, it waits."""

    def __init__(self, place: str, step: int, count: int) -> None:
        self.what, self.when = place.split(":")
        self.step, self.count = step, count
        self.current, self.phase = 0, ""
        self.counts: dict[str, int] = {}  # of this step

    def arm(self) -> None:
        self.watch(FewStep, "student_loss", STUDENT)
        self.watch(FewStep, "critic_loss", CRITIC)
        self.watch(Updater, "step", "update")
        self.watch(torch.optim.Optimizer, "zero_grad", "clearing")  # in an update: matrices moved, schedule not yet
        self.watch(Ema, "update", "average")
        self.watch(LoraAdapter, "take_values", "alignment")
        self.watch(runs, "write_state", "state")  # LoRA files are written already
        take_step = train_wan_lora.take_step

        def counted(opts: Any, session: Any, *rest: Any) -> None:
            self.current, self.counts = session.learner.step + 1, {}
            take_step(opts, session, *rest)

        train_wan_lora.take_step = counted

    def watch(self, owner: Any, name: str, what: str) -> None:
        inner = getattr(owner, name)

        def watched(*given: Any, **named: Any) -> Any:
            self.phase = what if what in PHASES else self.phase
            self.counts[what] = self.counts.get(what, 0) + 1
            if self.is_here(what, BEFORE):
                self.kill()
            if self.is_here(what, BACKWARD):
                self.kill_in_backward(given[0].model)
            found = inner(*given, **named)
            if self.is_here(what, AFTER):
                self.kill()
            return found

        setattr(owner, name, watched)

    def is_here(self, what: str, when: str) -> bool:
        here = (what, when, self.current, self.counts[what])
        return here == (self.what, self.when, self.step, self.count)

    def kill_in_backward(self, model: nn.Module) -> None:
        """Once one of the matrices in training has its gradient; others have none yet."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained[len(trained) // 2].register_hook(lambda _: self.kill())

    def kill(self) -> None:
        print(f"killed at {self.what}:{self.when} of the {self.phase} in step {self.current}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    place, step, count, *flags = sys.argv[1:]
    Killer(place, int(step), int(count)).arm()
    train_wan_lora.main(flags)
