"""Small models in the layouts of others: folders as diffusers writes them, and single files as there are for ComfyUI.

What tensors are called follows the maps in data/, which were checked against diffusers and transformers at full size.
Nothing here uses the code that reads these layouts.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import CLIP, DATA, FAMILY, write_weights
from wan.checkpoints import TRANSFORMER
from wan.configs import Family

State = dict[str, Tensor]
Store = Callable[[str, Tensor], "Stored"]
_MAPS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in DATA.glob("keymap_*.json")}
_BF16, _FP8 = torch.bfloat16, torch.float8_e4m3fn
_MODEL, _DIFFUSION = "model", "diffusion_pytorch_model"  # how the weights are called in folders
VERSIONS = {"_diffusers_version": "0.35.0"}


# ------------------------------------------------------------------------------------------------------------- names


def _renamed(name: str, keymap: Mapping[str, Any]) -> str:
    """The first structural rule that matches is applied, and then all of the others in their order."""
    for pattern, replacement in keymap["rules_structural"]:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    for pattern, replacement in keymap.get("then_all", ()):
        name = re.sub(pattern, replacement, name)
    return name


def to_diffusers(name: str) -> str:
    """The name in WanTransformer3DModel of an official parameter: by the first rule that matches."""
    for pattern, replacement in _MAPS["keymap_diffusers"]["dit"]:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise KeyError(name)


def vae21_to_diffusers(name: str) -> str:
    """The name in AutoencoderKLWan of a parameter of WanVAE."""
    return _renamed(name, _MAPS["keymap_vae21_diffusers"])


def vae22_to_diffusers(name: str) -> str:
    """The name in AutoencoderKLWan of a parameter of Wan22VAE."""
    return _renamed(name, _MAPS["keymap_vae22_diffusers"])


def to_umt5(name: str) -> str:
    """The name in transformers' UMT5EncoderModel of an official parameter."""
    return _renamed(name, _MAPS["keymap_umt5_transformers"])


def to_clip_vision(official: State) -> State:
    """The tensors of a vision encoder as a file of transformers' CLIPVisionModelWithProjection has them."""
    keymap, state = _MAPS["keymap_clip_transformers"], State()
    for name, tensor in official.items():
        if block := re.match(keymap["split_qkv"], name):
            rows = zip("qkv", tensor.chunk(3), strict=True)
            attention = f"encoder.layers.{block[1]}.self_attn"
            state |= {f"vision_model.{attention}.{x}_proj.{block[2]}": part.clone() for x, part in rows}
        elif name == "visual.head":
            state["visual_projection.weight"] = tensor.T.contiguous()
        else:
            state[f"vision_model.{_renamed(name, keymap)}"] = tensor
    state["vision_model.embeddings.class_embedding"] = state["vision_model.embeddings.class_embedding"].flatten()
    positions = state.pop("vision_model.embeddings.position_embedding.weight")
    return state | {"vision_model.embeddings.position_embedding.weight": positions[0].clone()}


# ------------------------------------------------------------------------------------------------------------- a model


@dataclass(frozen=True)
class Model:
    """The tensors of a model by their official names, read from its folder in the official layout."""

    folder: Path
    family: Family
    heads: int
    transformers: Mapping[str, State]  # from high noise to low
    vae: State
    text_encoder: State
    clip: State | None

    @property
    def tokenizer(self) -> Path:
        return self.folder / self.family.tokenizer


def read_model(folder: Path, family: Family) -> Model:
    """What `write_model` wrote."""
    places = {expert.name: folder / expert.folder for expert in family.experts}
    config = json.loads((next(iter(places.values())) / "config.json").read_text())
    transformers = {name: load_file(place / TRANSFORMER) for name, place in places.items()}
    vae, text_encoder = (torch.load(folder / name) for name in (family.vae, family.text_encoder))
    visual = None
    if family.clip:
        visual = {name: each for name, each in torch.load(folder / CLIP).items() if name.startswith("visual.")}
    return Model(folder, family, config["num_heads"], transformers, vae, text_encoder, visual)


# ----------------------------------------------------------------------------------------------------------- diffusers


def write_diffusers(folder: Path, model: Model, shards: int = 1) -> Path:
    """Write the model as diffusers' pipelines are written, its weights as one file or as shards."""
    is_22, states = model.family.vae != FAMILY.vae, list(model.transformers.values())
    vae_name = vae22_to_diffusers if is_22 else vae21_to_diffusers
    text_encoder = {to_umt5(name): tensor for name, tensor in model.text_encoder.items()}
    vae = {vae_name(name): tensor for name, tensor in model.vae.items()}
    written = {
        "text_encoder": (_MODEL, text_encoder, umt5_config(model.text_encoder)),
        "vae": (_DIFFUSION, vae, vae22_config(model.vae) if is_22 else vae21_config(model.vae)),
    }
    for name, state in zip(("transformer", "transformer_2"), states, strict=False):
        spelled = {to_diffusers(official): tensor for official, tensor in state.items()}
        written[name] = _DIFFUSION, spelled, transformer_config(state, model.heads)
    if model.clip:
        written["image_encoder"] = _MODEL, to_clip_vision(model.clip), clip_config(model.clip)
    for name, (stem, state, config) in written.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        write_weights(folder / name, state, stem, shards)
    shutil.copytree(model.tokenizer, folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(model_index(model.family), indent=2), encoding="utf-8")
    return folder


def model_index(family: Family) -> dict[str, Any]:
    """What a pipeline consists of."""
    two, is_latents = len(family.experts) > 1, family.given_as == "latents"
    transformer = ["diffusers", "WanTransformer3DModel"]
    index = VERSIONS | {
        "_class_name": "WanImageToVideoPipeline" if family.given_as == "channels" else "WanPipeline",
        "boundary_ratio": family.boundaries[0] if two else None,
        "expand_timesteps": is_latents,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": transformer,
        "transformer_2": transformer if two else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if family.given_as == "channels":
        names = {"image_encoder": "CLIPVisionModelWithProjection", "image_processor": "CLIPImageProcessor"}
        index |= {name: ["transformers", class_] if family.clip else [None, None] for name, class_ in names.items()}
    return index


def transformer_config(state: State, heads: int) -> dict[str, Any]:
    """config.json of WanTransformer3DModel, which does not know the text length."""
    dim, in_channels, *patch_size = state["patch_embedding.weight"].shape
    image = state.get("img_emb.proj.1.weight")
    positions = state.get("img_emb.emb_pos")
    return VERSIONS | {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None if image is None else dim,
        "attention_head_dim": dim // heads,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "ffn_dim": len(state["blocks.0.ffn.0.weight"]),
        "freq_dim": state["time_embedding.0.weight"].shape[1],
        "image_dim": None if image is None else image.shape[1],
        "in_channels": in_channels,
        "num_attention_heads": heads,
        "num_layers": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "out_channels": len(state["head.head.weight"]) // 4,
        "patch_size": patch_size,
        "pos_embed_seq_len": None if positions is None else positions.shape[1],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": state["text_embedding.0.weight"].shape[1],
    }


def vae21_config(state: State) -> dict[str, Any]:
    """config.json of AutoencoderKLWan, as it was before there was a second VAE; statistics are left out."""
    return VERSIONS | {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": len(state["encoder.conv1.weight"]),
        "dim_mult": [1, 2, 4, 4],
        "dropout": 0.0,
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "z_dim": len(state["conv2.weight"]),
    }


def vae22_config(state: State) -> dict[str, Any]:
    """config.json of the AutoencoderKLWan of Wan 2.2."""
    return vae21_config(state) | {
        "decoder_base_dim": len(state["decoder.head.0.gamma"]),
        "in_channels": 12,
        "is_residual": True,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
    }


def umt5_config(state: State) -> dict[str, Any]:
    """The widths in config.json of UMT5EncoderModel."""
    vocab_size, dim = state["token_embedding.weight"].shape
    buckets, heads = state["blocks.0.pos_embedding.embedding.weight"].shape
    return {
        "architectures": ["UMT5EncoderModel"],
        "d_ff": len(state["blocks.0.ffn.fc1.weight"]),
        "d_kv": len(state["blocks.0.attn.q.weight"]) // heads,
        "d_model": dim,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "model_type": "umt5",
        "num_heads": heads,
        "num_layers": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": buckets,
        "vocab_size": vocab_size,
    }


def clip_config(state: State) -> dict[str, Any]:
    """The widths in config.json of CLIPVisionModelWithProjection."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": len(state["visual.patch_embedding.weight"]),
        "image_size": 224,
        "intermediate_size": len(state["visual.transformer.0.mlp.0.weight"]),
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        "num_attention_heads": max(1, len(state["visual.patch_embedding.weight"]) // 80),
        "num_hidden_layers": len({name.split(".")[2] for name in state if name.startswith("visual.transformer.")}),
        "patch_size": 14,
        "projection_dim": state["visual.head"].shape[1],
    }


# -------------------------------------------------------------------------------------------------------- single files


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it."""

    weight: Tensor
    scale: Tensor | None = None

    @property
    def is_fp8(self) -> bool:
        return self.weight.dtype.itemsize == 1

    def values(self, dtype: torch.dtype) -> Tensor:
        """What a model that computes in `dtype` makes of it: weight.to(dtype) * scale.to(dtype)."""
        weight = self.weight.to(dtype)
        if self.scale is None:
            return weight
        scale = self.scale.to(dtype)
        if scale.ndim < 3:
            return weight * scale
        return (weight.unflatten(1, (scale.shape[1], -1)) * scale).flatten(1)


@dataclass(frozen=True)
class Kind:
    """How a single file has a transformer."""

    store: Store
    prefix: str = ""  # of all names
    scales: str = ""  # how scales are stated: "old", "new" (a tensor for each layer) or "header" (in the metadata)


def cast(dtype: torch.dtype) -> Store:
    """Everything in one dtype."""
    return lambda name, tensor: Stored(tensor.to(dtype))


def scaled(
    chosen: str, others: torch.dtype, one_for: str = "layer", scale_shape: tuple[int, ...] = (), fp8: torch.dtype = _FP8
) -> Store:
    """The matrices whose names match `chosen` in fp8, with one scale for a layer, its rows or blocks of 64 columns."""

    def store(name: str, tensor: Tensor) -> Stored:
        if not re.match(chosen, name) or tensor.ndim != 2:
            return Stored(tensor.to(others))
        values = tensor.float()
        blocks = values.unflatten(1, (-1, 64)) if one_for == "block" else values
        largest = blocks.abs().max() if one_for == "layer" else blocks.abs().amax(-1, keepdim=True)
        scale = largest / torch.finfo(fp8).max
        quantised = (blocks / scale).reshape(values.shape).to(fp8)
        return Stored(quantised, scale.view(scale_shape) if one_for == "layer" else scale)

    return store


_BLOCKS, _WITH_TEXT = r"blocks\.", r"blocks\.|text_embedding\.|time_"
KINDS = {
    "fp32": Kind(cast(torch.float32)),
    "bf16": Kind(cast(_BF16)),
    "fp16": Kind(cast(torch.float16), "model.diffusion_model."),
    "fp8": Kind(cast(_FP8), "diffusion_model."),
    "fp8-e5m2": Kind(cast(torch.float8_e5m2)),
    "fp8-scaled-old": Kind(scaled(_WITH_TEXT, _BF16), "model.diffusion_model.", "old"),
    "fp8-scaled-new": Kind(scaled(_BLOCKS, torch.float16, scale_shape=(1,)), "diffusion_model.", "new"),
    "fp8-scaled-header": Kind(scaled(_BLOCKS, _BF16), "", "header"),
    "fp8-scaled-rows": Kind(scaled(_WITH_TEXT, torch.float32, "row"), "", "old"),
    "fp8-scaled-blocks": Kind(scaled(_BLOCKS, _BF16, "block"), "model.diffusion_model.", "old"),
}


def stored(state: State, store: Store) -> dict[str, Stored]:
    """What a file has of the tensors of one part, by their official names."""
    return {name: store(name, tensor) for name, tensor in state.items()}


def _text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def write_single(
    path: Path,
    tensors: Mapping[str, Stored],
    prefix: str = "",
    scales: str = "",
    name_of: Callable[[str], str] = str,
    more: State | None = None,
) -> Path:
    """Write a file as there are for ComfyUI, with scales as its older or its newer versions state them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state, layers = dict(more or {}), {}
    for name, each in tensors.items():
        spelled = prefix + name_of(name)
        state[spelled] = each.weight.contiguous()
        if each.scale is None:
            continue
        layer = spelled.removesuffix(".weight")
        layers[layer] = {"format": f"float8_{'e5m2' if each.weight.dtype == torch.float8_e5m2 else 'e4m3fn'}"}
        state[f"{layer}.{'scale_weight' if scales == 'old' else 'weight_scale'}"] = each.scale
        if scales == "old":
            state[f"{layer}.scale_input"] = torch.tensor(1.0)
        if scales == "new":
            state[f"{layer}.comfy_quant"] = _text(json.dumps(layers[layer]))
    if scales == "old":
        state[f"{prefix}scaled_fp8"] = torch.zeros(2).to(_FP8)
    header = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(state, path, {"_quantization_metadata": header} if scales == "header" else None)
    return path


def write_transformers(folder: Path, model: Model, kind: Kind) -> tuple[dict[str, Path], dict[str, dict[str, Stored]]]:
    """Write the transformers in single files of this kind; their places and what is stored, by the experts' names."""
    tensors = {name: stored(state, kind.store) for name, state in model.transformers.items()}
    places = {
        name: write_single(folder / f"wan_{name}.safetensors", each, kind.prefix, kind.scales)
        for name, each in tensors.items()
    }
    return places, tensors


def write_parts(folder: Path, model: Model) -> dict[str, Path]:
    """Write all but the transformers in the layout of ComfyUI's files; their places by the names of the parts."""
    bf16, fp16 = cast(_BF16), cast(torch.float16)
    spiece = {"spiece_model": torch.arange(200, dtype=torch.uint8)}
    places = {
        "vae": write_single(folder / "vae/wan_vae.safetensors", stored(model.vae, bf16)),
        "text_encoder": write_single(
            folder / "text_encoders/umt5.safetensors", stored(model.text_encoder, bf16), name_of=to_umt5, more=spiece
        ),
        "tokenizer": Path(shutil.copytree(model.tokenizer, folder / "tokenizer")),
    }
    if model.clip:
        clip = stored(to_clip_vision(model.clip), fp16)
        places["clip"] = write_single(folder / "clip_vision/clip_vision_h.safetensors", clip)
    return places
