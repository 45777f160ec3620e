"""The released models as rows of data."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import PurePath

from wan.configs.family import Expert, Family
from wan.configs.grid import Grid
from wan.modules.model import WanShape

__all__ = ["FAMILIES", "Expert", "Family", "Grid", "match_family", "named_family"]

_WAN21_T2V = Family(
    task="t2v",
    shape=WanShape(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16),
    experts=(Expert("transformer", folder=".", sigmas=(0.0, 1.0)),),
    stride=(4, 8, 8),
    vae="Wan2.1_VAE.pth",
    text_encoder="models_t5_umt5-xxl-enc-bf16.pth",
    tokenizer="google/umt5-xxl",
    shift=5.0,
    steps=50,
    guidance=5.0,
    fps=16,
    frames=81,
    size=(832, 480),
    negative_prompt="negative_video.txt",
)

FAMILIES: Mapping[str, Family] = {
    "wan2.1-t2v-1.3B": _WAN21_T2V,
    "wan2.1-t2v-14B": replace(
        _WAN21_T2V, shape=WanShape(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16)
    ),
}


def named_family(name: str) -> Family | None:
    """The row of a release by the last part of its hub name or folder, such as Wan-AI/Wan2.1-T2V-1.3B."""
    last = PurePath(name).name.lower()
    return next((row for released, row in FAMILIES.items() if released.lower() == last), None)


def match_family(task: object, in_dim: object, dim: object, transformers: Collection[str]) -> Family | None:
    """The row of a checkpoint, by what its config.json says and by the names of its transformers; None for no row.

    A width `dim` that was never released belongs to the first row that agrees in the rest: a Wan of any width is used
    as its family is.
    """
    rows = [
        row
        for row in FAMILIES.values()
        if (row.task, row.in_dim) == (task, in_dim) and {expert.name for expert in row.experts} == set(transformers)
    ]
    return next((row for row in rows if row.shape.dim == dim), rows[0] if rows else None)
