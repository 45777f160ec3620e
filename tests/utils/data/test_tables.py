"""What is printed about a dataset, for sources that exist nowhere."""

from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import pytest

from tests.limits import limits
from utils.data.folders import Rules
from utils.data.plan import Plan, Window, middle_window
from utils.data.scan import PairedFile, Problem, Source
from utils.data.tables import format_buckets, format_clips, format_plan
from utils.media.description import IMAGE, VIDEO, Coverage, MediaInfo, Timeline


def source(
    name: str = "fox.mp4", fps: float | None = 16.0, frames: int = 89, caption: str = "a fox", **rules
) -> Source:
    info = MediaInfo(832, 480, frames, fps, VIDEO if fps else IMAGE)
    return Source(Path(name), (caption,), info, range(frames), Path("clips"), Rules(**rules))


def window(clip: Source, token_limit: int = 1560 * 21) -> Window:
    return middle_window(clip, 624, limits(token_limit))


def row(clip: Source, token_limit: int = 1560 * 21) -> list[str]:
    """The cells of a clip's only row, which are at least two spaces apart."""
    line = format_clips([window(clip, token_limit)], [], [], 16.0).splitlines()[2]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_clip_has_one_row_with_what_it_holds_and_what_a_sample_takes():
    assert row(source(frames=81)) == ["fox.mp4", "832x480", "16", "81", "832x480", "32760", "a fox", "ok"]
    assert row(source(frames=90), 1560 * 5)[3:6] == ["90 -> 17", "832x480", "7800"]
    assert row(source("fox.png", fps=None, frames=1))[2:4] == ["image", "1"]


def test_long_captions_are_cut_and_others_are_counted():
    assert row(source(caption=24 * "x"))[6] == 24 * "x"
    assert row(source(caption=25 * "x"))[6] == 21 * "x" + "..."
    assert row(replace(source(), captions=("a fox", "a red fox", "foxes")))[6] == "a fox (+2)"


def test_remarks_say_what_the_user_may_not_expect():
    assert row(source(fps=24.0))[-1] == "will play at 0.67x its speed, see --fps auto"
    assert row(source(fps=8.0))[-1] == "will play at 2x its speed"
    assert row(source(fps=32.0, frame_stride=2))[-1] == "ok"
    assert row(source(fps=16.0, frame_stride=2))[-1] == "will play at 2x its speed"
    assert row(source(fps=17.0))[-1] == "ok"
    assert row(replace(source(fps=8.0), rules=Rules(fps="auto")))[-1] == (
        "below 16 fps: all its frames are used, at 2x its speed"
    )
    assert row(replace(source(fps=20.0), rules=Rules(fps="24")))[-1] == (
        "below 24 fps: all its frames are used, at 0.8x its speed"
    )
    assert row(replace(source(fps=16.0), rules=Rules(fps="auto")))[-1] == "ok"
    short = PairedFile(Path("mask.mp4"), MediaInfo(832, 480, 60, 16.0))
    assert row(replace(source(), mask=short))[-1] == "its control or mask ends after 60 frames"
    still = PairedFile(Path("mask.png"), MediaInfo(832, 480, 1, None, IMAGE))
    assert row(replace(source(), mask=still))[-1] == "ok"
    assert row(source(max_duration=5.0))[-1] == "used up to 5 s"
    assert row(source(frames=81, max_duration=5.0))[-1] == row(source("a.png", None, 1, max_duration=5.0))[-1] == "ok"
    start = PairedFile(Path("clips/fox_first.png"), MediaInfo(832, 480, 1, None, IMAGE))
    assert row(replace(source(), first=start))[-1] == "begins with fox_first.png"
    small = replace(source(enlarge=True), info=MediaInfo(416, 240, 89, 24.0))
    assert row(small)[-1] == "will play at 0.67x its speed, see --fps auto, enlarged 2x"


def test_names_and_captions_of_any_characters_stay_in_their_row():
    assert row(source(caption="a fox\n\tand  a\u2028hare"))[6] == "a fox and a hare"
    assert row(source(caption="\x1b[31mred\x00"))[6] == "\\x1b[31mred\\x00"
    assert row(source(caption=12 * "狐"))[6] == 12 * "狐" and row(source(caption=13 * "狐"))[6] == 10 * "狐" + "..."
    assert row(source(caption=24 * "e\u0301"))[6] == 24 * "e\u0301"
    assert row(source("a\nb\t\x1b.mp4"))[0] == "a\\nb\\t\\x1b.mp4"
    names = ["a.mp4", "狐.mp4", "\udcba\udcfc.mp4"]
    table = format_clips([window(source(name)) for name in names], [], [Problem(Path("x/\udcba\r.mp4"), "")], 16.0)
    lines = table.splitlines()
    assert [line[: line.index("832x480")] for line in lines[2:5]] == [
        "a.mp4             ",
        "狐.mp4            ",
        "\\udcba\\udcfc.mp4  ",
    ]
    assert lines[5].startswith("\\udcba\\r.mp4 ") and len(lines) == 6
    assert [line.split("  ")[-1].strip() for line in lines[2:]] == [
        *("ok", "ok", "its name is not UTF-8", "cannot be used, see below, its name is not UTF-8")
    ]


@pytest.mark.parametrize(
    ("size", "remark"),
    [
        ((832, 480), "ok"),
        ((1280, 64), "only 9 % of the picture is seen"),
        ((16384, 64), "only less than 1 % of the picture is seen"),
        ((480, 1500), "only 55 % of the picture is seen"),
        ((480, 1300), "ok"),
    ],
)
def test_a_picture_of_which_little_is_seen_is_reported(size, remark):
    assert row(replace(source(), info=MediaInfo(*size, 89, 16.0)))[-1] == remark


@pytest.mark.parametrize(
    ("coverage", "remark"),
    [
        (("brightness", 0.5, 0, 255), "mask: 50 % counts"),
        (("opacity", 0.254, 0, 255), "mask: 25 % counts (by its opacity)"),
        (("labels", 0.0004, 0, 255), "mask: less than 1 % counts (labels)"),
        (("colours", 0.9996, 0, 255), "mask: 99 % counts (colours)"),
        (("brightness", 1.0, 255, 255), "the whole picture counts alike, so the mask does nothing"),
        (("brightness", 0.98, 240, 255), "the whole picture counts alike, so the mask does nothing"),
        (("brightness", 0.98, 239, 255), "mask: 98 % counts"),
        (("brightness", 128 / 255, 128, 128), "the whole picture counts alike (128 of 255), so the mask does nothing"),
        (("opacity", 0.9, 225, 239), "the whole picture counts alike (230 of 255), so the mask does nothing"),
        (("colours", 1.0, 255, 255), "the whole picture counts alike, so the mask does nothing"),
    ],
)
def test_what_a_mask_says_is_in_the_row(coverage, remark):
    mask = PairedFile(Path("mask.png"), MediaInfo(832, 480, 1, None, IMAGE, mask=Coverage(*coverage)))
    assert row(replace(source(), mask=mask))[-1] == remark


def timed(*gaps: float, base: int = 1000, used: int = 0, fps: str = "native", mean: float = 16.0) -> str:
    """What the row says of a video with these gaps between frames, in milliseconds; `used` frames of it are."""
    times = tuple(accumulate((round(gap * base / 1000) for gap in gaps), initial=0))
    timeline = Timeline(times, (0,), Fraction(1, base))
    info = MediaInfo(832, 480, len(times), mean, timeline=timeline)
    return row(replace(source(), info=info, frame_indices=range(used or len(times)), rules=Rules(fps=fps)))[-1]


def test_uneven_frames_are_reported_by_their_longest_gap():
    uneven = "uneven: frames up to 0.10 s apart, see --fps auto"
    few = "frames up to 0.10 s apart, fewer than 16 fps there"
    half = [33.3] * 10 + [100] * 10
    assert timed(*half, base=90000) == timed(*half) == timed(*half[::-1]) == timed(*[33] * 16, 100) == uneven
    assert timed(*half, fps="auto") == few and timed(*half, fps="8") == "ok"
    assert timed(*half, fps="12") == "frames up to 0.10 s apart, fewer than 12 fps there"
    assert timed(*half, fps="auto", mean=12.0) == f"{few}, on average at 1.3x its speed"
    assert timed(*[20] * 10, *[60] * 10, fps="auto") == "ok"  # 60 ms are enough for 16 frames per second
    assert timed(*[33] * 10, *[100] * 6, used=11) == "ok" and timed(*[33] * 10, *[100] * 6, used=12) == uneven
    assert timed(*[20] * 16, *[100] * 4, mean=24.0) == f"will play at 0.67x its speed, {uneven}"


def test_even_frames_are_not_reported():
    for gaps in ([33, 33, 34] * 7, [62, 63] * 10, [60] * 16 + [89], [33, 50] * 10, [1, 2, 1, 1] * 5, [62.5] * 16):
        assert timed(*gaps) == "ok", gaps
    for gaps in ([33, 33, 34] * 7, [62, 63] * 10, [62] * 16 + [90]):
        assert timed(*gaps, fps="auto") == "ok", gaps


def test_held_out_clips_and_each_bad_file_have_a_row_of_their_own():
    problems = [
        Problem(Path("a/bad.mp4"), "broken"),
        Problem(Path("a/bad.mp4"), "mute"),
        Problem(Path("b.mp4"), "mute"),
    ]
    table = format_clips([window(source())], [window(source("owl.mp4", fps=8.0))], problems, 16.0)
    rows = table.splitlines()[2:]
    assert [line.split()[0] for line in rows] == ["fox.mp4", "owl.mp4", "bad.mp4", "b.mp4"]
    assert rows[1].endswith("held out, will play at 2x its speed")
    assert all(line.endswith("cannot be used, see below") for line in rows[2:])


def names(training: list[Path], held_out: list[Path] = (), bad: list[Path] = (), folder: Path = Path("clips")) -> list:
    def windows(paths: list[Path]) -> list[Window]:
        return [window(replace(source(), path=path, folder=folder)) for path in paths]

    problems = [Problem(path, "mute", folder) for path in bad]
    return [
        line.split()[0] for line in format_clips(windows(training), windows(held_out), problems, 16.0).splitlines()[2:]
    ]


def test_files_of_the_same_name_are_told_apart_by_their_paths():
    clips = Path("clips")
    paths = [clips / name for name in ("clip.mp4", "a/clip.mp4", "a/b/clip.mp4", "a/fox.mp4")]
    assert names(paths) == ["a/b/clip.mp4", "a/clip.mp4", "fox.mp4", "clip.mp4"]
    assert names(paths[:1], paths[1:2], paths[2:3]) == ["clip.mp4", "a/clip.mp4", "a/b/clip.mp4"]
    assert names(paths[:1], bad=[Path("masks/clip.mp4")]) == ["clip.mp4", "masks/clip.mp4"]
    assert names(paths[:1] * 2) == ["clip.mp4"] * 2  # at two resolutions


def test_files_of_the_same_name_in_two_parts_have_their_folder_in_front():
    parts = [Path(name) for name in ("x/one", "x/two", "y/one", "x/val")]
    clips = [replace(source(), path=part / "clip.mp4", folder=part) for part in parts]
    windows = [window(clip) for clip in clips]

    def seen(*numbers: int) -> list[str]:
        table = format_clips([windows[number] for number in numbers], [windows[3]], [], 16.0)
        return [line.split()[0] for line in table.splitlines()[2:]]

    assert seen(0, 1) == ["one/clip.mp4", "two/clip.mp4", "val/clip.mp4"]
    assert seen(2, 1, 0) == ["y/one/clip.mp4", "two/clip.mp4", "x/one/clip.mp4", "val/clip.mp4"]


def test_rows_are_in_natural_order_the_training_clips_first():
    paths = [Path("clips") / name for name in ("B1.mp4", "b10.mp4", "b2.mp4", "a3.mp4")]
    order = ["a3.mp4", "B1.mp4", "b2.mp4", "b10.mp4"]
    assert names(paths) == order
    assert names(paths[1:], paths[:1]) == ["a3.mp4", "b2.mp4", "b10.mp4", "B1.mp4"]
    assert names(paths[:2], paths[2:3], paths[3:]) == ["B1.mp4", "b10.mp4", "b2.mp4", "a3.mp4"]
    assert names(paths[:1], bad=paths[1:]) == ["B1.mp4", "a3.mp4", "b2.mp4", "b10.mp4"]


def test_buckets_are_counted_in_samples_and_batches_the_most_frequent_first():
    still, clips = source("a.png", fps=None, frames=1), [source(f"{number}.mp4", frames=81) for number in range(3)]
    batches = Plan([still, *clips], limits(1560 * 21, batch_size=2), 0).epoch(0)
    header, _, *rows = format_buckets(batches).splitlines()
    assert header.split() == ["bucket", "tokens", "samples", "batches"]
    assert [line.split() for line in rows[:2]] == [["832x480x81", "32760", "3", "2"], ["832x480x1", "1560", "1", "1"]]
    assert rows[-1] == "an epoch has 4 samples in 3 batches"


def test_the_plan_is_one_line():
    plan = Plan([source(), source("a.png", fps=None, frames=1)], limits(1560 * 21), 0)
    assert format_plan(plan, 2, 5) == "2 clips in 2 buckets, 2 steps per epoch; 5 steps of training (2.5 epochs)"
