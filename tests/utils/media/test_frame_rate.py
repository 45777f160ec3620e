import random

import pytest

from utils.media.frame_rate import frames_at_rate, frames_within


def steady(frames: int, fps: float) -> list[float]:
    return [index / fps for index in range(frames)]


def test_a_clip_at_the_rate_keeps_every_frame():
    for fps in (16, 16.01, 15.99, 24):
        assert frames_at_rate(steady(65, fps), round(fps)) == list(range(65))


@pytest.mark.parametrize(("fps", "rate"), [(24, 16), (30, 16), (23.976, 16), (60, 24), (50, 16), (29.97, 24)])
def test_a_faster_clip_keeps_its_speed(fps, rate):
    times = steady(200, fps)
    chosen = frames_at_rate(times, rate)
    assert chosen == sorted(set(chosen)) and abs(len(chosen) - (times[-1] * rate + 1)) <= 1
    assert all(abs(times[index] - number / rate) <= 0.5 / fps + 1e-9 for number, index in enumerate(chosen))


def test_a_slower_clip_is_used_unchanged():
    assert frames_at_rate(steady(49, 8), 16) == list(range(49))
    assert frames_at_rate(steady(45, 15), 16) == list(range(45))


def test_a_clip_that_is_slower_on_average_keeps_the_speed_of_its_fast_part():
    times = [index / 30 for index in range(60)] + [2 + index for index in range(30)]
    chosen = frames_at_rate(times, 16)
    assert chosen[-30:] == list(range(60, 90)) and 31 <= len(chosen) - 30 <= 33


def test_a_clip_of_changing_rate_is_sampled_by_time_and_no_frame_is_repeated():
    # Two seconds at 60 frames per second, one at 8, two at 60.
    times = [index / 60 for index in range(120)] + [2 + index / 8 for index in range(8)]
    times += [3 + index / 60 for index in range(121)]
    chosen = frames_at_rate(times, 16)
    assert chosen == sorted(set(chosen))
    assert [index for index in chosen if 120 <= index < 128] == list(range(120, 128))
    fast = [times[index] for index in chosen if times[index] < 1.9]
    assert all(abs(later - earlier - 1 / 16) < 1 / 60 for earlier, later in zip(fast, fast[1:], strict=False))


def test_jitter_neither_repeats_nor_drops_frames():
    rng = random.Random(0)
    times = [index / 16 + rng.uniform(-0.02, 0.02) for index in range(80)]
    times = [time - times[0] for time in times]
    assert len(frames_at_rate(times, 16)) >= 78


def test_a_single_frame_is_a_clip():
    assert frames_at_rate([0.0], 16) == [0]


def test_a_duration_ends_at_the_frame_nearest_to_it_and_leaves_at_least_one():
    assert frames_within(steady(200, 16), 5) == 81
    assert frames_within(steady(200, 23.976), 2) == 49
    assert [frames_within(steady(200, 10), seconds) for seconds in (0.14, 0.16, 0.01, 99)] == [2, 3, 1, 200]
    assert frames_within([0.0], 5) == 1
