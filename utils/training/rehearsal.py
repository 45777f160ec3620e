"""The largest batch, once through the model before the first step: what does not fit is found now, not after hours."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.common.console import say
from utils.common.temp_rng import temp_rng
from utils.encoding.conditioning import Batch
from utils.training.checkpoint_plan import CheckpointPlan
from utils.training.phases import Phase
from utils.training.room import measure_room
from wan.modules.model import WanModel

COPIES = 3  # of what is trained, made at the first step: its gradient and two moments


def rehearse(
    phase: Phase, model: WanModel, batch: Batch, plan: CheckpointPlan, trained: Sequence[nn.Parameter]
) -> None:
    """Runs the loss of a batch forward and backward, and settles an open plan by the room that this leaves.

    `trained` are the parameters of the whole run; those on the model are the phase's. Leaves no gradient behind, and
    the random numbers that it draws are not missed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> tuple[Tensor, ...]:
        with temp_rng(0), phase.speaking():
            return torch.autograd.grad(phase.loss(batch), parameters, allow_unused=True)

    if not plan.is_open:
        run()
        return
    plan.settle(measure_room(model, run, COPIES * sum(parameter.nbytes for parameter in trained)))
    if (description := plan.describe(batch.tokens(model.shape.patch_size))) is not None:
        say(description)
