"""The same model as other libraries build it."""

import json
import re
from pathlib import Path

from diffusers import WanTransformer3DModel

from wan.modules.model import WanShape

KEYMAP = json.loads((Path(__file__).parent / "data" / "keymap_diffusers.json").read_text(encoding="utf-8"))


def diffusers_transformer(shape: WanShape) -> WanTransformer3DModel:
    """diffusers' transformer of this shape, with its own random weights, in eval mode."""
    return WanTransformer3DModel(
        num_attention_heads=shape.num_heads,
        attention_head_dim=shape.dim // shape.num_heads,
        in_channels=shape.in_dim,
        out_channels=shape.out_dim,
        text_dim=shape.text_dim,
        freq_dim=shape.freq_dim,
        ffn_dim=shape.ffn_dim,
        num_layers=shape.num_layers,
        image_dim=shape.image_dim or None,
        added_kv_proj_dim=shape.dim if shape.image_dim else None,
        pos_embed_seq_len=shape.image_positions or None,
    ).eval()


def to_diffusers(name: str) -> str:
    """The diffusers name of an official parameter: the first rule that matches."""
    for pattern, replacement in KEYMAP["dit"]:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise KeyError(name)
