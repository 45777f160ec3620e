"""LoRAs that become part of a base model while its weights are loaded, one after another."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.adapters.dora import decomposed_change
from utils.adapters.fitting import fitting
from utils.adapters.lora import diff_target, pad_inputs, widen_patch_embedding
from utils.adapters.lora_file import LoraFile, delta
from utils.adapters.lora_reader import read_lora
from utils.adapters.provenance import FusedFile
from utils.common.errors import UserError
from wan.checkpoints import Place, Stored
from wan.modules.model import WanModel
from wan.names import PATCH

PATCH_WEIGHT = f"{PATCH}.weight"


class _Addition:
    """A LoRA that is added to the weights of a base model at a strength, one tensor at a time."""

    def __init__(self, model: WanModel, lora: LoraFile, weight: float) -> None:
        """Raises UserError where the LoRA adapts what the model lacks, or a shape does not fit; changes nothing."""
        parameters = dict(model.named_parameters())
        self.weight = weight
        self.in_dim = _stated_in_dim(lora)
        self.factors = {f"{name}.weight": factors for name, factors in lora.factors.items()}
        self.magnitudes = {f"{name}.weight": magnitude for name, magnitude in lora.magnitudes.items()}
        self.diffs = {diff_target(key, parameters): tensor for key, tensor in lora.diffs.items()}
        shapes = {target: factors.weight_shape for target, factors in self.factors.items()}
        shapes |= {target: tuple(tensor.shape) for target, tensor in self.diffs.items()}
        for target, shape in shapes.items():
            if target not in parameters:
                raise UserError(f"the LoRA adapts {target}, which this model does not have; is it for another Wan?")
            needed = tuple(parameters[target].shape)
            if target == PATCH_WEIGHT and self.in_dim is not None:
                needed = (needed[0], self.in_dim, *needed[2:])
            # Convolutions come flattened too.
            if (shape[0], math.prod(shape[1:])) != (needed[0], math.prod(needed[1:])):
                raise UserError(f"the LoRA has {shape} at {target}, the model {needed}; is it for another Wan?")

    @property
    def targets(self) -> set[str]:
        """The names of the parameters that it changes."""
        return self.factors.keys() | self.diffs.keys() | ({PATCH_WEIGHT} if self.in_dim is not None else set())

    def add(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with the LoRA added in fp32, rounded to its dtype; unchanged where the LoRA does not adapt it."""
        if name not in self.targets:
            return tensor
        if name == PATCH_WEIGHT and self.in_dim is not None:
            tensor = pad_inputs(tensor, self.in_dim)
        result = tensor
        if (factors := self.factors.get(name)) is not None:
            factors = factors.map(lambda matrix: matrix.to(tensor.device))
            if (magnitude := self.magnitudes.get(name)) is None:
                change = delta(factors, self.weight)
            else:
                change = self.weight * decomposed_change(tensor, delta(factors).view_as(tensor), magnitude)
            result = _sum(result, change)
        if (diff := self.diffs.get(name)) is not None:
            result = _sum(result, diff.to(tensor.device).float() * self.weight)
        return result


@dataclass(frozen=True)
class Fusion:
    """LoRAs that were checked on a model without weights; none changes nothing.

    The order is: `widen` the model without weights, then load its weights through `place`. Each tensor is worked on
    before the next one is read, so this also serves weights that are stored quantised afterwards.
    """

    additions: tuple[_Addition, ...] = ()

    @property
    def targets(self) -> set[str]:
        """The names of the parameters that they change."""
        return set().union(*(each.targets for each in self.additions))

    @property
    def reads_control(self) -> bool:
        """Whether one is a control LoRA, so that the model needs a control."""
        return any(each.in_dim is not None for each in self.additions)

    def with_lora(self, model: WanModel, lora: LoraFile, weight: float = 1.0) -> "Fusion":
        """With another LoRA, checked on a model that these have widened.

        Raises UserError where it adapts what the model lacks, or a shape does not fit.
        """
        return Fusion((*self.additions, _Addition(model, lora, weight)))

    def widen(self, model: WanModel) -> None:
        """Gives the patch embedding the inputs that a control LoRA reads. Raises UserError where it has more."""
        for each in self.additions:
            if each.in_dim is not None:
                widen_patch_embedding(model, each.in_dim)

    @torch.no_grad()
    def add(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the base model with each LoRA added in turn."""
        for each in self.additions:
            tensor = each.add(name, tensor)
        return tensor

    def place(self, cast: Place) -> Place:
        """What is done to each tensor of the base model: cast, then each LoRA is added in turn."""

        def place(name: str, stored: Stored) -> Tensor:
            return self.add(name, cast(name, stored))

        return place


def fit_lora(lora: LoraFile, layout: WanModel, source: Path) -> tuple[LoraFile, list[str]]:
    """What of a LoRA fits a transformer without weights, and a sentence for each thing that differs.

    Raises UserError, with the name `source` of the file, as `fitting` and `Fusion` do.
    """
    lora, differences = fitting(lora, layout, source)
    try:
        Fusion().with_lora(layout, lora)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return lora, differences


def read_fusion(layout: WanModel, files: Sequence[FusedFile]) -> tuple[Fusion, list[str]]:
    """What of these LoRA files fits a transformer without weights, and a sentence for each thing that differs.

    Each is tried on the transformer with those before it. Raises UserError as `fit_lora` does. Leaves `layout`
    unchanged.
    """
    layout, fusion, notes = copy.deepcopy(layout), Fusion(), list[str]()
    for file in files:
        lora, differences = fit_lora(read_lora(file.path), layout, file.path)
        fusion = fusion.with_lora(layout, lora, file.record.weight)
        fusion.widen(layout)
        notes += differences
    return fusion, notes


@torch.no_grad()
def fuse_lora(model: WanModel, lora: LoraFile, weight: float = 1.0) -> None:
    """Adds `weight` times a LoRA to the weights of a loaded model, in place. Raises UserError as `Fusion` does.

    Rounds to the weights' dtype; widens inputs first. On the meta device only the checks cost anything.
    """
    fusion = Fusion().with_lora(model, lora, weight)
    fusion.widen(model)
    parameters = dict(model.named_parameters())
    for name in fusion.targets:
        parameters[name].copy_(fusion.add(name, parameters[name]))


def _stated_in_dim(lora: LoraFile) -> int | None:
    """The number of input channels that a control LoRA states, None for any other LoRA."""
    if other := [name for name in lora.input_shapes if name != PATCH]:
        raise UserError(f"the LoRA widens {other[0]}; only the patch embedding can be widened")
    shape = lora.input_shapes.get(PATCH)
    return None if shape is None else shape[1]


def _sum(tensor: Tensor, change: Tensor) -> Tensor:
    """In fp32, rounded to the tensor's dtype."""
    return (tensor.float() + change.view_as(tensor)).to(tensor.dtype)
