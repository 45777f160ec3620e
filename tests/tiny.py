"""Small models with random weights, and their files in the layout of the released checkpoints."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from nano.text_encoder import write_tokenizer
from utils.adapters.full_model import write_config, write_pth
from utils.media.frames import save_image, write_video
from wan.checkpoints import INDEX, TRANSFORMER
from wan.configs import FAMILIES, Family
from wan.modules.model import WanModel, WanShape
from wan.modules.t5 import UMT5Encoder
from wan.modules.vae import WanVAE

DATA = Path(__file__).parent / "data"
FAMILY = FAMILIES["wan2.1-t2v-1.3B"]  # of a small model, unless another is named
TINY_SHAPE = WanShape(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=64, freq_dim=32)
IMAGE_DIM = 80  # of the vision encoder of those that have one
VOCAB_SIZE = 512  # more than the tokenizer has
IMAGE_NORMS = ("img_emb.proj.0.weight", "img_emb.proj.4.weight")
WORDS = (
    "a an the of in on over under and with video image red green blue yellow cat dog bird car house tree river sea sky "
    "man woman child walks runs jumps turns falls moves slowly quickly left right up down night day light camera"
).split()


def initialise(module: nn.Module, seed: int) -> None:
    """Draw every parameter: matrices and kernels that keep the scale, norm weights around 1, small biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if "gamma" in name or "norm" in name or name.endswith(IMAGE_NORMS):
            draw = 1 + 0.1 * draw
        elif not any(kept in name for kept in ("token_embedding", "pos_embedding", "emb_pos")):
            draw = draw / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1 * draw
        parameter.data.copy_(draw)


def tiny_vae(dim: int = 8, seed: int = 0) -> WanVAE:
    """The Wan 2.1 VAE with `dim` channels at full resolution, frozen, with latents and frames of scale about 1."""
    vae = WanVAE(dim)
    initialise(vae, seed)
    vae.conv1.weight.data.mul_(4)  # the statistics that normalise the latents expect wider ones
    return vae.eval().requires_grad_(False)


def tiny_text_encoder(dim: int = 32, seed: int = 0) -> UMT5Encoder:
    """A frozen UMT5 encoder of two layers for the tokenizer of `write_tokenizer`."""
    encoder = UMT5Encoder(VOCAB_SIZE, dim, dim_attn=dim, dim_ffn=2 * dim, num_heads=4, num_layers=2)
    initialise(encoder, seed)
    return encoder.eval().requires_grad_(False)


def write_vae(folder: Path, vae: nn.Module, family: Family = FAMILY) -> None:
    """Write the weights as the released file: a flat dict."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(vae.state_dict(), folder / family.vae)


def write_text_encoder(folder: Path, encoder: UMT5Encoder) -> None:
    """Write the weights as the released file, in bf16, and the tokenizer."""
    write_tokenizer(folder / FAMILY.tokenizer, WORDS)
    write_pth(folder / FAMILY.text_encoder, encoder)


def tiny_vae22() -> WanVAE:
    """Stands for the Wan 2.2 VAE until its module is here."""
    return tiny_vae()


def write_clip(folder: Path, dim: int) -> None:
    """Stands for the vision encoder until its module is here."""
    torch.save({"visual.pre_norm.weight": torch.ones(dim)}, folder / FAMILIES["wan2.1-i2v-14B-480P"].clip)


def tiny_shape(family: Family) -> WanShape:
    """The widths of a small model of this family: its channels are the family's, as are its image positions."""
    shape = replace(TINY_SHAPE, in_dim=family.in_dim, out_dim=family.out_dim)
    positions = family.shape.image_positions
    return replace(shape, image_dim=IMAGE_DIM, image_positions=positions) if family.clip else shape


def tiny_transformer(shape: WanShape = TINY_SHAPE, seed: int = 0) -> WanModel:
    """A frozen transformer whose velocity has a scale of about 1."""
    model = WanModel(shape)
    initialise(model, seed)
    return model.eval().requires_grad_(False)


def write_transformer(folder: Path, model: WanModel, shards: int = 1, family: Family = FAMILY) -> None:
    """Write config.json and the weights as one file, or as shards with their index."""
    write_config(folder, model.shape, family)
    state, stem = model.state_dict(), TRANSFORMER.removesuffix(".safetensors")
    if shards == 1:
        save_file(state, folder / TRANSFORMER)
        return
    names = [f"{stem}-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        save_file({key: tensor for key, tensor in state.items() if weight_map[key] == name}, folder / name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def write_model(folder: Path, family: Family = FAMILY, shards: int = 1) -> Path:
    """Write a whole small Wan in the official layout of its family: transformers, VAE, text encoder, tokenizer, CLIP.

    Experts differ in their weights.
    """
    for seed, expert in enumerate(family.experts):
        write_transformer(folder / expert.folder, tiny_transformer(tiny_shape(family), seed), shards, family)
    write_vae(folder, tiny_vae() if family.vae == FAMILY.vae else tiny_vae22(), family)
    write_text_encoder(folder, tiny_text_encoder(TINY_SHAPE.text_dim))
    if family.clip:
        write_clip(folder, IMAGE_DIM)
    return folder


def write_clips(folder: Path) -> Path:
    """Write a dataset: four videos and an image in train/, a video in val/, each with a caption of its own."""
    for index, name in enumerate(("train/a.mp4", "train/b.mp4", "train/c.MP4", "train/d.webm.mp4", "val/e.mp4")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        ramp = torch.linspace(0, 255, 160)
        frames = torch.stack([torch.roll(ramp, 7 * frame * (index + 1)).expand(3, 96, 160) for frame in range(30)])
        write_video(folder / name, frames.to(torch.uint8), 16)
        (folder / name).with_suffix(".txt").write_text(f"a ramp that runs {index + 1} times as fast", encoding="utf-8")
    save_image(folder / "train" / "f.png", Image.new("RGB", (120, 120), "teal"))
    (folder / "train" / "f.txt").write_text("a teal square", encoding="utf-8")
    return folder
