"""The token grid of the models that the tests train, and limits on it."""

from utils.data.plan import Limits
from wan.configs.grid import Grid

GRID = Grid(frame=4, side=16)


def limits(token_limit: int = 10_000, batch_size: int = 1) -> Limits:
    return Limits(token_limit, batch_size, GRID)
