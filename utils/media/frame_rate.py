"""Choose frames of a video by their presentation times: at another frame rate, or up to a time."""

from bisect import bisect_left
from collections.abc import Sequence

SLOWER_THAN = 0.98  # of the rate: a source that is slower on average does not have enough frames


def frames_at_rate(times: Sequence[float], rate: float) -> list[int]:
    """Indices of the frames nearest to 0, 1 / rate, 2 / rate, ... seconds.

    `times` are seconds, ascending from 0. No frame is chosen twice: where the source is slower than the rate, all its
    frames are chosen.
    """
    if len(times) < 2:
        return list(range(len(times)))
    chosen: list[int] = []
    end = times[-1] * (1 + 0.5 / (len(times) - 1))  # half a frame after the last
    for number in range(int(end * rate) + 1):
        nearest = _nearest(times, number / rate)
        if not chosen or nearest > chosen[-1]:
            chosen.append(nearest)
    return chosen


def frames_within(times: Sequence[float], duration: float) -> int:
    """How many frames a video shows until `duration` seconds, at least one: the frame nearest to that time is the last.

    5 seconds at 16 frames per second are 81 frames, as Wan counts. `times` are seconds, ascending from 0.
    """
    return _nearest(times, duration) + 1


def _nearest(times: Sequence[float], time: float) -> int:
    after = bisect_left(times, time)
    if after == len(times):
        return after - 1
    return after if after == 0 or times[after] - time <= time - times[after - 1] else after - 1
