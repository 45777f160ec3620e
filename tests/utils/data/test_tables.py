"""What is printed about a dataset, for sources that exist nowhere."""

from dataclasses import replace
from pathlib import Path

from tests.limits import limits
from utils.data.folders import Rules
from utils.data.plan import Plan, Window, middle_window
from utils.data.scan import PairedFile, Problem, Source
from utils.data.tables import format_buckets, format_clips, format_plan
from utils.media.probing import MediaInfo


def source(
    name: str = "fox.mp4", fps: float | None = 16.0, frames: int = 89, caption: str = "a fox", **rules
) -> Source:
    info = MediaInfo(832, 480, frames, fps)
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
    assert row(source(fps=17.0))[-1] == "ok"
    assert row(replace(source(fps=8.0), rules=Rules(fps="auto")))[-1] == "below 16 fps: all its frames are used"
    short = PairedFile(Path("mask.mp4"), MediaInfo(832, 480, 60, 16.0))
    assert row(replace(source(), mask=short))[-1] == "its control or mask ends after 60 frames"
    still = PairedFile(Path("mask.png"), MediaInfo(832, 480, 1, None))
    assert row(replace(source(), mask=still))[-1] == "ok"
    assert row(source(max_duration=5.0))[-1] == "used up to 5 s"
    assert row(source(frames=81, max_duration=5.0))[-1] == row(source("a.png", None, 1, max_duration=5.0))[-1] == "ok"
    start = PairedFile(Path("clips/fox_first.png"), MediaInfo(832, 480, 1, None))
    assert row(replace(source(), first=start))[-1] == "begins with fox_first.png"
    small = replace(source(enlarge=True), info=MediaInfo(416, 240, 89, 24.0))
    assert row(small)[-1] == "will play at 0.67x its speed, see --fps auto, enlarged 2x"


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
