"""Plans are checked over many seeds, on sources that exist nowhere."""

import pickle
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.limits import limits
from utils.common.errors import UserError
from utils.data.folders import FRAME_SAMPLINGS, Rules
from utils.data.plan import (
    Limits,
    Plan,
    Window,
    count_batch,
    fixed_windows,
    flatten_windows,
    make_plan,
    middle_window,
    validation_windows,
)
from utils.data.scan import PairedFile, Source
from utils.media.probing import MediaInfo
from wan.configs.grid import Grid

LARGER = Rules(enlarge=True)


def source(
    width: int = 1280, height: int = 720, frames: int = 89, name: str = "a.mp4", rules: Rules = LARGER, **changes
) -> Source:
    info = MediaInfo(width, height, frames, 16.0 if frames > 1 else None)
    return Source(Path(name), ("a clip",), info, range(frames), Path("clips"), replace(rules, **changes))


def many_sources(seed: int, count: int = 12, **changes) -> list[Source]:
    rng = random.Random(seed)
    sides = [(1280, 720), (720, 1280), (640, 480), (500, 500), (480, 640)]
    return [
        source(*rng.choice(sides), rng.choice([1, 5, 8, 49, 65, 200]), f"{index}.mp4", **changes)
        for index in range(count)
    ]


def plan_epoch(sources: list[Source], within: Limits, seed: int, epoch: int = 0) -> list[tuple[Window, ...]]:
    return Plan(sources, within, seed).epoch(epoch)


def windows_of(plan: list[tuple[Window, ...]]) -> list[Window]:
    return [window for batch in plan for window in batch]


def stride(window: Window) -> int:
    return window.indices[1] - window.indices[0] if window.frames > 1 else 1


def test_every_planned_window_fits_its_source_and_its_limits():
    within = limits(10000, batch_size=3)
    for seed in range(60):
        sources = many_sources(seed, base_res=(624, 320), max_frame_stride=3, random_frame_length=True)
        plan = plan_epoch(sources, within, seed, epoch=seed % 3)
        windows = windows_of(plan)
        assert sorted(window.source.path for window in windows) == sorted(s.path for s in sources)
        assert all(len({window.bucket for window in batch}) == 1 and len(batch) <= 3 for batch in plan)
        for window in windows:
            assert window.frames % 4 == 1 and window.tokens <= 10000 and 1 <= stride(window) <= 3
            first = window.indices[0]
            assert window.indices == tuple(range(first, first + window.frames * stride(window), stride(window)))
            assert first >= 0 and window.indices[-1] < window.source.info.frames
            assert all(0 <= fraction < 1 for fraction in window.position)


def test_nothing_is_dropped_and_full_batches_come_where_they_can():
    sources = [source(name=f"{index}.mp4") for index in range(7)]
    assert sorted(len(batch) for batch in plan_epoch(sources, limits(batch_size=3), 0)) == [1, 3, 3]


def test_all_65_frames_of_a_clip_are_used_if_the_tokens_allow():
    for seed in range(20):
        ((window,),) = plan_epoch([source(832, 480, 65, max_frame_stride=4)], limits(1560 * 17), seed)
        assert window.indices == tuple(range(65))


def test_random_lengths_strides_and_resolutions_all_occur_evenly():
    clip = source(frames=200, base_res=(320, 624), max_frame_stride=2, random_frame_length=True)
    draws = [plan_epoch([clip], limits(6240), seed)[0][0] for seed in range(600)]
    large = [window for window in draws if window.width == 832]
    assert 240 < len(large) < 360
    for frames in (1, 5, 9, 13):
        assert 45 < sum(window.frames == frames for window in large) < 110
    assert 200 < sum(stride(window) == 2 for window in draws) < 360


def test_a_plan_never_changes_and_differs_between_epochs_and_seeds():
    sources, within = many_sources(0, 6), limits(batch_size=2)
    plan = plan_epoch(sources, within, 42, 3)
    assert plan == plan_epoch(sources, within, 42, 3) == pickle.loads(pickle.dumps(plan))
    assert plan != plan_epoch(sources, within, 42, 4) and plan != plan_epoch(sources, within, 43, 3)
    drawn = [[(window.source.path.stem, stride(window), window.indices[0]) for window in batch] for batch in plan]
    assert drawn == [[("0", 2, 2)], [("2", 1, 27)], [("3", 1, 3), ("4", 1, 1)], [("5", 1, 0)], [("1", 1, 3)]]


def test_windows_are_multiples_of_the_grid_they_are_planned_on():
    grid = Grid(frame=8, side=32)
    sources = [
        source(1280, 720, 90, base_res=(400,)),
        source(720, 1280, 13, base_res=(400,)),
        source(640, 480, 30, frame_sampling="chunks"),
        source(700, 500, 1, base_res=(400,)),
    ]
    windows = windows_of(plan_epoch(sources, Limits(3000, 2, grid), 0))
    assert {window.source.info.width for window in windows} == {1280, 720, 640, 700}
    for window in windows:
        assert window.width % 32 == window.height % 32 == 0 and window.frames % 8 == 1
        assert window.tokens == window.width * window.height // 1024 * ((window.frames - 1) // 8 + 1) <= 3000


def test_an_impossible_resolution_is_refused_whether_or_not_it_is_drawn():
    for seed in range(5):
        with pytest.raises(UserError, match="token_limit"):
            plan_epoch([source(base_res=(320, 1024))], limits(3000), seed)


def test_validation_takes_the_middle_of_an_evenly_strided_subset():
    sources = [source(frames=30, name=f"{i}.mp4", base_res=(320, 624), max_frame_stride=3) for i in range(10)]
    windows = validation_windows(sources, limits(405 * 5), 4)
    assert [window.source.path.stem for window in windows] == ["0", "2", "5", "7"]
    assert {(window.indices, window.position) for window in windows} == {(tuple(range(6, 23)), (0.5, 0.5))}
    assert len(validation_windows(sources, limits(405 * 5), 99)) == 10
    assert validation_windows(sources, limits(405 * 5), 0) == []


def sampled(frames: int, budget: int, **changes) -> list[tuple[int, ...]]:
    """The frames of every sample of one use of a clip, where `budget` frames of 832x480 fit."""
    budgeted = limits(1560 * ((budget - 1) // 4 + 1))
    return sorted(
        window.indices for window in windows_of(plan_epoch([source(832, 480, frames, **changes)], budgeted, 0))
    )


def test_head_and_middle_are_at_the_start_and_in_the_middle():
    assert sampled(50, 21, frame_sampling="head", max_frame_stride=1) == [tuple(range(21))]
    assert sampled(51, 21, frame_sampling="middle", max_frame_stride=1) == [tuple(range(15, 36))]
    assert sampled(50, 21, frame_sampling="head", fps="auto", max_frame_stride=4) == [tuple(range(21))]


def test_uniform_spreads_over_the_whole_clip():
    ((*indices,),) = sampled(101, 21, frame_sampling="uniform")
    assert indices == list(range(0, 101, 5))
    ((*indices,),) = sampled(90, 21, frame_sampling="uniform")
    assert (
        indices[0] == 0 and indices[-1] == 89 and {b - a for a, b in zip(indices, indices[1:], strict=False)} == {4, 5}
    )
    assert sampled(21, 21, frame_sampling="uniform") == [tuple(range(21))]
    assert sampled(40, 1, frame_sampling="uniform") == [(20,)]


def test_chunks_use_the_whole_clip_without_overlap():
    chunks = sampled(89, 21, frame_sampling="chunks")
    assert [len(chunk) for chunk in chunks] == [21, 21, 21, 21, 5]
    assert [index for chunk in chunks for index in chunk] == list(range(89))
    assert [len(chunk) for chunk in sampled(88, 21, frame_sampling="chunks")] == [21, 21, 21, 21]
    assert sampled(1, 21, frame_sampling="chunks") == [(0,)]


def test_slides_overlap_by_half_and_reach_the_end():
    slides = sampled(50, 21, frame_sampling="slide")
    assert slides == [tuple(range(first, first + 21)) for first in (0, 10, 20, 29)]
    assert sampled(21, 21, frame_sampling="slide") == [tuple(range(21))]


def test_a_frame_rate_excludes_strides():
    clip = source(frames=100, fps="auto", max_frame_stride=4)
    for seed in range(20):
        ((window,),) = plan_epoch([replace(clip, frame_indices=tuple(range(0, 100, 2)))], limits(1560 * 4), seed)
        assert {b - a for a, b in zip(window.indices, window.indices[1:], strict=False)} == {2}


def test_repeats_count_per_folder_and_fractions_use_a_part_of_it():
    rich = [source(name=f"{i}.mp4", repeats=2.5) for i in range(4)]
    poor = [replace(source(name=f"p{i}.mp4", repeats=0.5), folder=Path("poor")) for i in range(4)]
    seen = Counter()
    for epoch in range(8):
        counts = Counter(window.source.path.stem for window in windows_of(plan_epoch(rich + poor, limits(), 0, epoch)))
        assert sorted(counts[f"{i}"] for i in range(4)) == [2, 2, 3, 3]
        assert sum(counts[f"p{i}"] for i in range(4)) == 2
        seen += counts
    assert {seen[f"p{i}"] for i in range(4)} == {4}


def test_a_fraction_of_one_clip_comes_in_that_share_of_the_epochs_beginning_with_the_first():
    plan = Plan([source(repeats=0.25)], limits(), 0)
    assert [len(plan.epoch(epoch)) for epoch in range(8)] == [1, 0, 0, 0, 1, 0, 0, 0]


def test_the_same_folder_with_two_sets_of_rules_is_used_with_both():
    once, often = source(repeats=1.0), source(repeats=5.0, base_res=(320,))
    sizes = Counter(window.width for window in windows_of(Plan([once, often], limits(), 0).epoch(0)))
    assert sorted(sizes.values()) == [1, 5]


def test_captions_are_drawn_and_dropped_as_often_as_asked():
    clip = replace(source(frames=5, caption_dropout=0.25), captions=("fox", "hare"))
    texts = Counter(plan_epoch([clip], limits(), seed)[0][0].caption for seed in range(800))
    assert 150 < texts[""] < 250 and abs(texts["fox"] - texts["hare"]) < 90 and set(texts) == {"", "fox", "hare"}


def test_fixed_windows_are_the_middle_or_a_few_that_never_change():
    sources = many_sources(1, base_res=(320, 624))
    middle = fixed_windows(sources, limits(), 1)
    assert all(len(groups) == 2 and groups[0][0].position == (0.5, 0.5) for groups in middle)
    several = fixed_windows(sources, limits(), 3)
    assert several == fixed_windows(sources, limits(), 3) and all(len(groups) == 6 for groups in several)
    assert several[0][:2] == fixed_windows(sources, limits(), 2)[0][:2]
    plan = Plan(sources, limits(), 0, several)
    used = {replace(window, caption="a clip") for epoch in range(40) for window in windows_of(plan.epoch(epoch))}
    assert used == set(flatten_windows(several))


def test_all_chunks_of_a_clip_are_fixed_and_come_every_epoch():
    sources = [source(832, 480, 60, frame_sampling="chunks")]
    ((chunks,),) = fixed = fixed_windows(sources, limits(1560 * 6), 1)
    assert [window.frames for window in chunks] == [21, 21, 17] and {w.position for w in chunks} == {(0.5, 0.5)}
    planned = windows_of(Plan(sources, limits(1560 * 6), 0, fixed).epoch(0))
    assert sorted(window.indices for window in planned) == sorted(window.indices for window in chunks)


def test_chunks_that_are_cached_several_times_over_come_once_an_epoch():
    sources = [source(832, 480, 60, frame_sampling="chunks", base_res=(480, 624))]
    fixed = fixed_windows(sources, limits(1560 * 6), 3)
    assert len(fixed[0]) == 6 and len(set(flatten_windows(fixed))) > 6
    plan = Plan(sources, limits(1560 * 6), 0, fixed)
    seen = {tuple(sorted(w.position for w in windows_of(plan.epoch(epoch)))) for epoch in range(60)}
    assert seen == {tuple(sorted(window.position for window in group)) for group in fixed[0]}


@pytest.mark.parametrize("sampling", FRAME_SAMPLINGS)
@pytest.mark.parametrize("fps", ["native", "auto"])
def test_no_sample_has_more_frames_than_the_next_number_that_the_model_takes(sampling, fps):
    for wanted, frames in ((1, 1), (8, 9), (9, 9), (16, 17), (99, 21)):
        longest = [len(indices) for indices in sampled(89, 21, frame_sampling=sampling, fps=fps, max_frames=wanted)]
        assert max(longest) == frames, wanted
    clip = source(832, 480, 89, frame_sampling=sampling, fps=fps, max_frames=8, random_frame_length=True)
    drawn = {window.frames for seed in range(30) for window in windows_of(plan_epoch([clip], limits(1560 * 6), seed))}
    assert drawn == {1, 5, 9}


def test_the_most_frames_hold_for_cached_windows_and_validation_too():
    clip = source(832, 480, 89, max_frames=16)
    assert {window.frames for window in flatten_windows(fixed_windows([clip], limits(1560 * 9), 1))} == {17}
    assert {window.frames for window in flatten_windows(fixed_windows([clip], limits(1560 * 9), 4))} == {17}
    assert [window.indices for window in validation_windows([clip], limits(1560 * 9), 1)] == [tuple(range(36, 53))]
    grid = Limits(1560 * 9, 1, Grid(frame=8, side=16))
    assert middle_window(replace(clip, rules=replace(LARGER, max_frames=10)), 624, grid).frames == 17


def with_start_picture(clip: Source) -> Source:
    return replace(clip, first=PairedFile(Path("a_first.png"), MediaInfo(832, 480, 1, None)))


@pytest.mark.parametrize("sampling", FRAME_SAMPLINGS)
def test_every_use_of_a_clip_with_a_start_picture_has_one_sample_that_begins_with_it(sampling):
    clip = with_start_picture(source(832, 480, 60, frame_sampling=sampling))
    for seed in range(20):
        windows = windows_of(plan_epoch([clip], limits(1560 * 4), seed))
        assert min(windows, key=lambda window: window.indices).first == clip.first
        assert sum(window.first is not None for window in windows) == 1
    (middle,) = validation_windows([clip], limits(1560 * 4), 1)
    assert middle.indices == tuple(range(13)) and middle.first == clip.first
    assert middle_window(source(832, 480, 60), 624, limits(1560 * 4)).indices[0] == 23


def test_a_start_picture_stands_for_the_first_frame_that_samples_may_use():
    clip = with_start_picture(replace(source(832, 480, 60), frame_indices=(2, 5, 8, 11, 14)))
    window = middle_window(clip, 624, limits(1560 * 4))
    assert window.indices[0] == 2 and window.first == clip.first
    assert replace(window, indices=(5, 8, 11, 14)).first is None


def test_no_batch_of_any_epoch_is_larger_than_the_largest():
    for seed in range(20):
        sources = many_sources(seed, base_res=(624, 320), max_frame_stride=3, random_frame_length=True)
        plan = Plan(sources, limits(10000, batch_size=3), seed)
        counts = [sum(window.tokens for window in batch) for batch in plan.epoch(0)]
        assert len(plan.largest_batch) == max(map(len, plan.epoch(0)))
        later = [count_batch(batch) for epoch in range(9) for batch in plan.epoch(epoch)]
        assert count_batch(plan.largest_batch) >= max(later) / plan.limits.batch_size * len(plan.largest_batch)
        sizes = {window.tokens for epoch in range(9) for batch in plan.epoch(epoch) for window in batch}
        assert plan.largest_batch[0].tokens >= max(sizes)
        assert plan.mean_tokens == pytest.approx(sum(counts) / len(counts))


def test_the_largest_batch_is_as_full_as_batches_are():
    sources = [source(320, 320, 1, f"{n}.png", base_res=(320,)) for n in range(3)]
    assert [len(Plan(sources, limits(10000, batch_size=n), 0).largest_batch) for n in (1, 2, 4)] == [1, 2, 3]


def test_the_largest_batch_of_fixed_windows_is_made_of_them():
    sources = [source(640, 320, 60, f"{n}.mp4", base_res=(320, 640)) for n in range(3)]
    plan = make_plan(sources, limits(10000), seed=0, num_fixed=2)
    assert plan.largest_batch[0] in plan.fixed_windows
