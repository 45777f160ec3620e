"""A whole Wan written in the layout of the released checkpoints, which every program that loads those reads.

A model folder holds config.json and the transformer's safetensors file, and the VAE and the text encoder as .pth files.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.common.files import replacing
from utils.common.tensor_files import write_tensors
from wan.checkpoints import TRANSFORMER
from wan.configs import Family
from wan.modules.model import WanModel, WanShape, is_fp32

CONFIG_FIELDS = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")


def write_config(folder: Path, shape: WanShape, family: Family) -> None:
    """Writes config.json with the fields of the released one."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": family.task}
    config |= {name: getattr(shape, name) for name in CONFIG_FIELDS}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_transformer(folder: Path, model: WanModel, family: Family) -> None:
    """Writes config.json and one file of bf16 weights. Parameters that compute in fp32 stay fp32.

    Raises TensorFileError if the weights cannot be written.
    """
    write_config(folder, model.shape, family)
    state = {
        name: tensor.to(torch.float32 if is_fp32(name) else torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }
    write_tensors(folder / TRANSFORMER, state)


def write_pth(path: Path, module: nn.Module) -> None:
    """Writes a flat dictionary of bf16 tensors, as the VAE and the text encoder are released. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {
        name: tensor.to("cpu", torch.bfloat16).clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }
    # Given a path instead of an open file, torch.save stores its name in the archive: equal weights would differ.
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        torch.save(state, file)


def write_vae(folder: Path, vae: nn.Module, family: Family) -> None:
    """Writes the VAE under its released name, as `write_pth` does."""
    write_pth(folder / family.vae, vae)


def write_text_encoder(folder: Path, encoder: nn.Module, family: Family) -> None:
    """Writes the text encoder under its released name, as `write_pth` does."""
    write_pth(folder / family.text_encoder, encoder)
