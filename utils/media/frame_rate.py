"""Which frames of a video to show at another rate, by the times at which they are shown."""

from bisect import bisect_left
from collections.abc import Sequence

SLOWER_THAN = 0.98  # of the rate: a source below it, on average, has fewer frames than the rate asks for


def frames_at_rate(times: Sequence[float], rate: float) -> list[int]:
    """The frames nearest to 0, 1 / rate, 2 / rate, ... seconds, by ascending `times` in seconds, the first at 0.

    No frame comes twice: where a source is slower than the rate, it gives all its frames, as they are.
    """
    if len(times) < 2:
        return list(range(len(times)))
    chosen: list[int] = []
    end = times[-1] * (1 + 0.5 / (len(times) - 1))  # no later than half a frame after the last
    for number in range(int(end * rate) + 1):
        nearest = _nearest(times, number / rate)
        if not chosen or nearest > chosen[-1]:
            chosen.append(nearest)
    return chosen


def _nearest(times: Sequence[float], moment: float) -> int:
    after = bisect_left(times, moment)
    if after == len(times):
        return after - 1
    return after if after == 0 or times[after] - moment <= moment - times[after - 1] else after - 1
