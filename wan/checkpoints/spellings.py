"""What the tensors of a Wan are called in other layouts: those of diffusers, transformers, ComfyUI and OpenCLIP.

ComfyUI has the official names of the transformer and the VAE, and transformers' names of the text encoder and the
vision encoder, mostly below a prefix. A name that has no official one stays unchanged.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from wan.modules.clip import official_name as official_clip_name
from wan.names import official_name

# Below these a checkpoint file may have a part's tensors; what has another beginning then belongs to other parts.
PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "net.",
    "model.",
    "vae.",
    "text_encoders.umt5xxl.transformer.",
)
Target = tuple[str, int]  # an official name, and which of the tensors that are joined to it, counted from 0


@dataclass(frozen=True)
class Spelling:
    """How the tensors of one part are called in one layout."""

    part: str
    signs: tuple[str, ...]  # tensors that only this part in this layout has; one is enough
    target: Callable[[str], Target] = field(default=lambda name: (name, 0))
    unread: tuple[str, ...] = ()  # beginnings of the names of what may be in the same file, and is not read
    tied: tuple[str, ...] = ()  # names of second copies of other tensors
    flat: tuple[str, ...] = ()  # official names of tensors whose first axes, of size one, are not stored


def find_spelling(names: Collection[str], part: str) -> tuple[Spelling, str] | None:
    """How tensors of these names spell a part, and the prefix before them; None where the part is not among them."""
    found = spellings_of(names)
    return next(((spelling, prefix) for spelling, prefix in found if spelling.part == part), None)


def spellings_of(names: Collection[str]) -> list[tuple[Spelling, str]]:
    """Every part that tensors of these names are of, with the prefix before them."""
    return [
        (spelling, prefix)
        for prefix in PREFIXES
        for spelling in SPELLINGS
        if any(prefix + sign in names for sign in spelling.signs)
    ]


# --------------------------------------------------------------------------------------------------------- transformer


def _transformer(name: str) -> Target:
    stem, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        module = official_name(stem)
        return (f"{module}.{leaf}" if module else name), 0
    return official_name(name) or name, 0


# ---------------------------------------------------------------------------------------------------------------- VAE

_VAE_IN_BLOCK = {
    "norm1.": "residual.0.",
    "conv1.": "residual.2.",
    "norm2.": "residual.3.",
    "conv2.": "residual.6.",
    "conv_shortcut.": "shortcut.",
}
_VAE_BLOCKS = {"quant_conv.": "conv1.", "post_quant_conv.": "conv2."}
for _side in ("encoder", "decoder"):
    _VAE_BLOCKS |= {
        f"{_side}.conv_in.": f"{_side}.conv1.",
        f"{_side}.mid_block.resnets.0.": f"{_side}.middle.0.",
        f"{_side}.mid_block.attentions.0.": f"{_side}.middle.1.",
        f"{_side}.mid_block.resnets.1.": f"{_side}.middle.2.",
        f"{_side}.norm_out.": f"{_side}.head.0.",
        f"{_side}.conv_out.": f"{_side}.head.2.",
    }
# Wan 2.1 counts blocks through all stages. diffusers groups those of the decoder by stage.
_VAE21_BLOCKS = _VAE_BLOCKS | {f"encoder.down_blocks.{block}.": f"encoder.downsamples.{block}." for block in range(11)}
# Wan 2.2 has a group for each stage in both.
_VAE22_BLOCKS = dict(_VAE_BLOCKS)
for _stage in range(4):
    _down, _up = f"encoder.down_blocks.{_stage}", f"decoder.up_blocks.{_stage}"
    _VAE21_BLOCKS |= {f"{_up}.resnets.{n}.": f"decoder.upsamples.{4 * _stage + n}." for n in range(3)}
    _VAE21_BLOCKS[f"{_up}.upsamplers.0."] = f"decoder.upsamples.{4 * _stage + 3}."
    _VAE22_BLOCKS |= {f"{_down}.resnets.{n}.": f"encoder.downsamples.{_stage}.downsamples.{n}." for n in range(2)}
    _VAE22_BLOCKS |= {f"{_up}.resnets.{n}.": f"decoder.upsamples.{_stage}.upsamples.{n}." for n in range(3)}
    _VAE22_BLOCKS[f"{_down}.downsampler."] = f"encoder.downsamples.{_stage}.downsamples.2."
    _VAE22_BLOCKS[f"{_up}.upsampler."] = f"decoder.upsamples.{_stage}.upsamples.3."


def _vae(blocks: dict[str, str]) -> Callable[[str], Target]:
    def target(name: str) -> Target:
        for start, official in blocks.items():
            if name.startswith(start):
                rest = name.removeprefix(start)
                inner = next((inner for inner in _VAE_IN_BLOCK if rest.startswith(inner)), "")
                return official + _VAE_IN_BLOCK.get(inner, "") + rest.removeprefix(inner), 0
        return name, 0

    return target


# -------------------------------------------------------------------------------------------------------- text encoder

_T5_BLOCK = re.compile(r"encoder\.block\.(\d+)\.layer\.(.+)\.weight")
_T5_IN_BLOCK = {
    "0.layer_norm": "norm1",
    **{f"0.SelfAttention.{x}": f"attn.{x}" for x in "qkvo"},
    "0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "1.layer_norm": "norm2",
    "1.DenseReluDense.wi_0": "ffn.gate.0",
    "1.DenseReluDense.wi_1": "ffn.fc1",
    "1.DenseReluDense.wo": "ffn.fc2",
}
_T5_OUTSIDE = {
    "shared.weight": "token_embedding.weight",
    "encoder.embed_tokens.weight": "token_embedding.weight",  # tied: a file has one of them, or both
    "encoder.final_layer_norm.weight": "norm.weight",
}


def _text_encoder(name: str) -> Target:
    if (block := _T5_BLOCK.fullmatch(name)) and block[2] in _T5_IN_BLOCK:
        return f"blocks.{block[1]}.{_T5_IN_BLOCK[block[2]]}.weight", 0
    return _T5_OUTSIDE.get(name, name), 0


# ------------------------------------------------------------------------------------------------------ vision encoder

_QKV = re.compile(r"\.([qkv])_proj\.")
_OPEN_BLOCK = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_OPEN_IN_BLOCK = {
    "ln_1": "norm1",
    "attn.in_proj": "attn.to_qkv",
    "attn.out_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.0",
    "mlp.c_proj": "mlp.2",
}
_OPEN_OUTSIDE = {
    "visual.class_embedding": "visual.cls_embedding",
    "visual.positional_embedding": "visual.pos_embedding",
    "visual.conv1.weight": "visual.patch_embedding.weight",
    "visual.proj": "visual.head",
    **{f"visual.ln_pre.{leaf}": f"visual.pre_norm.{leaf}" for leaf in ("weight", "bias")},
    **{f"visual.ln_post.{leaf}": f"visual.post_norm.{leaf}" for leaf in ("weight", "bias")},
}


def _clip(name: str) -> Target:
    """q, k and v are rows of one tensor in the official layout."""
    letter = _QKV.search(name)
    try:
        return official_clip_name(name.removeprefix("vision_model.")), "qkv".index(letter[1]) if letter else 0
    except KeyError:
        return name, 0


def _open_clip(name: str) -> Target:
    if (block := _OPEN_BLOCK.fullmatch(name)) and block[2] in _OPEN_IN_BLOCK:
        return f"visual.transformer.{block[1]}.{_OPEN_IN_BLOCK[block[2]]}.{block[3]}", 0
    return _OPEN_OUTSIDE.get(name, name), 0


# ----------------------------------------------------------------------------------------------------------- all parts

_TEXT_SIDE = ("textual.", "text_model.", "text_projection.", "visual_projection.", "log_scale", "logit_scale")
_OLD_CLIP = ("vision_model.embeddings.position_ids", "embeddings.position_ids")
_OPEN_TEXT_SIDE = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text.")
_FLAT = ("visual.cls_embedding", "visual.pos_embedding")  # officially (1, 1, width) and (1, tokens, width)
SPELLINGS = (
    Spelling("transformer", ("head.modulation", "head.head.weight", "blocks.0.self_attn.q.weight")),
    Spelling("transformer", ("condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight"), _transformer),
    Spelling("vae", ("decoder.middle.0.residual.0.gamma", "encoder.downsamples.0.residual.0.gamma")),
    Spelling("vae", ("decoder.up_blocks.0.upsamplers.0.resample.1.weight",), _vae(_VAE21_BLOCKS)),
    Spelling("vae", ("decoder.up_blocks.0.upsampler.resample.1.weight",), _vae(_VAE22_BLOCKS)),
    Spelling("text_encoder", ("blocks.0.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight")),
    Spelling(
        "text_encoder",
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.layer_norm.weight"),
        _text_encoder,
        ("decoder.", "lm_head.", "spiece_model"),
        tied=("encoder.embed_tokens.weight",),
    ),
    Spelling("clip", ("visual.cls_embedding", "visual.transformer.0.attn.to_qkv.weight"), unread=_TEXT_SIDE),
    Spelling(
        "clip",
        ("vision_model.embeddings.class_embedding", "embeddings.class_embedding"),
        _clip,
        (*_TEXT_SIDE, *_OLD_CLIP),
        flat=_FLAT,
    ),
    Spelling("clip", ("visual.class_embedding",), _open_clip, (*_TEXT_SIDE, *_OPEN_TEXT_SIDE), flat=_FLAT),
    Spelling("transformer", ("vace_patch_embedding.weight",)),  # of a module that turns a T2V model into VACE
)
