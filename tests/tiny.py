"""Small models with random weights, and their files in the layout of the released checkpoints."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from nano.text_encoder import write_tokenizer
from utils.adapters.full_model import write_config, write_pth
from utils.media.frames import save_image, write_video
from wan.checkpoints import TRANSFORMER
from wan.configs import FAMILIES, Family
from wan.modules.clip import VisionShape, official_shapes
from wan.modules.model import WanModel, WanShape
from wan.modules.t5 import UMT5Encoder
from wan.modules.vae import WanVAE
from wan.modules.vae2_2 import Wan22VAE

DATA = Path(__file__).parent / "data"
FAMILY = FAMILIES["wan2.1-t2v-1.3B"]  # of a small model, unless another is named
CLIP = FAMILIES["wan2.1-i2v-14B-480P"].clip
TINY_SHAPE = WanShape(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=64, freq_dim=32)
IMAGE_DIM = 80  # of the vision encoder of those that have one
VOCAB_SIZE = 512  # more than the tokenizer has
IMAGE_NORMS = ("img_emb.proj.0.weight", "img_emb.proj.4.weight")
WORDS = (
    "a an the of in on over under and with video image red green blue yellow cat dog bird car house tree river sea sky "
    "man woman child walks runs jumps turns falls moves slowly quickly left right up down night day light camera"
).split()


def draw(name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A parameter by its name: matrices and kernels keep the scale, norm weights are around 1, biases small."""
    drawn = torch.randn(shape, generator=generator)
    if "gamma" in name or "norm" in name or name.endswith(IMAGE_NORMS):
        return 1 + 0.1 * drawn
    if any(kept in name for kept in ("token_embedding", "pos_embedding", "emb_pos")):
        return drawn
    return drawn / math.sqrt(drawn[0].numel()) if drawn.ndim > 1 else 0.1 * drawn


def initialise(module: nn.Module, seed: int) -> None:
    """Draw every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.data.copy_(draw(name, parameter.shape, generator))


def tiny_vae(dim: int = 8, seed: int = 0) -> WanVAE:
    """The Wan 2.1 VAE with `dim` channels at full resolution, frozen, with latents and frames of scale about 1."""
    vae = WanVAE(dim)
    initialise(vae, seed)
    vae.conv1.weight.data.mul_(4)  # the statistics that normalise the latents expect wider ones
    return vae.eval().requires_grad_(False)


def tiny_vae22(dim: int = 8, decoder_dim: int = 8, seed: int = 0) -> Wan22VAE:
    """The Wan 2.2 VAE with so many channels at the highest resolution, frozen, with latents and frames as above."""
    vae = Wan22VAE(dim, decoder_dim)
    initialise(vae, seed)
    vae.conv1.weight.data.mul_(1.5)
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


def tiny_clip(dim: int = IMAGE_DIM, seed: int = 0) -> dict[str, Tensor]:
    """The weights of a vision encoder with three blocks of width `dim`, under their official names."""
    generator = torch.Generator().manual_seed(seed)
    sizes = official_shapes(VisionShape(dim=dim, mlp_dim=2 * dim, num_layers=3, projection_dim=32))
    return {name: draw(name, size, generator) for name, size in sizes.items()}


def write_clip(folder: Path, dim: int = IMAGE_DIM) -> Path:
    """Write a vision encoder as the released file, beside parts of a text encoder that nothing reads; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    unread = {
        "log_scale": torch.tensor(4.6),
        "textual.norm.weight": torch.ones(8),
        "textual.head.0.bias": torch.ones(3),
    }
    torch.save(unread | tiny_clip(dim), folder / CLIP)
    return folder / CLIP


def tiny_shape(family: Family, base: WanShape = TINY_SHAPE) -> WanShape:
    """The widths of a small model of this family: its channels are the family's, as are its image positions."""
    shape = replace(base, in_dim=family.in_dim, out_dim=family.out_dim)
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
    write_weights(folder, model.state_dict(), TRANSFORMER.removesuffix(".safetensors"), shards)


def write_weights(folder: Path, state: Mapping[str, Tensor], stem: str, shards: int = 1) -> None:
    """Write tensors as one file, or as shards with their index."""
    if shards == 1:
        save_file(state, folder / f"{stem}.safetensors")
        return
    names = [f"{stem}-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        save_file({key: tensor for key, tensor in state.items() if weight_map[key] == name}, folder / name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_model(folder: Path, family: Family = FAMILY, shards: int = 1, base: WanShape = TINY_SHAPE) -> Path:
    """Write a whole small Wan in the official layout of its family: transformers, VAE, text encoder, tokenizer, CLIP.

    The transformers have the widths of `base` where the family does not say. Experts differ in their weights.
    """
    for seed, expert in enumerate(family.experts):
        write_transformer(folder / expert.folder, tiny_transformer(tiny_shape(family, base), seed), shards, family)
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
