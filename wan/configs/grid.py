"""What one token of the transformer covers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """What one token covers: `frame` frames (the first latent frame covers one), `side` x `side` pixels.

    The product of the VAE's stride and the transformer's patch: (4, 8, 8) times (1, 2, 2) in Wan 2.1.
    """

    frame: int
    side: int
