"""The released models as rows of data."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import PurePath

from wan.configs.family import Expert, Family, Traits
from wan.configs.grid import Grid
from wan.modules.model import WanShape

__all__ = ["FAMILIES", "Expert", "Family", "Grid", "Traits", "match_family", "named_family"]

_14B = WanShape(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16)
_5B = WanShape(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)
_14B_VISION = replace(_14B, in_dim=36, image_dim=1280)
_HIGH, _LOW = "high_noise", "low_noise"


def _experts(boundary: float, high_guidance: float, low_guidance: float) -> tuple[Expert, Expert]:
    return (
        Expert(_HIGH, folder="high_noise_model", sigmas=(boundary, 1.0), guidance=high_guidance),
        Expert(_LOW, folder="low_noise_model", sigmas=(0.0, boundary), guidance=low_guidance),
    )


_WAN21_T2V = Family(
    task="t2v",
    shape=WanShape(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16),
    experts=(Expert("transformer", folder=".", sigmas=(0.0, 1.0), guidance=5.0),),
    stride=(4, 8, 8),
    vae="Wan2.1_VAE.pth",
    text_encoder="models_t5_umt5-xxl-enc-bf16.pth",
    tokenizer="google/umt5-xxl",
    shift=5.0,
    steps=50,
    fps=16,
    frames=81,
    size=(832, 480),
    negative_prompt="negative_video.txt",
)
_WAN21_I2V = replace(
    _WAN21_T2V,
    task="i2v",
    shape=_14B_VISION,
    given=(0,),
    given_as="channels",
    clip="models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    steps=40,
    small_shift=3.0,
    negative_prompt="negative_i2v.txt",
)

_ROWS = {
    "wan2.1-t2v-1.3B": _WAN21_T2V,
    "wan2.1-t2v-14B": replace(_WAN21_T2V, shape=_14B),
    "wan2.1-i2v-14B-480P": _WAN21_I2V,
    "wan2.1-i2v-14B-720P": replace(_WAN21_I2V, size=(1280, 720)),
    "wan2.1-flf2v-14B-720P": replace(
        _WAN21_I2V,
        task="flf2v",
        shape=replace(_14B_VISION, image_positions=514),
        given=(0, -1),
        steps=50,
        shift=16.0,
        small_shift=None,
        size=(1280, 720),
        negative_prompt="negative_flf2v.txt",
    ),
    "wan2.2-t2v-A14B": replace(
        _WAN21_T2V,
        shape=_14B,
        experts=_experts(0.875, high_guidance=4.0, low_guidance=3.0),
        steps=40,
        shift=12.0,
        size=(1280, 720),
    ),
    "wan2.2-i2v-A14B": replace(
        _WAN21_T2V,
        task="i2v",
        shape=replace(_14B, in_dim=36),
        experts=_experts(0.9, high_guidance=3.5, low_guidance=3.5),
        given=(0,),
        given_as="channels",
        steps=40,
        size=(1280, 720),
    ),
    "wan2.2-ti2v-5B": replace(
        _WAN21_T2V,
        task="ti2v",
        shape=_5B,
        stride=(4, 16, 16),
        vae="Wan2.2_VAE.pth",
        given=(0,),
        given_as="latents",
        fps=24,
        frames=121,
        size=(1280, 704),
    ),
}
# Models of others with the tensors of a released one, which therefore are not known by their tensors.
_ROWS |= {
    "wan2.1-fun-14B-InP": _ROWS["wan2.1-i2v-14B-480P"],
    "wan2.2-fun-A14B-InP": _ROWS["wan2.2-i2v-A14B"],
}
FAMILIES: Mapping[str, Family] = {name: replace(row, name=name) for name, row in _ROWS.items()}


def named_family(name: str) -> Family | None:
    """The row of a release by the last part of its hub name or folder, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."""
    last = PurePath(name).name.lower().removesuffix("-diffusers")
    return next((row for released, row in FAMILIES.items() if released.lower() == last), None)


def match_family(traits: Traits, transformers: Collection[str], name: str = "") -> Family | None:
    """The row of a checkpoint, by what is known of it and by the names of its transformers; None for no row.

    A width that was never released belongs to the first row that agrees in the rest: a Wan of any width is used as its
    family is. One that was released belongs to its own rows alone. Of rows with the same transformers, the one that the
    model's folder has its `name` from is taken, or else the first. One expert is enough to tell that there are two.
    """
    rows = [row for row in FAMILIES.values() if row.agrees(traits) and row.allows_transformers(transformers)]
    if traits.dim in [row.shape.dim for row in FAMILIES.values()]:
        rows = [row for row in rows if row.shape.dim == traits.dim]
    if not rows:
        return None
    first = rows[0]
    named = named_family(name)
    return named if named in rows and named.shape == first.shape else first
