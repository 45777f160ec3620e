"""The largest batch, once through the model before the first step: what does not fit is found now, not after hours."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from utils.common.console import say
from utils.common.temp_rng import temp_rng
from utils.encoding.conditioning import Batch
from utils.training.checkpoint_plan import AUTO, CheckpointPlan
from utils.training.optim import bytes_of_first_step
from utils.training.phases import Phase
from utils.training.room import measure_room
from wan.modules.model import WanModel

LESS = 0.1  # of the room, where it was less than measured


def rehearse(
    phase: Phase, model: WanModel, batch: Batch, plan: CheckpointPlan, trained: Sequence[nn.Parameter]
) -> None:
    """Runs the loss of a batch forward and backward, after settling an open plan by the room that there is.

    `trained` are the parameters of the whole run; those on the model are the phase's. Leaves no gradient behind, and
    the random numbers that it draws are not missed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> None:
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            with temp_rng(0):
                phase.loss(batch).backward()
        finally:
            for parameter, grad in zip(parameters, before, strict=True):
                parameter.grad = grad

    with phase.speaking():
        if plan.is_open:
            plan.settle(measure_room(model, run, bytes_of_first_step(trained)))
            say(plan.describe(batch.tokens(model.shape.patch_size)))
        _run_with_less(run, plan)


def _run_with_less(run: Callable[[], None], plan: CheckpointPlan) -> None:
    """Runs a step as it will be. Where memory is full, blocks keep less, as long as that is possible."""
    while True:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            return run()
        except torch.OutOfMemoryError:
            if plan.strategy != AUTO or not plan.settle_for_less(LESS):
                raise
        say("that was too much: the blocks keep less")
