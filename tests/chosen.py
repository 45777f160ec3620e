"""Small LoRA files to choose from, for a small model with one transformer or two experts."""

from pathlib import Path

import torch

from tests.tiny import TINY_SHAPE
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from wan.configs import FAMILIES

A14B = FAMILIES["wan2.2-t2v-A14B"]
HIGH, LOW = "high_noise", "low_noise"


def make_lora(value: float, layer: str = "blocks.0.self_attn.q") -> LoraFile:
    """A LoRA of one layer whose down matrix has this value everywhere."""
    width = TINY_SHAPE.dim
    return LoraFile({layer: LoraPair(torch.full((2, width), value), torch.ones(width, 2), 2.0)})


def write_loras(folder: Path) -> Path:
    """A pair of LoRAs, one for any expert, and one of a deeper model; returns the folder."""
    write_lora(folder / "fox_high_noise.safetensors", make_lora(0.01))
    write_lora(folder / "fox_low_noise.safetensors", make_lora(0.02))
    write_lora(folder / "fast.safetensors", make_lora(0.03, "blocks.1.self_attn.v"))
    write_lora(folder / "deep_high_noise.safetensors", make_lora(0.01, "blocks.9.self_attn.q"))
    return folder
