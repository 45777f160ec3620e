"""What the GPU check measures in its tests: a small model on the CPU."""

from collections.abc import Iterator

import torch

from benchmarks.measure import Row, Sizes
from wan.modules.model import WanShape

CPU = torch.device("cpu")
SHAPE = WanShape(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=24, freq_dim=32)
TINY = Sizes(
    shape=SHAPE,
    reference_layers=2,
    vae_dim=8,
    rank=4,
    text_tokens=10,
    video=(2, 4, 6),
    image=(1, 4, 4),
    long=(3, 4, 6),
    shallow_layers=1,
    caps=(1,),
    clip=(5, 16, 16),
    gemm_side=32,
    warmups=1,
    steps=3,
)


def values(rows: Iterator[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}
