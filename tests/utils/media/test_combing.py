"""Interlaced frames are known by what moves in them, and nothing else is taken for them."""

from collections.abc import Callable

import av
import numpy as np
import pytest

from utils.media.combing import Combing

HEIGHT, WIDTH = 96, 128
X, Y = np.arange(WIDTH), np.arange(HEIGHT)[:, None]


def disc(time: float) -> np.ndarray:
    """A bright disc that moves to the right, on grey: (H, W)."""
    return np.where((X - 30 - 5 * time) ** 2 + (Y - 48) ** 2 < 400, 220, 60).astype(np.uint8)


def woven(picture: Callable[[float], np.ndarray], number: int) -> np.ndarray:
    """A frame of two fields: every other row is of half a frame later."""
    frame = picture(number).copy()
    frame[1::2] = picture(number + 0.5)[1::2]
    return frame


def stripes(time: float) -> np.ndarray:
    """Fine stripes that stand still, behind a disc that moves."""
    disc_only = disc(time)
    return np.where(disc_only > 100, disc_only, (Y % 2 * 200).astype(np.uint8) + np.uint8(20))


def noise(time: float) -> np.ndarray:
    return np.random.default_rng(int(time)).integers(0, 256, (HEIGHT, WIDTH), np.uint8)


def looks_combed(frames: list[np.ndarray]) -> bool:
    combing = Combing()
    for frame in frames:
        combing.add(av.VideoFrame.from_ndarray(frame, format="gray"))
    return combing.is_combed


def test_two_fields_of_a_moving_picture_are_combed():
    assert looks_combed([woven(disc, number) for number in range(16)])


@pytest.mark.parametrize("picture", [disc, stripes, noise])
def test_whole_frames_are_not_whatever_they_show(picture):
    assert not looks_combed([picture(number) for number in range(16)])


def test_what_stands_still_says_nothing_and_neither_do_few_frames():
    assert not looks_combed([woven(disc, 0)] * 16)
    assert not looks_combed([woven(disc, number) for number in range(5)])


def test_one_combed_moment_does_not_make_a_video_interlaced():
    frames = [disc(number) for number in range(60)]
    frames[10:12] = [woven(disc, 10), woven(disc, 11)]
    assert not looks_combed(frames)


def test_formats_of_other_depths_are_left_alone():
    combing = Combing()
    for number in range(8):
        combing.add(av.VideoFrame.from_ndarray(woven(disc, number).astype(np.uint16) * 257, format="gray16le"))
    assert not combing.is_combed
