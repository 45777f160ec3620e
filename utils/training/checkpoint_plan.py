"""Which blocks keep how much for the backward pass: as much as the device has room for."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby

from utils.training.offload import Parking

# From what keeps least to what keeps most. A byte saves less time with each step upwards.
LADDER = ("offload", "full", "selective", "none")
AUTO = "auto"
KEEPING = {
    "offload": "nothing on the device",
    "full": "the input",
    "selective": "the input and the attention",
    "none": "everything",
}


@dataclass(frozen=True)
class Room:
    """What was measured with a batch of so many tokens, all of whose block inputs waited in main memory."""

    free: int  # bytes for activations: what the device has beside weights, gradients and the optimizer's state
    working: int  # bytes of activations at the peak
    tokens: int
    costs: Mapping[str, float]  # bytes that a block keeps for each token, by strategy

    @classmethod
    def parse(cls, text: str) -> "Room":
        """The room that `str` has written. Raises ValueError for any other text."""
        try:
            free, working, tokens, costs = (json.loads(text)[spec.name] for spec in fields(cls))
            room = cls(int(free), int(working), int(tokens), {name: float(costs[name]) for name in LADDER})
        except (TypeError, LookupError, OverflowError, RecursionError) as error:
            raise ValueError(f"{error}") from None
        if room.tokens < 1 or room.working < 0 or not all(0 <= cost < math.inf for cost in room.costs.values()):
            raise ValueError("numbers that were never measured")
        return room

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    def choose(self, tokens: int, num_blocks: int) -> list[str]:
        """A strategy for each block, for a batch of so many tokens. The first blocks keep most."""
        left = self.free - self.working * tokens / self.tokens
        chosen = [LADDER[0]] * num_blocks
        for lower, upper in zip(LADDER, LADDER[1:], strict=False):
            price = (self.costs[upper] - self.costs[lower]) * tokens
            count = min(num_blocks, max(0, int(left / price))) if price > 0 else num_blocks
            chosen[:count] = [upper] * count
            if count < num_blocks:
                break
            left -= count * price
        return chosen


class CheckpointPlan:
    """The strategy of each block: one for all, or with AUTO what there is room for, which depends on a batch's tokens.

    Before the room is measured, AUTO keeps least.
    """

    def __init__(self, strategy: str, num_blocks: int) -> None:
        self.strategy, self.num_blocks = strategy, num_blocks
        self.parking = Parking()  # for the inputs of blocks that keep nothing on the device
        self._room: Room | None = None
        self._chosen: dict[int, list[str]] = {}

    @property
    def room(self) -> Room | None:
        """What it was settled by."""
        return self._room

    @property
    def is_open(self) -> bool:
        """Whether it waits for the room to be measured."""
        return self.strategy == AUTO and self._room is None

    def settle(self, room: Room) -> None:
        """Decides by the room that was measured."""
        self._room = room
        self._chosen.clear()
        if LADDER[0] not in self.strategies(room.tokens):
            self.parking.release()

    def settle_for_less(self, share: float) -> bool:
        """Decides again, for so much less room that the measured batch keeps less; False where it cannot.

        Each try leaves away this share of the room.
        """
        assert self._room is not None
        tokens, before = self._room.tokens, self.strategies(self._room.tokens)
        while self.strategies(tokens) == before:
            left = self._room.free - self._room.working
            if left <= 0:
                return False
            self.settle(replace(self._room, free=self._room.free - max(1, int(left * share))))
        return True

    def strategies(self, tokens: int) -> list[str]:
        """That of each block, for a batch of so many tokens."""
        if tokens not in self._chosen:
            self._chosen[tokens] = self._choose(tokens)
        return self._chosen[tokens]

    def _choose(self, tokens: int) -> list[str]:
        if self.strategy != AUTO:
            return [self.strategy] * self.num_blocks
        return [LADDER[0]] * self.num_blocks if self._room is None else self._room.choose(tokens, self.num_blocks)

    def describe(self, tokens: int) -> str:
        """A sentence about a batch of so many tokens."""
        runs = [(strategy, len(list(group))) for strategy, group in groupby(self.strategies(tokens))]
        if len(runs) == 1:
            return f"for the backward pass of {tokens:,} tokens all blocks keep {KEEPING[runs[0][0]]}"
        parts, first = [], 0
        for strategy, count in runs:
            blocks = f"blocks {first} to {first + count - 1} keep" if count > 1 else f"block {first} keeps"
            parts.append(f"{blocks} {KEEPING[strategy]}")
            first += count
        return f"for the backward pass of {tokens:,} tokens {', '.join(parts)}"
