"""What a LoRA file says, in one form for every layout.

A pair of matrices changes the weight of one module by `alpha / rank * up @ down`. Modules have their official Wan names
("blocks.0.self_attn.q"). `lora_reader` brings every known layout into this form, and `lora_writer` writes it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file says, under official Wan names.

    `diffs` are added in full: "blocks.0.norm3.diff" to the weight, "blocks.0.norm3.diff_b" to the bias.
    `input_shapes` gives the shape to which a weight is padded with zeros before its pair is added: a control LoRA
    widens "patch_embedding" this way. `key_format` describes for people how the keys of the file were named.
    """

    pairs: dict[str, LoraPair]
    diffs: dict[str, Tensor] = field(default_factory=dict)
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    key_format: str = ""


def delta(pair: LoraPair, weight: float = 1.0) -> Tensor:
    """`weight * scale * up @ down` in fp32, shaped (out, in, ...) like the weight it is added to."""
    product = pair.up.float().flatten(1) @ pair.down.float().flatten(1)
    return (product * (weight * pair.scale)).reshape(pair.weight_shape)


def largest(tensor: Tensor) -> float:
    """The largest magnitude in fp32: NaN where the tensor holds one, infinity where a number overflows fp32."""
    low, high = tensor.float().aminmax()
    return max(-low.item(), high.item())


def shown(value: object) -> str:
    """What a file holds, for a message: in ASCII, without line breaks, and not too long."""
    text = value.encode("unicode_escape").decode("ascii") if isinstance(value, str) else ascii(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
