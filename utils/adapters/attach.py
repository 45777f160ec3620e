"""Which adapter is trained: its options, how it gets on the model, and what its file says of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from utils.adapters.lora import add_lora, fuse_lora, load_lora, select_modules, widen_patch_embedding
from utils.adapters.lora_reader import read_lora
from utils.common.options import option
from utils.media.controls import CONTROL_TYPES
from wan.modules.model import WanModel


@dataclass(frozen=True)
class Lora:
    """LoRA"""

    lora_rank: int = option(16, "rank of the matrices", minimum=1)
    lora_alpha: float | None = option(None, "strength alpha / rank of the adapter (default: the rank)", minimum=0.001)
    lora_target: tuple[str, ...] = option(("attn",), "attn, all-linear, or patterns like self_attn.q ffn.*")
    lora_blocks: str | None = option(None, "blocks to adapt: 1, or 0,2, or 4-9 (default: all)")
    init_lora: Path | None = option(None, "LoRA file to start from, of the same rank, alpha and targets")
    fuse_lora: Path | None = option(None, "LoRA file to add to the base model before training")
    fuse_lora_weight: float = option(1.0, "strength at which --fuse_lora is added", requires="fuse_lora")


@dataclass(frozen=True)
class Control:
    """control LoRA"""

    control_lora: bool = option(False, "train a LoRA that follows a control video through extra input channels")
    control_type: str = option("tile", "the control made from each clip", choices=CONTROL_TYPES)
    control_inject_noise: float = option(
        0.0, "most noise added to the control's latents, drawn per sample", minimum=0, requires="control_lora"
    )


@dataclass(frozen=True)
class AdapterOptions(Lora, Control):
    """Everything that says which adapter it is."""

    @property
    def alpha(self) -> float:
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def generated_control(self) -> str | None:
        """The control that is made from clips, for a control LoRA."""
        return self.control_type if self.control_lora else None


def attach_adapter(opts: AdapterOptions, model: WanModel) -> dict[str, nn.Parameter]:
    """Puts the adapter on a frozen transformer and returns its parameters by name.

    The order matters: a fused LoRA is part of the base; control widens the input before the adapter goes on it.
    Raises UserError for names that are not there, and LoRA files that do not fit.
    """
    names = select_modules(model, opts.lora_target, opts.lora_blocks)
    if opts.fuse_lora:
        fuse_lora(model, read_lora(opts.fuse_lora), opts.fuse_lora_weight)
    if opts.control_lora:
        widen_patch_embedding(model, 2 * model.shape.in_dim)
        names.append("patch_embedding")
    add_lora(model, names, opts.lora_rank, opts.alpha)
    if opts.init_lora:
        load_lora(model, read_lora(opts.init_lora))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def summary(opts: AdapterOptions, adapter: Mapping[str, nn.Parameter]) -> str:
    """The adapter's size, for people."""
    count = sum(parameter.numel() for parameter in adapter.values())
    return f"{count:,} trainable parameters: rank {opts.lora_rank}, alpha {opts.alpha:g}"


def metadata(opts: AdapterOptions, **facts: object) -> dict[str, str]:
    """What a LoRA file says of itself: its adapter, and these facts."""
    adapter = {"rank": opts.lora_rank, "alpha": f"{opts.alpha:g}", "targets": " ".join(opts.lora_target)}
    return {name: str(value) for name, value in (adapter | facts).items()}
