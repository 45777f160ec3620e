"""What a LoRA file says, in one form for every layout.

A pair of matrices changes the weight of one module by `alpha / rank * up @ down`; what LyCORIS factors in other ways
(`lycoris`) changes it in the same sense. Modules have their official Wan names ("blocks.0.self_attn.q"). `lora_reader`
brings every known layout into this form, and `lora_writer` writes it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from utils.adapters.dora import Magnitude
from utils.adapters.lycoris import Lycoris
from utils.common.errors import UserError

FP32_MAX = torch.finfo(torch.float32).max
MAX_DIMENSIONS = 5  # of a weight: the kernel of a 3D convolution
SHOWN_CHARACTERS = 100


class LoraError(UserError):
    """A LoRA file that cannot be read, or content that the chosen layout cannot hold."""


@dataclass(frozen=True)
class LoraPair:
    """The two matrices of one module, down (rank, in, ...) and up (out, rank, ...); alpha is None where unknown."""

    down: Tensor
    up: Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        """The inner dimension that both matrices share."""
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in, ...), the shape of the weight that the pair changes."""
        return self.up.shape[0], *self.down.shape[1:]

    @property
    def scale(self) -> float:
        """alpha / rank (Hu et al. 2021, section 4.1), and 1 where no alpha is known, as in ComfyUI."""
        return self.effective_alpha / self.rank

    @property
    def effective_alpha(self) -> float:
        """The alpha, or the rank where it is unknown: both give the same scale."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def bound(self) -> float:
        """No number in `delta` or in the product before it is scaled exceeds this; NaN for matrices that hold one."""
        return max(abs(self.effective_alpha), self.rank) * largest(self.down) * largest(self.up)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its matrices by role."""
        return {"down": self.down, "up": self.up}

    def map(self, change: Callable[[Tensor], Tensor]) -> "LoraPair":
        """With another tensor for each matrix."""
        return replace(self, down=change(self.down), up=change(self.up))

    def product(self) -> Tensor:
        """`up @ down` in fp32, (out, in * ...)."""
        return self.up.float().flatten(1) @ self.down.float().flatten(1)


Factors = LoraPair | Lycoris  # of a change of one weight


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file says, under official Wan names.

    `lycoris` holds the modules whose change is factored as LoHa or LoKr. `magnitudes` belong to modules of either kind
    and make DoRA of them. `diffs` are added in full: "blocks.0.norm3.diff" to the weight, "blocks.0.norm3.diff_b" to
    the bias, "blocks.0.modulation.diff" to the parameter itself. `input_shapes` gives the shape to which a weight is
    padded with zeros before its change is added: a control LoRA widens "patch_embedding" this way. `key_format`
    describes for people how the keys of the file were named; `notes` are what they should know of it, a sentence each.
    """

    pairs: dict[str, LoraPair]
    diffs: dict[str, Tensor] = field(default_factory=dict)
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    key_format: str = ""
    lycoris: dict[str, Lycoris] = field(default_factory=dict)
    magnitudes: dict[str, Magnitude] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def factors(self) -> dict[str, Factors]:
        """The factored changes of all kinds, by module."""
        return {**self.pairs, **self.lycoris}

    @property
    def extras(self) -> list[str]:
        """What it holds that an adapter of plain pairs cannot start from, for people."""
        kinds = [f"{each.kind} of {name}" for name, each in self.lycoris.items()]
        return [*self.diffs, *kinds, *(f"DoRA of {name}" for name in self.magnitudes)]

    @property
    def modules(self) -> set[str]:
        """All modules, and bare parameters, that it changes."""
        return {*self.pairs, *self.lycoris, *(key.rpartition(".")[0] for key in self.diffs)}

    def remarks(self, source: object) -> list[str]:
        """Its notes, and that an alpha is taken for granted where that is so, for a program that uses it."""
        scaled = [each.alpha for each in self.factors.values() if each.rank]
        if None not in scaled:
            return [*self.notes]
        some = " of some modules" if set(scaled) != {None} else ""
        return [*self.notes, f"{source} states no alpha{some}: it is taken to be the rank, so the scale is 1"]

    def part(self, keep: Callable[[str], bool]) -> "LoraFile":
        """What it says of some modules: `keep` is asked with the name of a module, and with the key of a diff."""

        def of(table: dict) -> dict:
            return {name: value for name, value in table.items() if keep(name)}

        return replace(
            self,
            pairs=of(self.pairs),
            diffs=of(self.diffs),
            input_shapes=of(self.input_shapes),
            lycoris=of(self.lycoris),
            magnitudes=of(self.magnitudes),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> "LoraFile":
        """With another tensor for each that is a number of a weight: not for alphas and shapes."""
        return replace(
            self,
            pairs={name: pair.map(change) for name, pair in self.pairs.items()},
            diffs={key: change(diff) for key, diff in self.diffs.items()},
            lycoris={name: factors.map(change) for name, factors in self.lycoris.items()},
            magnitudes={name: replace(m, values=change(m.values)) for name, m in self.magnitudes.items()},
        )


def delta(factors: Factors, weight: float = 1.0) -> Tensor:
    """`weight * scale * product` in fp32, shaped (out, in, ...) like the weight it is added to."""
    return (factors.product() * (weight * factors.scale)).reshape(factors.weight_shape)


def largest(tensor: Tensor) -> float:
    """The largest magnitude in fp32: NaN where the tensor holds one, infinity where a number overflows fp32."""
    low, high = tensor.float().aminmax()
    return max(-low.item(), high.item())


def shown(value: object) -> str:
    """What a file holds, for a message: in ASCII, without line breaks, and not too long."""
    text = value.encode("unicode_escape").decode("ascii") if isinstance(value, str) else ascii(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
