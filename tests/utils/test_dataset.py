"""Folders are made here, with tiny videos; plans are checked over many seeds."""

import multiprocessing
import pickle
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from utils.dataset import (
    Grid,
    SamplingOptions,
    Source,
    Window,
    batches,
    bucket_size,
    count_tokens,
    load_clip,
    max_frames,
    plan_epoch,
    scan,
    split_folders,
    validation_windows,
)
from utils.errors import UserError
from utils.media import MediaError, MediaInfo, write_video

SMALL = SamplingOptions(base_res=(32,), token_limit=60)


def video(path: Path, frames: int = 9, size: tuple[int, int] = (64, 48), caption: str | None = "a clip") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = torch.linspace(0, 200, frames)[:, None, None, None] + torch.linspace(0, 50, size[0])
    write_video(path, ramp.expand(frames, 3, size[1], size[0]).byte(), 16)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def image(path: Path, caption: str | None = "a picture") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), "teal").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def source(width: int = 1280, height: int = 720, frames: int = 89, name: str = "a.mp4") -> Source:
    return Source(Path(name), "a clip", MediaInfo(width, height, frames, 16.0 if frames > 1 else None))


def many_sources(seed: int, count: int = 12) -> list[Source]:
    rng = random.Random(seed)
    sides = [(1280, 720), (720, 1280), (640, 480), (500, 500), (480, 640)]
    return [source(*rng.choice(sides), rng.choice([1, 5, 8, 49, 65, 200]), f"{index}.mp4") for index in range(count)]


def reasons(problems) -> dict[str, str]:
    return {problem.path.name: problem.reason for problem in problems}


def test_a_folder_is_scanned_recursively_in_order_without_hidden_things(tmp_path):
    video(tmp_path / "b" / "UPPER.MP4", caption="\ufeff  ein Hund, ü \n")
    image(tmp_path / "a" / "pic one.JPG")
    for hidden in (".wan_cache/x.mp4", ".secret/y.mp4", "a/._z.mp4"):
        video(tmp_path / hidden)
    sources, problems = scan(tmp_path)
    assert [(s.path.name, s.caption, s.info.frames) for s in sources] == [
        ("pic one.JPG", "a picture", 1),
        ("UPPER.MP4", "ein Hund, ü", 9),
    ]
    assert problems == []


def test_every_bad_file_comes_back_with_its_own_reason_and_the_good_one_is_kept(tmp_path):
    video(tmp_path / "good.mp4")
    video(tmp_path / "short.mp4", frames=3)
    video(tmp_path / "silent.mp4", caption=None)
    video(tmp_path / "blank.mp4", caption=" \n")
    video(tmp_path / "latin.mp4").with_suffix(".txt").write_bytes("für".encode("latin-1"))
    video(tmp_path / "text.mp4").write_text("not a video")
    image(tmp_path / "twin.png")
    video(tmp_path / "twin.mp4")
    sources, problems = scan(tmp_path)
    assert [s.path.name for s in sources] == ["good.mp4"]
    expected = {
        "short.mp4": "3 frames",
        "silent.mp4": "no caption",
        "blank.mp4": "empty",
        "latin.mp4": "not UTF-8",
        "text.mp4": "not a readable video",
        "twin.png": "share a caption",
        "twin.mp4": "share a caption",
    }
    found = reasons(problems)
    assert found.keys() == expected.keys()
    assert all(word in found[name] for name, word in expected.items()), found


def test_one_file_with_two_faults_has_both_reported(tmp_path):
    video(tmp_path / "a.mp4", frames=3, caption=None)
    assert len(scan(tmp_path)[1]) == 2


def test_controls_are_paired_by_name_and_never_trained_on(tmp_path):
    video(tmp_path / "a.mp4", frames=9)
    video(tmp_path / "a_control.mov", frames=5, size=(32, 24), caption=None)
    image(tmp_path / "b.png")
    image(tmp_path / "b_control.jpg", caption=None)
    sources, problems = scan(tmp_path, load_control=True)
    assert problems == []
    assert [(s.path.name, s.control.name, s.frames) for s in sources] == [
        ("a.mp4", "a_control.mov", 5),
        ("b.png", "b_control.jpg", 1),
    ]


def test_each_bad_control_is_a_problem_of_its_video(tmp_path):
    video(tmp_path / "alone.mp4")
    for name in ("kind", "short", "broken", "twice"):
        video(tmp_path / f"{name}.mp4")
    image(tmp_path / "kind_control.png", caption=None)
    video(tmp_path / "short_control.mp4", frames=3, caption=None)
    (tmp_path / "broken_control.mp4").touch()
    video(tmp_path / "twice_control.mp4", caption=None)
    video(tmp_path / "twice_control.mov", caption=None)
    video(tmp_path / "stray_control.mp4", caption=None)
    sources, problems = scan(tmp_path, load_control=True)
    words = {
        "alone.mp4": "no control",
        "kind.mp4": "must be a video",
        "short.mp4": "3 frames",
        "broken.mp4": "the file is empty",
        "twice.mp4": "several controls",
        "stray_control.mp4": "without the file",
    }
    found = reasons(problems)
    assert sources == [] and found.keys() == words.keys()
    assert all(word in found[name] for name, word in words.items()), found


def test_another_control_suffix_can_be_named_but_not_an_empty_one(tmp_path):
    video(tmp_path / "a.mp4")
    video(tmp_path / "a.depth.mp4", caption=None)
    assert len(scan(tmp_path, True, ".depth")[0]) == 1
    with pytest.raises(UserError, match="suffix is empty"):
        scan(tmp_path, True, "")


def test_an_empty_or_missing_folder_says_what_was_looked_for_and_where(tmp_path):
    with pytest.raises(UserError, match=r"(?s)no videos or images.*\.mp4.*\.png") as caught:
        scan(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        scan(tmp_path / "nowhere")


def test_linked_folders_are_followed_but_never_in_a_circle(tmp_path):
    video(tmp_path / "elsewhere" / "a.mp4")
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (dataset / "again").symlink_to(dataset, target_is_directory=True)
    assert [s.path for s in scan(dataset)[0]] == [dataset / "linked" / "a.mp4"]


def test_validation_files_are_never_training_sources(tmp_path):
    video(tmp_path / "a.mp4")
    video(tmp_path / "validation" / "b.mp4")
    train, held_out = split_folders(tmp_path)
    assert (train, held_out) == (tmp_path, [tmp_path / "validation"])
    video(tmp_path / "test" / "c.mp4")
    train, held_out = split_folders(tmp_path)
    assert held_out == [tmp_path / "validation", tmp_path / "test"]
    assert [s.path.name for s in scan(train, exclude=held_out)[0]] == ["a.mp4"]
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    train, (val, *_) = split_folders(tmp_path)
    assert (train, val) == (tmp_path / "train", tmp_path / "val")
    assert split_folders(tmp_path / "train") == (tmp_path / "train", [])


def test_bucket_sizes_are_the_released_ones():
    table = {
        624: [(832, 480), (704, 544), (624, 624), (544, 704), (480, 832)],
        960: [(1280, 720), (1088, 832), (960, 960), (832, 1088), (720, 1280)],
        1024: [(1344, 768), (1184, 896), (1024, 1024), (896, 1184), (768, 1344)],
    }
    pictures = [(1920, 1080), (640, 480), (500, 500), (480, 640), (1080, 1920)]
    for base_res, sizes in table.items():
        assert [bucket_size(*picture, base_res) for picture in pictures] == sizes


def test_bucket_cuts_fall_exactly_where_they_should():
    around = {1529: (832, 480), 1528: (704, 544), 1151: (704, 544), 1150: (624, 624), 885: (624, 624)}
    around |= {884: (544, 704), 670: (544, 704), 669: (480, 832)}
    for width, size in around.items():
        assert bucket_size(width, 1000, 624) == size, width


def test_any_multiple_of_16_gets_three_ratios_of_about_equal_area():
    for base_res in range(256, 2049, 16):
        for picture, ratio in (((16, 9), 16 / 9), ((4, 3), 4 / 3), ((1, 1), 1.0), ((9, 16), 9 / 16)):
            width, height = bucket_size(*picture, base_res)
            assert width % 16 == height % 16 == 0
            assert abs(width * height / base_res**2 - 1) < 0.07
            assert abs(width / height / ratio - 1) < 0.08
    for wrong in (0, -16, 100):
        with pytest.raises(UserError, match="multiple of 16"):
            bucket_size(16, 9, wrong)


def test_another_grid_moves_sizes_onto_its_tokens():
    grid = Grid(frame=4, side=32)
    assert bucket_size(16, 9, 960, grid) == (1280, 704)
    assert bucket_size(1, 1, 624, grid) == (640, 640)
    assert count_tokens(1280, 704, 121, grid) == 40 * 22 * 31


def test_the_token_limit_is_inclusive_and_an_impossible_one_names_both_numbers():
    assert count_tokens(832, 480, 81) == 52 * 30 * 21
    assert max_frames(832, 480, 1560 * 17) == 65
    assert max_frames(832, 480, 1560 * 17 - 1) == 61
    assert max_frames(832, 480, 1560) == 1
    with pytest.raises(UserError, match=r"1560 tokens.*1559"):
        max_frames(832, 480, 1559)


def test_every_planned_window_fits_its_source_and_its_limits():
    options = SamplingOptions((624, 320), 10000, max_frame_stride=3, random_frame_length=True, batch_size=3)
    for seed in range(60):
        sources = many_sources(seed)
        plan = plan_epoch(sources, options, seed, epoch=seed % 3)
        windows = [window for batch in plan for window in batch]
        assert sorted(window.source.path for window in windows) == sorted(s.path for s in sources)
        assert all(len({window.bucket for window in batch}) == 1 and len(batch) <= 3 for batch in plan)
        for window in windows:
            assert window.frames % 4 == 1 and window.tokens <= 10000 and 1 <= window.stride <= 3
            assert window.start >= 0 and window.start + (window.frames - 1) * window.stride < window.source.frames
            assert all(0 <= fraction < 1 for fraction in window.position)


def test_nothing_is_dropped_and_full_batches_come_where_they_can():
    sources = [source(name=f"{index}.mp4") for index in range(7)]
    sizes = sorted(len(batch) for batch in plan_epoch(sources, SamplingOptions(batch_size=3), 0, 0))
    assert sizes == [1, 3, 3]


def test_a_65_frame_clip_is_used_whole_where_the_tokens_allow():
    options = SamplingOptions(token_limit=1560 * 17, max_frame_stride=4)
    for seed in range(20):
        ((window,),) = plan_epoch([source(832, 480, 65)], options, seed, 0)
        assert (window.frames, window.stride, window.start) == (65, 1, 0)


def test_a_shorter_control_limits_the_frames():
    info = MediaInfo(832, 480, 65, 16.0)
    pair = Source(Path("a.mp4"), "", info, Path("a_control.mp4"), MediaInfo(416, 240, 23, 16.0))
    ((window,),) = plan_epoch([pair], SamplingOptions(token_limit=99999, max_frame_stride=1), 0, 0)
    assert window.frames == 21 and window.start <= 2


def test_random_lengths_strides_and_resolutions_all_occur_evenly():
    options = SamplingOptions((320, 624), 6240, max_frame_stride=2, random_frame_length=True)
    draws = [plan_epoch([source(frames=200)], options, seed, 0)[0][0] for seed in range(600)]
    large = [window for window in draws if window.width == 832]
    assert 240 < len(large) < 360
    for frames in (1, 5, 9, 13):
        assert 45 < sum(window.frames == frames for window in large) < 110
    assert 240 < sum(window.stride == 2 for window in draws) < 360


def test_a_plan_stays_the_same_for_ever_and_differs_between_epochs_and_seeds():
    sources, options = many_sources(0, 6), SamplingOptions(batch_size=2)
    plan = plan_epoch(sources, options, 42, 3)
    assert plan == plan_epoch(sources, options, 42, 3)
    assert plan != plan_epoch(sources, options, 42, 4) and plan != plan_epoch(sources, options, 43, 3)
    drawn = [[(window.source.path.stem, window.stride, window.start) for window in batch] for batch in plan]
    assert drawn == [[("1", 1, 2)], [("3", 1, 3), ("4", 1, 1)], [("0", 2, 1)], [("2", 1, 18)], [("5", 1, 0)]]


def test_an_impossible_resolution_is_refused_whether_or_not_it_is_drawn():
    for seed in range(5):
        with pytest.raises(UserError, match="token_limit"):
            plan_epoch([source()], SamplingOptions((320, 1024), 3000), seed, 0)


def test_validation_takes_the_middle_of_an_evenly_strided_subset():
    sources = [source(frames=30, name=f"{index}.mp4") for index in range(10)]
    options = SamplingOptions((320, 624), 405 * 5, max_frame_stride=3)
    windows = validation_windows(sources, options, 4)
    assert [window.source.path.stem for window in windows] == ["0", "2", "5", "7"]
    fixed = {(window.frames, window.stride, window.start, window.position) for window in windows}
    assert fixed == {(17, 1, 6, (0.5, 0.5))}
    assert len(validation_windows(sources, options, 99)) == 10
    assert validation_windows(sources, options, 0) == []


def test_a_clip_holds_the_frames_the_window_names(tmp_path):
    video(tmp_path / "a.mp4", frames=17)
    ((clip_source,), _) = scan(tmp_path)
    window = Window(clip_source, 32, 32, frames=5, stride=3, start=2, position=(0.0, 0.0))
    clip = load_clip(window)
    assert clip.pixels.shape == (3, 5, 32, 32) and clip.pixels.dtype == torch.uint8 and clip.pixels.is_contiguous()
    assert (clip.caption, clip.control, clip.path) == ("a clip", None, tmp_path / "a.mp4")
    shown = clip.pixels[..., 0].float().mean((0, 2))
    assert (shown - torch.tensor([2, 5, 8, 11, 14]) * 200 / 16).abs().max() < 6
    assert torch.equal(clip.pixels, load_clip(window).pixels)


def test_a_control_of_another_resolution_shows_the_same_region_and_frames(tmp_path):
    video(tmp_path / "a.mp4", frames=9, size=(128, 64))
    video(tmp_path / "a_control.mp4", frames=9, size=(64, 32), caption=None)
    ((pair,), _) = scan(tmp_path, load_control=True)
    clip = load_clip(Window(pair, 32, 32, 5, 2, 0, (0.9, 0.5)))
    assert clip.control.shape == clip.pixels.shape
    assert (clip.control.float() - clip.pixels.float()).abs().mean() < 4


@pytest.fixture
def small_set(tmp_path) -> list[Source]:
    for index in range(5):
        video(tmp_path / f"{index}.mp4", frames=9 + index, caption=f"clip {index}")
    image(tmp_path / "still.png")
    return scan(tmp_path)[0]


def first(count: int, *arguments, **keywords) -> list[list]:
    stream = batches(*arguments, **keywords)
    taken = list(islice(stream, count))
    stream.close()
    return taken


def same(ours: list[list], theirs: list[list]) -> bool:
    pairs = [pair for batch in zip(ours, theirs, strict=True) for pair in zip(*batch, strict=True)]
    return all(a.path == b.path and a.caption == b.caption and torch.equal(a.pixels, b.pixels) for a, b in pairs)


def test_workers_change_nothing_but_the_speed_and_end_with_the_iterator(small_set):
    alone = first(9, small_set, SMALL, seed=7)
    stream = batches(small_set, SMALL, seed=7, num_workers=2)
    helped = list(islice(stream, 9))
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert same(alone, helped) and not multiprocessing.active_children()


def test_batches_follow_the_plan_over_epochs_and_can_be_entered_anywhere(small_set):
    planned = [batch for epoch in range(3) for batch in plan_epoch(small_set, SMALL, 7, epoch)]
    everything = first(len(planned), small_set, SMALL, seed=7)
    assert [[c.path for c in clips] for clips in everything] == [[w.source.path for w in b] for b in planned]
    assert same(everything[8:], first(len(planned) - 8, small_set, SMALL, seed=7, start_batch=8))
    later = len(plan_epoch(small_set, SMALL, 7, 0)) + 1
    assert same(everything[later:], first(len(planned) - later, small_set, SMALL, 7, start_epoch=1, start_batch=1))


def test_the_global_random_state_is_left_alone(small_set):
    before = torch.get_rng_state(), random.getstate()
    first(3, small_set, SMALL, seed=7)
    first(3, small_set, SMALL, seed=7, num_workers=1)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_vanishes_is_a_media_error_without_a_traceback_in_it(small_set, num_workers):
    gone = small_set[2].path
    gone.unlink()
    with pytest.raises(MediaError) as caught:
        first(6, small_set, SMALL, seed=7, num_workers=num_workers)
    assert caught.value.path == gone and str(caught.value) == f"{gone}: there is no such file"
    assert not multiprocessing.active_children()


def test_workers_can_be_spawned_as_on_windows(small_set):
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        helped = first(2, small_set, SMALL, seed=7, num_workers=1)
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert same(helped, first(2, small_set, SMALL, seed=7))
    plan = plan_epoch(small_set, SMALL, 7, 0)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_nothing_to_train_on_is_said_at_once():
    with pytest.raises(UserError, match="nothing to train on"):
        batches([], SMALL, seed=0)
