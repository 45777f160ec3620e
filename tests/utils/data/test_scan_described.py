"""Scans of empty files: what they would hold is said here, so that nothing is decoded."""

import os
import unicodedata
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from tests.described import STILL, Described
from utils.data.folders import Folder, Rules
from utils.data.notices import format_notices
from utils.data.scan import Scan, survey
from utils.media.description import ANIMATION, Coverage, MediaInfo, Timeline

MOVING = MediaInfo(64, 48, 9, 16.0, ANIMATION)


def look(folder: Path, names: str, infos: dict[str, MediaInfo | str] | None = None, **rules) -> Scan:
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("a clip" if name.endswith(".txt") else "")
    return survey(Folder(folder, Rules(**rules)), 16.0, (), folder, Described(infos or {}))


def reasons(found: Scan) -> list[str]:
    return [f"{problem.path.name}: {problem.reason}" for problem in found.problems]


def pairs(found: Scan) -> list[list[str]]:
    return [[path.name for path in source.files] for source in found.sources]


def test_companions_are_found_in_any_letter_case_and_a_line_says_so(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    names = f"Clip_MASK.PNG clip.mp4 clip.txt {nfc}.mp4 {nfc}.txt {nfd}_mask.png b.mp4 b.txt b_mask.png"
    found = look(tmp_path, names, load_mask=True)
    assert pairs(found) == [["b.mp4", "b_mask.png"], ["clip.mp4", "Clip_MASK.PNG"], [f"{nfc}.mp4", f"{nfd}_mask.png"]]
    assert reasons(found) == []
    line = "the mask Clip_MASK.PNG for clip.mp4 is used, though letter case differs"
    assert format_notices(found.notices) == [line]


def test_names_that_are_no_text_are_paired_too(tmp_path):
    name = os.fsdecode(b"\xba\xfc")
    try:
        found = look(tmp_path, f"{name}.mp4 {name}.txt {name}_MASK.png", load_mask=True)
    except OSError:
        pytest.skip("file names of this system are text")
    assert pairs(found) == [[f"{name}.mp4", f"{name}_MASK.png"]]
    assert format_notices(found.notices)[0].startswith(r"the mask \udcba\udcfc_MASK.png for \udcba\udcfc.mp4 is used")


def test_a_start_picture_of_an_animation_is_known_after_inspection(tmp_path):
    names, infos = "a.webp a.txt a_first.png b.webp b.txt b_first.png b_first.txt", {"a.webp": MOVING, "b.webp": STILL}
    found = look(tmp_path, names, infos, load_first_frame=True)
    assert pairs(found) == [["a.webp", "a_first.png"], ["b.webp"], ["b_first.png"]] and found.notices == []
    found = look(tmp_path, names, infos)
    assert pairs(found) == [["a.webp"], ["b.webp"], ["b_first.png"]] and reasons(found) == []
    line = "the start picture a_first.png is not used: see --load_first_frame"
    assert format_notices(found.notices) == [line]
    (tmp_path / "c").mkdir()
    moving = look(tmp_path / "c", "c.mp4 c.txt c_first.webp", {"c_first.webp": MOVING}, load_first_frame=True)
    assert reasons(moving) == ["c_first.webp: it has no caption: write one to c_first.txt beside it"]


def test_an_animated_mask_has_frames_and_is_inspected_as_a_mask(tmp_path):
    for name in ("clip.mp4", "clip.txt", "clip_mask.gif"):
        (tmp_path / name).write_text("a clip")
    inspector = Described({"clip_mask.gif": replace(MOVING, mask=Coverage("brightness", 0.5, 0, 255))})
    found = survey(Folder(tmp_path, Rules(load_mask=True)), 16.0, inspector=inspector)
    assert inspector.masks == {tmp_path / "clip_mask.gif"}
    assert [len(source.frame_indices) for source in found.sources] == [9]
    inspector.infos["clip_mask.gif"] = replace(MOVING, mask=Coverage("brightness", 0.01, 0, 15))
    found = survey(Folder(tmp_path, Rules(load_mask=True)), 16.0, inspector=inspector)
    assert reasons(found) == ["clip.mp4: its mask clip_mask.gif: it is black all over, so nothing would count"]


def test_notices_of_pairs_say_where_they_are(tmp_path):
    names = "a/clip.mp4 a/clip.txt a/clip_mask.png b/clip.mp4 b/clip.txt b/CLIP_mask.png"
    found = look(tmp_path, names, load_mask=True)
    line = "the mask b/CLIP_mask.png for b/clip.mp4 is used, though letter case differs"
    assert format_notices(found.notices) == [line]


@pytest.mark.parametrize(
    ("names", "rules", "clips", "said"),
    [
        ("clip_mask.png", {}, "clip.mp4", ["the mask clip_mask.png is not used: see --load_mask"]),
        ("Clip_CONTROL.mp4", {}, "clip.mp4", ["the control Clip_CONTROL.mp4 is not used: see --load_control"]),
        (
            "clip_mask.png",
            {"captions": "filename"},
            "clip.mp4",
            ["the mask clip_mask.png is not used: see --load_mask"],
        ),
        ("clip-m.png", {"mask_suffix": "-m"}, "clip.mp4", ["the mask clip-m.png is not used: see --load_mask"]),
        (
            *("clip_first.png clip_mask.png clip_control.mp4 clip_mask_mask.png", {}, "clip.mp4"),
            [
                "the start picture clip_first.png is not used: see --load_first_frame",
                "the control clip_control.mp4 is not used: see --load_control",
                "2 masks such as clip_mask.png are not used: see --load_mask",
            ],
        ),
        ("clip_mask.png clip_mask.txt", {}, "clip.mp4 clip_mask.png", []),
        ("clip_mask.png captions/clip_mask.txt", {}, "clip.mp4 clip_mask.png", []),
        ("clip_first.png", {"load_first_frame": True}, "clip.mp4", []),
    ],
)
def test_companions_that_the_rules_do_not_ask_for_are_notices(tmp_path, names, rules, clips, said):
    found = look(tmp_path, f"clip.mp4 clip.txt {names}", **rules)
    assert [source.path.name for source in found.sources] == clips.split() and reasons(found) == []
    assert format_notices(found.notices) == said


def test_a_name_like_a_mask_is_one_of_a_clip_beside_it_alone(tmp_path):
    found = look(tmp_path, "clip.mp4 clip.txt gas_mask.mp4 sub/clip_mask.png clip_mask.png")
    assert reasons(found) == [
        "gas_mask.mp4: it has no caption: write one to gas_mask.txt beside it",
        "clip_mask.png: it has no caption: write one to clip_mask.txt beside it",
    ]
    assert {problem.path.parent.name for problem in found.problems} == {tmp_path.name, "sub"}
    assert {problem.folder for problem in found.problems} == {tmp_path}


def test_masks_beside_the_clips_are_not_used_where_a_folder_is_given(tmp_path):
    found = look(tmp_path, "x/clip.mp4 x/clip.txt x/clip_mask.png masks/clip.png", mask_folder=tmp_path / "masks")
    assert [path.relative_to(tmp_path).as_posix() for path in found.sources[0].files] == [
        "x/clip.mp4",
        "masks/clip.png",
    ]
    assert format_notices(found.notices) == ["the mask x/clip_mask.png is not used, as --mask_folder is given"]


def test_what_is_not_read_and_captions_without_a_clip_are_lines_and_no_problems(tmp_path):
    found = look(tmp_path, "clip.mp4 clip.txt old.txt pic.heic pic.txt sub/b.psd sub/c.png sub/c.txt sub/d.txt")
    assert pairs(found) == [["clip.mp4"], ["c.png"]] and reasons(found) == []
    assert format_notices(found.notices) == [
        "2 files such as pic.heic are not read, as no decoder here knows the format: "
        "convert pictures to PNG or JPEG, videos to MP4",
        "2 caption files such as old.txt are not used, as no clip has this name",
    ]
    assert len(format_notices(look(tmp_path, "", captions="filename").notices)) == 1


def test_links_and_folders_that_cannot_be_followed_are_problems_once(tmp_path, monkeypatch):
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "clips").symlink_to("../gone")
    names = "a.mp4 a.txt loop.txt locked/b.mp4"
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = look(tmp_path, names)
    assert pairs(found) == [["a.mp4"]] and found.notices == []
    assert reasons(found) == [
        "locked: the folder cannot be read: Permission denied",
        "clips: it is a link to ../gone, and nothing is there",
        "loop.mp4: it is a link that leads to itself",
    ]


def test_a_mask_folder_has_its_own_faults_and_unread_files(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").symlink_to("b.png")
    names = "clips/a.mp4 clips/a.txt masks/x.psd masks/c.png"
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a clip")
    found = survey(Folder(tmp_path / "clips", Rules(mask_folder=tmp_path / "masks")), 16.0, inspector=Described({}))
    assert reasons(found) == ["a.mp4: its mask a.png: it is a link to b.png, and nothing is there"]
    assert [line.split(",")[0] for line in format_notices(found.notices)] == ["the file x.psd is not read"]


def times(*milliseconds: int) -> Timeline:
    return Timeline(milliseconds, (0,), Fraction(1, 1000))


@pytest.mark.parametrize(
    ("infos", "rules", "reason"),
    [
        ({}, {}, None),
        ({"a.mp4": MediaInfo(64, 48, 17, 64.0)}, {"fps": "auto"}, None),
        (
            {"a.mp4": MediaInfo(64, 48, 16, 64.0)},
            *({"fps": "auto"}, "only 4 of its 16 frames are left at 16 frames per second"),
        ),
        ({}, {"frame_stride": 14}, None),
        ({}, {"frame_stride": 15}, "only 4 of its 60 frames are left with --frame_stride 15"),
        ({}, {"max_duration": 0.001}, "only 1 of its 60 frames is left in its first 0.001 s"),
        ({}, {"max_duration": 0.22}, None),
        (
            *({}, {"max_duration": 1.0, "fps": "3"}),
            "only 4 of its 60 frames are left at 3 frames per second in its first 1 s",
        ),
        (
            {"a_control.mp4": MediaInfo(64, 48, 9, 16.0)},
            {"load_control": True, "fps": "4"},
            "only 3 of its 60 frames are left at 4 frames per second before its control ends",
        ),
        (
            {"a.mp4": MediaInfo(64, 48, 6, 10.0, ANIMATION, timeline=times(0, 10, 20, 30, 40, 500))},
            *({"fps": "auto"}, "only 3 of its 6 frames are left at 16 frames per second"),
        ),
        ({"a.mp4": STILL}, {"fps": "auto", "max_duration": 0.001}, None),
    ],
)
def test_a_video_with_too_few_frames_left_is_refused_with_the_reason(tmp_path, infos, rules, reason):
    found = look(tmp_path, "a.mp4 a.txt" + " a_control.mp4" * ("load_control" in rules), infos, **rules)
    assert reasons(found) == ([f"a.mp4: {reason}: a video needs at least 5"] if reason else [])
    assert len(found.sources) == (reason is None)


def test_a_file_with_neither_times_nor_a_rate_is_a_problem_of_its_own(tmp_path):
    found = look(tmp_path, "a.mp4 a.txt b.mp4 b.txt", {"a.mp4": MediaInfo(64, 48, 9, None)}, fps="auto")
    assert reasons(found) == ["a.mp4: it has no timestamps and no frame rate"] and pairs(found) == [["b.mp4"]]
