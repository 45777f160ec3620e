"""Whether frames that are not declared interlaced are of two fields each, by their pixels. Imports no torch.

In such a frame what moves has another place in every other row: rows differ from both of their neighbours, which are
alike. Fine stripes look so too, but not only where something moves.

Letters in shapes: `H` height, `W` width.
"""

import numpy as np
from av.video.frame import VideoFrame

EVERY_COLUMN = 3
MOVES, DIFFERS, ALIKE = 16, 16, 10  # of 255: between frames, between rows, between a row's neighbours
LEAST_MOTION = 0.01  # share of the pixels; with less of it a pair of frames says nothing
COMBED = 0.14  # share of what moves; measured: 0.22 to 0.28 in frames of two fields, up to 0.08 in others
STRIPED = 4  # times that of what stands still: else it is a pattern
FORMATS = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "gray", "nv12"})


class Combing:
    """Looks at pairs of frames that follow each other, at intervals that grow: a long video costs little more."""

    def __init__(self) -> None:
        self._number, self._next, self._step = 0, 4, 6
        self._before: np.ndarray | None = None
        self._votes: list[bool] = []

    def add(self, frame: VideoFrame) -> None:
        """The next frame, in the order in which they are shown."""
        if self._number in (self._next, self._next + 1) and frame.format.name in FORMATS:
            now = _luma(frame)
            if self._before is not None and self._before.shape == now.shape:
                self._vote(self._before, now)
            self._before = now if self._number == self._next else None
        if self._number > self._next:
            self._next, self._step = self._number + self._step, self._step + 3
        self._number += 1

    def _vote(self, before: np.ndarray, now: np.ndarray) -> None:
        moving = np.abs(now - before)[1:-1] > MOVES
        if moving.mean() >= LEAST_MOTION:
            combed, still = _combed(now), ~moving
            of_moving, of_still = combed[moving].mean(), combed[still].mean() if still.any() else 0.0
            self._votes.append(bool(of_moving > max(COMBED, STRIPED * of_still)))

    @property
    def is_combed(self) -> bool:
        """Whether most pairs in which something moved were combed."""
        return sum(self._votes) * 2 > len(self._votes)


def _luma(frame: VideoFrame) -> np.ndarray:
    """Brightness, int16 (H, W), of every few columns."""
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : frame.width : EVERY_COLUMN].astype(np.int16)


def _combed(luma: np.ndarray) -> np.ndarray:
    """Which pixels differ from those above and below in the same direction, while these are alike: (H - 2, W)."""
    up, down = luma[1:-1] - luma[:-2], luma[1:-1] - luma[2:]
    same_way = ((up > DIFFERS) & (down > DIFFERS)) | ((up < -DIFFERS) & (down < -DIFFERS))
    return same_way & (np.abs(up - down) < ALIKE)
