"""The sizes of VideoX-Fun's guide: its examples, and what no sample could have."""

from pathlib import Path

import pytest

from tests.limits import GRID, limits
from utils.common.errors import UserError
from utils.data.folders import Rules, resolve_folders
from utils.data.plan import Limits, Plan, Window, fixed_windows, flatten_windows, validation_windows
from utils.data.sample_sizes import SampleSizes
from utils.data.scan import Source
from utils.media.description import IMAGE, MediaInfo

TOKENS = {"training_with_video_token_length": True}


def source(rules: Rules, frames: int = 200, side: int = 2048, name: str = "a.mp4") -> Source:
    info = MediaInfo(side, side, frames, 16.0) if frames > 1 else MediaInfo(side, side, 1, None, kind=IMAGE)
    return Source(Path(name), ("a clip",), info, range(frames), Path("clips"), rules)


def windows(rules: Rules, frames: int = 200, epochs: int = 200, side: int = 2048) -> list[Window]:
    """The windows of one clip over many epochs."""
    plan = Plan([source(rules, frames, side)], limits(), seed=0)
    return [batch[0] for epoch in range(epochs) for batch in plan.epoch(epoch)]


def sizes_of(rules: Rules, frames: int = 200) -> set[tuple[int, int, int]]:
    return {window.bucket for window in windows(rules, frames)}


@pytest.mark.parametrize(
    ("video", "image", "flags", "of_images", "of_videos"),
    [
        # The guide's examples of random_hw_adapt alone: 512 to 1024 for both, and 256 to 1024 beside 256.
        (1024, 1024, {"random_hw_adapt": True}, (512, 640, 768, 896, 1024), (512, 640, 768, 896, 1024)),
        (256, 1024, {"random_hw_adapt": True}, (256, 384, 512, 640, 768, 896, 1024), (256,)),
        # With the token length both go from the one to the other, with random_hw_adapt or without.
        (256, 1024, TOKENS | {"token_sample_size": 512}, (256, 384, 512, 640, 768, 896, 1024), None),
        (256, 640, TOKENS | {"token_sample_size": 512, "random_hw_adapt": True}, (256, 384, 512, 640), None),
        # Neither: one size each.
        (640, 960, {}, (960,), (640,)),
        (640, None, {}, (640,), (640,)),
        # The largest belongs to them where the steps miss it.
        (512, 960, TOKENS | {"token_sample_size": 512}, (512, 640, 768, 896, 960), None),
    ],
)
def test_sides_go_from_the_smallest_to_the_largest_in_steps_of_128(video, image, flags, of_images, of_videos):
    sizes = SampleSizes(video_sample_size=video, image_sample_size=image, **flags)
    assert sizes.sample_sides(is_image=True) == of_images
    assert sizes.sample_sides(is_image=False) == (of_videos or of_images)
    sizes.check_sizes(max_frames=49)


@pytest.mark.parametrize(
    ("token", "side", "frames"),
    [(512, 256, 49), (512, 512, 49), (512, 768, 21), (512, 1024, 9), (1024, 1024, 49), (640, 640, 49)],
)
def test_a_larger_side_has_as_many_frames_as_keep_the_pixels(token, side, frames):
    sizes = SampleSizes(video_sample_size=256, token_sample_size=token, training_with_video_token_length=True)
    assert sizes.frames_of_area(side**2, 49, GRID.frame) == frames
    assert (frames + 4) * side**2 > 49 * token**2 or frames == 49
    assert SampleSizes(video_sample_size=256).frames_of_area(side**2, 49, GRID.frame) == 49


def test_samples_have_these_sizes_whatever_the_token_limit():
    rules = Rules(video_sample_size=512, image_sample_size=1024, max_frames=49, token_sample_size=512, **TOKENS)
    squares = {(512, 512, 49), (640, 640, 29), (768, 768, 21), (896, 896, 13), (1024, 1024, 9)}
    assert sizes_of(rules) == squares
    assert sizes_of(rules, frames=1) == {(width, height, 1) for width, height, _ in squares}
    plain = Rules(video_sample_size=640, image_sample_size=960, max_frames=81)
    assert sizes_of(plain) == {(640, 640, 81)} and sizes_of(plain, frames=1) == {(960, 960, 1)}
    adapted = Rules(video_sample_size=256, image_sample_size=512, max_frames=49, random_hw_adapt=True)
    assert sizes_of(adapted) == {(256, 256, 49)}
    assert sizes_of(adapted, frames=1) == {(256, 256, 1), (384, 384, 1), (512, 512, 1)}


def test_every_side_is_drawn_about_equally_often():
    rules = Rules(video_sample_size=512, image_sample_size=1024, max_frames=49, random_hw_adapt=True)
    drawn = [window.width for window in windows(rules, frames=1, epochs=500)]
    assert all(70 < drawn.count(side) < 130 for side in (512, 640, 768, 896, 1024))


def test_a_clip_that_is_smaller_than_a_side_has_the_frames_of_its_own_size():
    rules = Rules(video_sample_size=256, image_sample_size=1024, max_frames=49, token_sample_size=512, **TOKENS)
    assert {window.bucket for window in windows(rules, side=320)} == {(256, 256, 49), (320, 320, 49)}


def test_a_bucket_of_another_shape_has_the_frames_of_its_square():
    rules = Rules(video_sample_size=640, max_frames=81, token_sample_size=640, enlarge=True, **TOKENS)
    clip = Source(Path("a"), ("",), MediaInfo(1440, 1080, 100, 16.0), range(100), Path("clips"), rules)
    assert Plan([clip], limits(), seed=0).epoch(0)[0][0].bucket == (736, 560, 81)  # a few pixels more than 640x640


def test_cached_windows_and_validation_have_these_sizes_too():
    rules = Rules(video_sample_size=512, image_sample_size=768, max_frames=49, token_sample_size=512, **TOKENS)
    clip = source(rules)
    for count in (1, 3):
        fixed = fixed_windows([clip], limits(), count)
        buckets = [window.bucket for window in flatten_windows(fixed)]
        assert buckets == [size for size in ((512, 512, 49), (640, 640, 29), (768, 768, 21)) for _ in range(count)]
        plan = Plan([clip], limits(), 0, fixed)
        assert {plan.epoch(epoch)[0][0].bucket for epoch in range(60)} == set(buckets)
    assert [window.bucket for window in validation_windows([clip], limits(), 1)] == [(512, 512, 49)]


def test_other_grids_are_kept():
    rules = Rules(video_sample_size=512, image_sample_size=768, max_frames=49, token_sample_size=512, **TOKENS)
    grid = type(GRID)(frame=8, side=32)
    plan = Plan([source(rules)], Limits(10_000, 1, grid), seed=0)
    found = {plan.epoch(epoch)[0][0].bucket for epoch in range(60)}
    assert found == {(512, 512, 49), (640, 640, 25), (768, 768, 17)}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"image_sample_size": 640}, "--image_sample_size requires --video_sample_size"),
        ({"random_hw_adapt": True}, "--random_hw_adapt requires --video_sample_size"),
        ({"video_sample_size": 640}, "--video_sample_size needs --video_sample_n_frames"),
        ({"video_sample_size": 640, "max_frames": 49, "base_res": (320,)}, "--base_res and --video_sample_size both"),
        ({"video_sample_size": 650, "max_frames": 49}, "--video_sample_size 650 is not a multiple of 16: try 640"),
        (
            {"video_sample_size": 640, "image_sample_size": 320, "max_frames": 49, "random_hw_adapt": True},
            "--image_sample_size 320 is below 512, the smallest side of images here",
        ),
        ({"video_sample_size": 640, "max_frames": 49, **TOKENS}, "need each other"),
        ({"video_sample_size": 640, "max_frames": 49, "token_sample_size": 640}, "need each other"),
        (
            {"video_sample_size": 640, "image_sample_size": 1024, "token_sample_size": 128, "max_frames": 49, **TOKENS},
            "--token_sample_size 128 leaves no frame at 1024x1024",
        ),
    ],
)
def test_sizes_that_no_sample_can_have_and_options_without_effect_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        resolve_folders(Path("clips"), None, Rules(**rules), tables_only=True)


def test_a_folder_of_a_config_may_have_sizes_of_its_own(tmp_path):
    table = '[[dataset]]\npath = "a"\nvideo_sample_size = 320\nvideo_sample_n_frames = 21\n'
    (tmp_path / "sets.toml").write_text(f'{table}[[dataset]]\npath = "b"\nbase_res = 624\n', encoding="utf-8")
    first, second = resolve_folders(None, tmp_path / "sets.toml", Rules(), tables_only=True)
    assert (first.rules.sides(False), first.rules.max_frames) == ((320,), 21) and second.rules.sides(False) == (624,)
