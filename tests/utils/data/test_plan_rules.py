"""Rules that VideoX-Fun has: a fixed stride, shorter samples for a few, videos more often than images.

Sources exist nowhere.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.limits import limits
from utils.data.folders import Rules
from utils.data.plan import Plan, Window, fixed_windows, flatten_windows, middle_window
from utils.data.scan import PairedFile, Source
from utils.media.description import IMAGE, MediaInfo


def source(rules: Rules, frames: int = 200, name: str = "a.mp4") -> Source:
    info = MediaInfo(640, 640, frames, 16.0) if frames > 1 else MediaInfo(640, 640, 1, None, kind=IMAGE)
    return Source(Path(name), ("a clip",), info, range(frames), Path("clips"), rules)


def draws(rules: Rules, frames: int = 200, epochs: int = 400) -> list[Window]:
    plan = Plan([source(rules, frames)], limits(40_000), seed=3)
    return [batch[0] for epoch in range(epochs) for batch in plan.epoch(epoch)]


def steps(window: Window) -> set[int]:
    return {after - before for before, after in zip(window.indices, window.indices[1:], strict=False)}


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_frame_stride_uses_every_nth_frame_from_any_first_one(stride):
    rules = Rules(base_res=(320,), max_frames=21, frame_stride=stride)
    windows = draws(rules)
    assert all(steps(window) == {stride} and window.frames == 21 for window in windows)
    firsts = {window.indices[0] for window in windows}
    last = 199 - 20 * stride
    assert (
        min(firsts) < 5 and last - 5 < max(firsts) <= last and {first % stride for first in firsts} == {*range(stride)}
    )
    head, middle = replace(rules, frame_sampling="head"), replace(rules, frame_sampling="middle")
    assert {window.indices[0] for window in draws(head, epochs=5)} == {0}
    assert {window.indices[0] for window in draws(middle, epochs=5)} == {last // 2}
    assert middle_window(source(rules), 320, limits(40_000)).indices == tuple(
        range(last // 2, last // 2 + 21 * stride, stride)
    )


@pytest.mark.parametrize(("frames", "most"), [(9, 5), (10, 5), (17, 9), (16, 5), (41, 21), (200, 21)])
def test_a_clip_has_the_frames_that_are_left_at_its_stride(frames, most):
    rules = Rules(base_res=(320,), max_frames=21, frame_stride=2)
    assert {window.frames for window in draws(rules, frames, 20)} == {most}
    assert all(window.indices[-1] < frames for window in draws(rules, frames))


def test_a_sample_at_a_stride_begins_with_the_start_picture():
    rules = Rules(base_res=(320,), max_frames=9, frame_stride=3)
    begun = replace(source(rules), first=PairedFile(Path("a_first.png"), MediaInfo(640, 640, 1, None, kind=IMAGE)))
    (window,) = flatten_windows(fixed_windows([begun], limits(), 1))
    assert window.indices == tuple(range(0, 27, 3)) and window.first is not None


def test_one_sample_in_ten_is_shorter_evenly_over_all_shorter_lengths():
    windows = draws(Rules(base_res=(320,), max_frames=21, random_frame_crop=True), epochs=4000)
    counts = Counter(window.frames for window in windows)
    assert set(counts) == {1, 5, 9, 13, 17, 21} and 3500 < counts[21] < 3700
    assert all(50 < counts[frames] < 110 for frames in (1, 5, 9, 13, 17))


def test_a_clip_with_one_frame_cannot_be_shorter():
    assert {window.frames for window in draws(Rules(base_res=(320,), random_frame_crop=True), frames=1)} == {1}


@pytest.mark.parametrize(("repeat", "uses"), [(0, 1), (1, 1), (3, 3)])
def test_an_epoch_has_all_images_once_and_all_videos_so_often(repeat, uses):
    rules = Rules(base_res=(320,), video_repeat=repeat)
    clips = [source(rules, frames, f"{number}.mp4") for number, frames in enumerate((1, 49, 1, 81))]
    for epoch in range(3):
        used = Counter(batch[0].source.path.stem for batch in Plan(clips, limits(), 0).epoch(epoch))
        assert used == {"0": 1, "1": uses, "2": 1, "3": uses}


def test_repeats_count_beside_it():
    rules = Rules(base_res=(320,), video_repeat=2, repeats=1.5)
    clips = [source(rules, 49, "a.mp4"), source(rules, 49, "b.mp4")]
    assert [len(Plan(clips, limits(), 0).epoch(epoch)) for epoch in range(2)] == [6, 6]


def test_these_rules_change_nothing_where_they_are_not_given():
    rules = Rules(base_res=(320, 624))
    assert draws(rules, epochs=20) == draws(replace(rules, video_repeat=1, frame_stride=0), epochs=20)
    assert not any(name in rules.identity for name in ("stride=0", "video_repeat", "crop", "sample_size", "clip_list"))
