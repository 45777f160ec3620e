"""Prompts and images as clips without pixels: which videos they stand for, and what is refused beside them."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.media import image, video
from utils.common.errors import UserError
from utils.data.buckets import ASPECTS
from utils.data.dataset import Dataset, open_dataset, open_prompts
from utils.data.folders import DatasetOptions, Folder, Rules
from utils.data.plan import Limits, Plan, make_plan
from utils.data.prompts import PromptOptions, check_prompts, prompt_sources, read_prompt_list, video_frames
from wan.configs import FAMILIES

T2V, TI2V = FAMILIES["wan2.1-t2v-1.3B"], FAMILIES["wan2.2-ti2v-5B"]
I2V, FLF2V = FAMILIES["wan2.1-i2v-14B-480P"], FAMILIES["wan2.1-flf2v-14B-720P"]
TEXT = "a red fox\n\n  a hare runs \n\u200b\na red fox\n"
WHOLE = 832 * 480 // 256 * 21  # tokens of 81 frames


def listed(folder: Path, text: str = TEXT, name: str = "prompts.txt") -> PromptOptions:
    (folder / name).write_text(text, encoding="utf-8")
    return PromptOptions(folder / name)


def opened(folder: Path, rules: Rules | None = None, token_limit: int = WHOLE, family=T2V, **options) -> Dataset:
    prompts = replace(listed(folder), **options)
    return open_prompts(prompts, rules or Rules(), Limits(token_limit, 1, family.grid), family)


# ------------------------------------------------------------------------------------------------------------ the list


def test_each_line_that_shows_something_is_a_prompt_also_one_that_is_there_twice(tmp_path):
    assert read_prompt_list(listed(tmp_path).prompts) == ["a red fox", "a hare runs", "a red fox"]
    windows_made = tmp_path / "notepad.TXT"
    windows_made.write_bytes(b"\xef\xbb\xbfa red fox\r\na hare\r\n")
    assert read_prompt_list(windows_made) == ["a red fox", "a hare"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no prompt: write one per line"),
        ("p.txt", "\n \u200b\n".encode(), "holds no prompt: write one per line"),
        ("p.txt", "ein Fuchs läuft".encode("latin-1"), "is not UTF-8 text: save it as UTF-8"),
        ("p.txt", "a fox".encode("utf-16"), "is not UTF-8 text: save it as UTF-8"),
        ("p.txt", None, "cannot be read: No such file"),
        ("p.csv", b"a fox", "is not a .txt file with one prompt per line"),
    ],
)
def test_a_list_that_holds_no_prompts_is_refused_by_its_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompt_list(tmp_path / name)
    assert name in str(caught.value)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("few_step", "rolls_out"), [(False, False), (False, True), (True, False)])
def test_prompts_are_for_students_that_start_from_their_own_samples(few_step, rolls_out):
    given = PromptOptions(Path("prompts.txt"))
    with pytest.raises(UserError, match="--prompts requires --few_step with --distill_input rollout"):
        check_prompts(given, DatasetOptions(), Rules(), few_step, rolls_out)
    check_prompts(given, DatasetOptions(), Rules(), few_step=True, rolls_out=True)
    check_prompts(PromptOptions(), DatasetOptions(Path("clips")), Rules(fps="auto"), few_step, rolls_out)


def other_value(spec) -> object:
    """A value that is not the default of a rule."""
    kinds = {bool: True, float: 0.5, int: 7, str: "other", tuple: (320,), type(None): Path("x")}
    return kinds[type(spec.default)]


HEEDED = {"base_res", "buckets", "min_ar", "max_ar", "max_frames", "random_frame_length", "repeats"} | {
    "caption_prefix",
    "caption_dropout",
}


@pytest.mark.parametrize("spec", fields(Rules), ids=lambda spec: spec.name)
def test_a_rule_about_clips_is_refused_beside_prompts(spec):
    rules = replace(Rules(), **{spec.name: other_value(spec), "buckets": "fine"})
    given = PromptOptions(Path("prompts.txt"))
    if spec.name in HEEDED:
        return check_prompts(given, DatasetOptions(), rules, True, True)
    with pytest.raises(UserError, match=f"--{spec.name} has no effect with --prompts: there are no clips"):
        check_prompts(given, DatasetOptions(), rules, True, True)


def test_what_belongs_to_a_folder_is_refused_beside_prompts():
    given = PromptOptions(Path("prompts.txt"))
    folders = [
        DatasetOptions(Path("clips")),
        DatasetOptions(dataset_config=Path("sets.toml")),
        DatasetOptions(skip_bad_files=True),
        DatasetOptions(decode_check="fast"),
    ]
    names = ("dataset", "dataset_config", "skip_bad_files", "decode_check")
    for name, folder in zip(names, folders, strict=True):
        with pytest.raises(UserError, match=f"--{name} has no effect with --prompts: give one of them"):
            check_prompts(given, folder, Rules(), True, True)
    check_prompts(given, DatasetOptions(check_dataset=True), Rules(), True, True)
    with pytest.raises(UserError, match="--min_ar requires --buckets fine"):
        check_prompts(given, DatasetOptions(), Rules(min_ar=0.7), True, True)


@pytest.mark.parametrize(("family", "needed"), [(I2V, "pictures"), (FLF2V, "videos")], ids=["i2v", "flf2v"])
def test_a_model_that_is_always_given_frames_needs_those(tmp_path, family, needed):
    with pytest.raises(UserError, match=f"a prompt has none:\ngive a folder of {needed} with captions"):
        prompt_sources(listed(tmp_path), Rules(), family)


# ------------------------------------------------------------------------------------------------- what prompts become


def test_prompts_are_videos_of_the_released_size_and_length(tmp_path, capsys):
    data = opened(tmp_path)
    assert [window.bucket for window in data.windows] == [(832, 480, 81)] * 3
    assert data.captions == ["a red fox", "a hare runs", "a red fox"] and data.val == [] and data.num_images == 0
    assert data.clips_by_folder == {"prompts.txt": 3} and data.cache_folder == tmp_path / ".wan_cache"
    rows = [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in capsys.readouterr().out.splitlines()
    ]
    assert rows[2] == ["prompts.txt", "3", "81", "832x480", f"{WHOLE}", "a red fox", "1 line repeated"]
    assert ["832x480x81", f"{WHOLE}", "3", "3"] in rows and rows[-1] == ["an epoch has 3 samples in 3 batches"]


@pytest.mark.parametrize("shape", ASPECTS)
@pytest.mark.parametrize("buckets", ["wan", "fine"])
def test_prompts_have_the_shape_that_is_asked_for_at_any_size(tmp_path, shape, buckets):
    across, down = map(int, shape.split(":"))
    for family, side in ((T2V, 16), (TI2V, 32)):
        rules = Rules(base_res=(64, 1600), buckets=buckets, max_frames=1)
        data = opened(tmp_path, rules, family=family, prompt_shape=shape)
        for window in data.windows:
            assert window.width % side == window.height % side == 0
        large = data.windows[1]
        assert large.width * large.height == pytest.approx(1600**2, rel=0.05)
        assert large.width / large.height == pytest.approx(across / down, rel=0.09)


@pytest.mark.parametrize(("family", "frames"), [(T2V, 81), (TI2V, 121)], ids=["t2v", "ti2v"])
def test_the_length_is_the_familys_or_what_max_frames_says(tmp_path, family, frames, capsys):
    assert video_frames(Rules(), family) == frames and video_frames(Rules(max_frames=1), family) == 1
    data = opened(tmp_path, Rules(max_frames=8), family=family)
    assert {window.frames for window in data.windows} == {9} and data.train[0].info.fps == family.fps
    assert "--max_frames 8: 9 frames, as the model takes 4n + 1" in capsys.readouterr().out


def test_the_token_limit_bounds_the_length_and_the_table_says_so(tmp_path, capsys):
    data = opened(tmp_path, token_limit=10_000)
    assert {window.bucket for window in data.windows} == {(832, 480, 21)}
    said = capsys.readouterr().out
    assert "81 -> 21" in said and f"81 frames need --token_limit {WHOLE}" in said
    with pytest.raises(UserError, match=r"prompts.txt: one frame of 832x480 takes 1560 tokens"):
        opened(tmp_path, token_limit=1000)


def test_the_plan_of_prompts_is_the_same_every_time_and_uses_each_once(tmp_path):
    rules = Rules(base_res=(64, 96), max_frames=17, random_frame_length=True, caption_prefix="kelo, ")
    first, second = (make_plan(opened(tmp_path, rules).train, Limits(WHOLE, 2, T2V.grid), 5, 0) for _ in range(2))
    for epoch in range(3):
        batches = first.epoch(epoch)
        assert batches == second.epoch(epoch)
        captions = sorted(window.caption for batch in batches for window in batch)
        assert captions == ["kelo, a hare runs", "kelo, a red fox", "kelo, a red fox"]
        assert all(window.indices == tuple(range(window.frames)) for batch in batches for window in batch)
    assert first.epoch(0) != first.epoch(1) != replace(first, seed=6).epoch(1)
    assert first.largest_batch[0].frames == 17


def test_the_fingerprint_changes_with_whatever_changes_a_sample(tmp_path):
    prints = [opened(tmp_path).fingerprint, opened(tmp_path, Rules(max_frames=9)).fingerprint]
    prints += [opened(tmp_path, Rules(base_res=(320,))).fingerprint, opened(tmp_path, family=TI2V).fingerprint]
    assert [set(found) for found in prints] == [{"prompts.txt"}] * 4
    assert opened(tmp_path).fingerprint == prints[0]
    (tmp_path / "elsewhere").mkdir()
    assert opened(tmp_path / "elsewhere").fingerprint == prints[0]
    other = open_prompts(listed(tmp_path, "a hare\na red fox"), Rules(), Limits(WHOLE, 1, T2V.grid), T2V)
    assert len({found["prompts.txt"] for found in [*prints, other.fingerprint]}) == 5


# -------------------------------------------------------------------------------------------------- what images become


@pytest.fixture
def mixed(tmp_path) -> Path:
    image(tmp_path / "a.png", size=(320, 192))
    image(tmp_path / "b.png", size=(64, 96), caption="a tower")
    video(tmp_path / "c.mp4", frames=14)
    return tmp_path


def look(folder: Path, family, rules: Rules, token_limit: int = 10_000, **options) -> Dataset:
    limits = Limits(token_limit, 1, family.grid)
    return open_dataset([Folder(folder, rules)], limits, family.fps, student=family, **options)


@pytest.mark.parametrize("family", [T2V, I2V, TI2V], ids=lambda family: family.task)
def test_an_image_stands_for_a_video_of_its_own_shape_and_a_video_for_itself(mixed, family, capsys):
    data = look(mixed, family, Rules(base_res=(192,), max_frames=17))
    sizes = {window.source.path.name: window.bucket for window in data.windows}
    assert {name: frames for name, (_, _, frames) in sizes.items()} == {"a.png": 17, "b.png": 17, "c.mp4": 13}
    assert sizes["a.png"][0] > sizes["a.png"][1] and sizes["b.png"][0] < sizes["b.png"][1]
    assert data.num_images == 2 and "1 -> 17" in capsys.readouterr().out
    whole = {window.source.path.name: window.frames for window in look(mixed, family, Rules(base_res=(192,))).windows}
    assert whole == {"a.png": family.frames, "b.png": family.frames, "c.mp4": 13}


def test_an_image_is_one_sample_however_clips_are_covered(mixed):
    rules = Rules(base_res=(64,), frame_sampling="chunks", fps="auto")
    data = look(mixed, T2V, rules, token_limit=30)  # two latent frames of an image, three of the video
    windows = [window for batch in Plan(data.train, Limits(30, 1, T2V.grid), 0).epoch(0) for window in batch]
    names = [window.source.path.name for window in windows]
    assert sorted(names) == ["a.png", "b.png", "c.mp4", "c.mp4"]
    assert {window.indices[0] for window in windows if window.source.info.is_image} == {0}


def test_the_table_says_where_the_token_limit_cuts_an_image_short(mixed, capsys):
    look(mixed, T2V, Rules(base_res=(64,)), token_limit=60)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "81 frames need --token_limit" in lines["a.png"] and "need" not in lines["c.mp4"]


def test_an_image_of_a_run_that_does_not_roll_out_stays_an_image(mixed):
    data = open_dataset([Folder(mixed, Rules(base_res=(64,)))], Limits(1000, 1, T2V.grid), T2V.fps)
    assert [window.frames for window in data.windows] == [1, 1, 13]


def test_a_model_that_is_given_the_last_frame_takes_videos_and_no_images(mixed, capsys):
    reason = "a.png: an image has no last frame, which this model is given too: only videos can be used"
    with pytest.raises(UserError, match=reason):
        look(mixed, FLF2V, Rules(base_res=(64,)))
    data = look(mixed, FLF2V, Rules(base_res=(64,)), skip_bad_files=True)
    assert [source.path.name for source in data.train] == ["c.mp4"] and reason in capsys.readouterr().out
