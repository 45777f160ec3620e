"""Folders are made here, with tiny videos."""

from pathlib import Path

import pytest
import torch

from tests.media import image, video
from utils.common.errors import UserError
from utils.data.folders import Folder, Rules
from utils.data.scan import Problem, Source, scan
from utils.media.frames import write_video


def look(folder: Path, exclude: list[Path] | None = None, **rules) -> tuple[list[Source], list[Problem]]:
    return scan(Folder(folder, Rules(**rules)), 16.0, exclude or [])


def reasons(problems) -> dict[str, str]:
    return {problem.path.name: problem.reason for problem in problems}


def test_a_folder_is_scanned_recursively_in_order_without_hidden_things(tmp_path):
    video(tmp_path / "b" / "UPPER.MP4", caption="\ufeff  ein Hund, ü \n")
    image(tmp_path / "a" / "pic one.JPG")
    for hidden in (".wan_cache/x.mp4", ".secret/y.mp4", "a/._z.mp4"):
        video(tmp_path / hidden)
    sources, problems = look(tmp_path)
    assert [(s.path.name, *s.captions, s.info.frames) for s in sources] == [
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
    sources, problems = look(tmp_path)
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
    assert len(look(tmp_path)[1]) == 2


def test_controls_are_paired_by_name_and_never_trained_on(tmp_path):
    video(tmp_path / "a.mp4", frames=9)
    video(tmp_path / "a_control.mov", frames=5, size=(32, 24), caption=None)
    image(tmp_path / "b.png")
    image(tmp_path / "b_control.jpg", caption=None)
    sources, problems = look(tmp_path, load_control=True)
    assert problems == []
    assert [(s.path.name, s.control.path.name, len(s.frame_indices)) for s in sources] == [
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
    sources, problems = look(tmp_path, load_control=True)
    words = {
        "alone.mp4": "no control",
        "kind.mp4": "must be a video",
        "short.mp4": "3 frames",
        "broken.mp4": "the file is empty",
        "twice.mp4": "several controls",
        "stray_control.mp4": "no clip for this control",
    }
    found = reasons(problems)
    assert sources == [] and found.keys() == words.keys()
    assert all(word in found[name] for name, word in words.items()), found


def test_another_control_suffix_can_be_named_but_not_an_empty_one(tmp_path):
    video(tmp_path / "a.mp4")
    video(tmp_path / "a.depth.mp4", caption=None)
    assert len(look(tmp_path, load_control=True, control_suffix=".depth")[0]) == 1
    with pytest.raises(UserError, match="suffix is empty"):
        look(tmp_path, load_control=True, control_suffix="")


def test_an_empty_or_missing_folder_says_where_and_what_is_read(tmp_path):
    with pytest.raises(UserError, match=r"no videos or images .*: docs/formats\.md lists what is read$") as caught:
        look(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        look(tmp_path / "nowhere")


def test_linked_folders_are_followed_but_never_in_a_circle(tmp_path):
    video(tmp_path / "elsewhere" / "a.mp4")
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (dataset / "again").symlink_to(dataset, target_is_directory=True)
    assert [s.path for s in look(dataset)[0]] == [dataset / "linked" / "a.mp4"]


def test_validation_files_are_never_training_sources(tmp_path):
    video(tmp_path / "a.mp4")
    video(tmp_path / "validation" / "b.mp4")
    assert [s.path.name for s in look(tmp_path, [tmp_path / "validation"])[0]] == ["a.mp4"]


def test_masks_and_controls_come_from_folders_of_their_own(tmp_path):
    video(tmp_path / "clips" / "deep" / "a.mp4", frames=9)
    video(tmp_path / "clips" / "b.mp4", frames=9)
    video(tmp_path / "edges" / "a.mp4", frames=7, caption=None)
    video(tmp_path / "edges" / "b.mov", frames=9, caption=None)
    image(tmp_path / "masks" / "a.png", caption=None)
    video(tmp_path / "masks" / "b.mp4", frames=6, caption=None)
    folders = {"control_folder": tmp_path / "edges", "mask_folder": tmp_path / "masks"}
    sources, problems = look(tmp_path / "clips", **folders)
    assert problems == []
    named = {s.path.name: (s.control.path.name, s.mask.path.name, len(s.frame_indices)) for s in sources}
    assert named == {"a.mp4": ("a.mp4", "a.png", 7), "b.mp4": ("b.mov", "b.mp4", 6)}
    image(tmp_path / "masks" / "of_another_folder.png", caption=None)
    (tmp_path / "masks" / "b.mp4").unlink()
    problems = reasons(look(tmp_path / "clips", **folders)[1])
    assert list(problems) == ["b.mp4"] and "it has no mask named b.* in" in problems["b.mp4"]


def test_the_frames_of_a_folder_with_a_rate_are_those_at_its_times(tmp_path):
    ramp = torch.arange(0, 240, 4, dtype=torch.uint8)[:, None, None, None].expand(60, 3, 48, 64)
    for name, fps in (("slow", 8), ("own", 16), ("fast", 48)):
        write_video(tmp_path / f"{name}.mp4", ramp, fps)
        (tmp_path / f"{name}.txt").write_text("a ramp")
    image(tmp_path / "still.png")
    for rate, expected in (("native", (60, 60, 60)), ("auto", (60, 60, 20)), ("24", (60, 60, 30))):
        shown = {source.path.stem: source.frame_indices for source in look(tmp_path, fps=rate)[0]}
        assert tuple(len(shown[name]) for name in ("slow", "own", "fast")) == expected, rate
        assert list(shown["still"]) == [0]
    with pytest.raises(UserError, match="--fps must be native, auto or a number"):
        look(tmp_path, fps="often")


def test_a_prefix_goes_before_every_caption(tmp_path):
    video(tmp_path / "a.mp4", caption="fox\nhare")
    assert look(tmp_path, caption_prefix="kelo, ")[0][0].captions == ("kelo, fox\nhare",)
    assert look(tmp_path, caption_prefix="kelo, ", caption_per_line=True)[0][0].captions == ("kelo, fox", "kelo, hare")


def test_a_listing_that_does_not_agree_is_a_problem_of_its_own(tmp_path):
    video(tmp_path / "a.mp4", caption=None)
    (tmp_path / "captions.txt").write_text("one\ntwo")
    problems = reasons(look(tmp_path)[1])
    assert set(problems) == {"a.mp4", "captions.txt"} and "2 lines for 1" in problems["captions.txt"]


def test_a_start_picture_belongs_to_the_video_that_has_one(tmp_path):
    video(tmp_path / "a.mp4")
    picture = image(tmp_path / "a_first.JPG", size=(128, 96))
    video(tmp_path / "deep" / "b.mp4")
    video(tmp_path / "deep" / "b_first.mp4")
    image(tmp_path / "still.png")
    image(tmp_path / "still_first.png")
    sources, problems = look(tmp_path, load_first_frame=True)
    assert problems == []
    assert {s.path.name: s.first and s.first.path.name for s in sources} == {
        **{"a.mp4": "a_first.JPG", "b.mp4": None, "b_first.mp4": None},
        **{"still.png": None, "still_first.png": None},
    }
    (first,) = (s for s in sources if s.first)
    assert first.files == [tmp_path / "a.mp4", picture] and first.first.info.width == 128


def test_a_bad_start_picture_is_a_problem_of_its_video(tmp_path):
    for name in ("broken", "shape", "twice"):
        video(tmp_path / f"{name}.mp4")
    (tmp_path / "broken_first.png").write_text("not a picture")
    image(tmp_path / "shape_first.png", caption=None, size=(64, 64))
    image(tmp_path / "twice_first.png", caption=None)
    image(tmp_path / "twice_first.jpg", caption=None)
    sources, problems = look(tmp_path, load_first_frame=True)
    words = {
        "broken.mp4": "its start picture broken_first.png: not a readable image",
        "shape.mp4": "its start picture shape_first.png: its aspect ratio differs: 64x64 and 64x48",
        "twice.mp4": "it has several start pictures, twice_first.jpg and twice_first.png: keep one",
    }
    found = reasons(problems)
    assert sources == [] and found.keys() == words.keys()
    assert all(word in found[name] for name, word in words.items()), found


@pytest.mark.parametrize("listing", ["", "captions.txt", "metadata.jsonl"])
def test_start_pictures_that_are_not_used_are_reported_in_one_line(tmp_path, capsys, listing):
    for name in ("a", "b", "c"):
        video(tmp_path / f"{name}.mp4", caption=None if listing else "a clip")
        image(tmp_path / f"{name}_first.png", caption=None)
    rows = [f'{{"file_name": "{name}.mp4", "text": "a clip"}}' for name in "abc"]
    if listing:
        (tmp_path / listing).write_text("\n".join(rows if listing == "metadata.jsonl" else ["a clip"] * 3))
    sources, problems = look(tmp_path)
    assert problems == [] and [s.path.name for s in sources] == ["a.mp4", "b.mp4", "c.mp4"]
    assert all(s.first is None for s in sources)
    line = "3 start pictures such as a_first.png are not used: see --load_first_frame\n"
    assert capsys.readouterr().out == line


def test_a_start_picture_with_a_caption_of_its_own_is_an_ordinary_sample(tmp_path, capsys):
    video(tmp_path / "a.mp4")
    image(tmp_path / "a_first.png", caption="a start")
    video(tmp_path / "b.mp4")
    image(tmp_path / "b_first.png", caption="")
    sources, problems = look(tmp_path)
    assert [s.path.name for s in sources] == ["a.mp4", "a_first.png", "b.mp4"] and sources[1].captions == ("a start",)
    assert "is empty" in reasons(problems)["b_first.png"] and capsys.readouterr().out == ""


def test_lines_for_start_pictures_are_captions_of_their_own(tmp_path, capsys):
    video(tmp_path / "a.mp4", caption=None)
    image(tmp_path / "a_first.png", caption=None)
    (tmp_path / "captions.txt").write_text("one\ntwo")
    sources, problems = look(tmp_path)
    assert problems == [] and [s.captions for s in sources] == [("one",), ("two",)]
    assert capsys.readouterr().out == ""


def test_a_caption_of_a_start_picture_may_be_in_any_of_the_usual_places(tmp_path, capsys):
    train = tmp_path / "train"
    video(train / "a.mp4")
    image(train / "a_first.png", caption=None)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "train/a_first.png", "text": ["one", "two"]}')
    sources, problems = scan(Folder(train, Rules(caption_per_line=True)), 16.0, dataset=tmp_path)
    assert problems == [] and [s.captions for s in sources] == [("a clip",), ("one", "two")]
    assert capsys.readouterr().out == ""


def test_a_file_name_is_no_caption_of_a_start_picture(tmp_path, capsys):
    video(tmp_path / "a_fox.mp4", caption=None)
    image(tmp_path / "a_fox_first.png", caption=None)
    image(tmp_path / "coming_first.png", caption=None)
    sources, problems = look(tmp_path, captions="filename")
    assert problems == [] and [s.captions for s in sources] == [("a fox",), ("coming first",)]
    assert "the start picture a_fox_first.png is not used: see" in capsys.readouterr().out


def test_only_the_first_seconds_of_each_clip_are_used(tmp_path):
    for name, fps in (("slow", 8), ("fast", 48)):
        video(tmp_path / f"{name}.mp4", frames=60, fps=fps)
    video(tmp_path / "short.mp4", frames=9)
    image(tmp_path / "still.png")
    expected = {
        ("native", 1.0): (9, 49, 9, 1),
        ("auto", 1.0): (9, 17, 9, 1),
        ("24", 1.0): (9, 25, 9, 1),
        ("native", 0.0): (60, 60, 9, 1),
    }
    for (fps, seconds), counts in expected.items():
        sources, problems = look(tmp_path, fps=fps, max_duration=seconds)
        used = {s.path.stem: s.frame_indices for s in sources}
        assert problems == [] and tuple(len(used[name]) for name in ("slow", "fast", "short", "still")) == counts
        assert all(indices[0] == 0 for indices in used.values())
    assert [s.frame_indices[-1] for s in look(tmp_path, fps="auto", max_duration=1.0)[0]] == [48, 8, 8, 0]


def test_frames_end_at_the_shorter_of_a_control_and_the_duration(tmp_path):
    video(tmp_path / "a.mp4", frames=20)
    video(tmp_path / "a_control.mp4", frames=7, caption=None)
    for seconds, frames in ((0.25, 5), (1.0, 7)):
        ((source,), _) = look(tmp_path, load_control=True, max_duration=seconds)
        assert source.frame_indices == range(frames)
