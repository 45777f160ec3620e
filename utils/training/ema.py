"""The exponential moving average of parameters."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Averages of parameters, on their device. No method waits for it, and the parameters are never touched."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(parameters)
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the parameters after `step` steps.

        The decay is min(decay, (1 + step) / (10 + step)), so that early averages soon forget the start.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), list(self.parameters.values()), 1 - decay)
