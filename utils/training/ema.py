"""The exponential moving average of parameters."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from utils.common.tensors import in_parts


class Ema:
    """Averages of parameters, on their device and at least fp32: bf16 would lose most of what an update adds.

    No method waits for the device, and the parameters are never touched.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(parameters)
        self.values: dict[str, Tensor] = {
            name: p.detach().to(average_dtype(p), copy=True) for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the parameters after `step` steps.

        The decay is min(decay, (1 + step) / (10 + step)), so that early averages soon forget the start.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, parameters = list(self.values.values()), list(self.parameters.values())
        for part in in_parts(averages):
            values = [p.to(average.dtype) for p, average in zip(parameters[part], averages[part], strict=True)]
            torch._foreach_lerp_(averages[part], values, 1 - decay)


def average_dtype(parameter: nn.Parameter) -> torch.dtype:
    """In which a parameter is averaged."""
    return torch.promote_types(parameter.dtype, torch.float32)
