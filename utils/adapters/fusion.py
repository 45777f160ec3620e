"""LoRAs that become part of a base model while its weights are loaded, one after another."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from utils.adapters.fitting import fitting
from utils.adapters.lora import LoraFusion
from utils.adapters.lora_reader import read_lora
from utils.adapters.provenance import FusedFile
from utils.common.errors import UserError
from wan.checkpoints import Place, Stored
from wan.modules.model import WanModel


@dataclass(frozen=True)
class Fusion:
    """LoRAs that were checked on a model without weights; none changes nothing.

    The order is: `widen` the model without weights, then load its weights through `place`.
    """

    parts: tuple[LoraFusion, ...] = ()

    @property
    def targets(self) -> set[str]:
        """The names of the parameters that they change."""
        return set().union(*(part.targets for part in self.parts))

    @property
    def reads_control(self) -> bool:
        """Whether one is a control LoRA, so that the model needs a control."""
        return any(part.in_dim is not None for part in self.parts)

    def widen(self, model: WanModel) -> None:
        """Gives the patch embedding the inputs that a control LoRA reads."""
        for part in self.parts:
            part.widen(model)

    def place(self, cast: Place) -> Place:
        """What is done to each tensor of the base model: cast, then each LoRA is added in turn."""

        def place(name: str, stored: Stored) -> Tensor:
            tensor = cast(name, stored)
            for part in self.parts:
                tensor = part.place(name, tensor)
            return tensor

        return place


def fuse_on(layout: WanModel, files: Sequence[FusedFile]) -> tuple[Fusion, list[str]]:
    """What of these LoRA files fits a transformer without weights, and a sentence for each thing that differs.

    Each is tried on the transformer with those before it. Raises UserError as `fitting` and `LoraFusion` do. Leaves
    `layout` unchanged.
    """
    layout, parts, notes = copy.deepcopy(layout), list[LoraFusion](), list[str]()
    for file in files:
        lora, differences = fitting(read_lora(file.path), layout, file.path)
        try:
            part = LoraFusion(layout, lora, file.record.weight)
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from None
        part.widen(layout)
        parts.append(part)
        notes += differences
    return Fusion(tuple(parts)), notes
