"""What is used of PEFT, which is imported here and nowhere else.

PEFT imports bitsandbytes wherever it is installed, for layers that are not used here. That takes more than a second,
and on some CPUs it writes warnings and, with a package named kernels, loads code from a hub. So PEFT does not find it.
"""

from collections.abc import Sequence

from torch import nn

from utils.common.imports import hidden

with hidden("bitsandbytes"):
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraLayer

__all__ = ["LoraLayer", "LoraLinear", "inject_lora"]


def inject_lora(model: nn.Module, names: Sequence[str], adapter: str, rank: int, alpha: float) -> None:
    """Replaces these linear layers by PEFT's, with a fresh LoRA of this name on each, or adds it to those it has."""
    with hidden("bitsandbytes"):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), model, adapter)
