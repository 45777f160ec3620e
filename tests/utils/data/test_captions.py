import os
import unicodedata
from pathlib import Path

import pytest

from utils.data.captions import find_captions, find_orphans


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path


def media(folder: Path, *names: str) -> list[Path]:
    """Paths of media files in sorted order: captions are found without looking into them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return sorted((folder / name for name in names), key=lambda path: path.relative_to(folder).parts)


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def texts(folder: Path, paths: list[Path], **options) -> dict[str, tuple[str, ...]]:
    found = find_captions(folder, paths, **options)
    assert not found.problems and not found.file_problems
    return {path.relative_to(folder).as_posix(): text for path, text in found.texts.items()}


LAYOUTS = {
    "beside": {"a.txt": "fox", "b.TXT": "\ufeffhare\r\n"},
    "a folder beside the media": {"captions/a.txt": "fox", "captions/b.txt": "hare"},
    "a line each": {"captions.txt": "fox\nhare\n"},
    "jsonl": {"metadata.jsonl": '{"file_name": "b.mp4", "text": "hare"}\n\n{"video": "./a.mp4", "prompt": "fox"}\n'},
    "json": {"metadata.json": '[{"file_path": "a.mp4", "text": "fox"}, {"file_path": "b.mp4", "caption": ["hare"]}]'},
    "csv": {"metadata.csv": 'video,prompt\na.mp4,fox\nb.mp4,"hare"\n'},
    "another csv": {"Captions.CSV": "filename;text\na.mp4;fox\nb.mp4;hare\n"},
    "each its own": {"a.txt": "fox", "metadata.csv": "file_name,text\nb.mp4,hare\n"},
    "the same twice": {"a.txt": "fox", "b.txt": "hare", "captions.txt": "fox\nhare"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(folder, layout):
    paths = media(folder, "a.mp4", "b.mp4")
    write(folder, LAYOUTS[layout])
    assert texts(folder, paths) == {"a.mp4": ("fox",), "b.mp4": ("hare",)}


def test_a_captions_folder_may_be_beside_the_media_folder_but_never_above_the_dataset(folder):
    paths = media(folder / "set", "videos/a.mp4", "videos/deep/b.mp4", "c.mp4")
    write(folder, {"set/captions/a.txt": "fox", "set/videos/captions/b.txt": "hare", "captions/c.txt": "not ours"})
    found = find_captions(folder / "set", paths)
    assert [text for (text,) in found.texts.values()] == ["fox", "hare"]
    assert found.problems == {folder / "set" / "c.mp4": "it has no caption: write one to c.txt beside it"}


def test_lines_of_one_listing_belong_to_the_files_in_sorted_order_and_must_agree_in_number(folder):
    paths = media(folder, "videos/b.mp4", "videos/a.mp4", "c.mp4")
    write(folder, {"captions.txt": "third\nfirst\nsecond"})
    assert texts(folder, paths) == {"c.mp4": ("third",), "videos/a.mp4": ("first",), "videos/b.mp4": ("second",)}
    write(folder, {"captions.txt": "one\ntwo"})
    found = find_captions(folder, paths)
    assert [file for file, _ in found.file_problems] == [folder / "captions.txt"]
    assert found.file_problems[0][1].startswith("it has 2 lines for 3 media files: write one per file")
    assert len(found.problems) == 3


def test_a_clip_named_captions_has_its_own_caption(folder):
    paths = media(folder, "captions.mp4")
    write(folder, {"captions.txt": "a book of\ncaptions"})
    assert texts(folder, paths) == {"captions.mp4": ("a book of\ncaptions",)}


def test_the_file_name_is_a_caption_only_on_request(folder):
    paths = media(folder, "a_red__fox runs.mp4")
    write(folder, {"a_red__fox runs.txt": "something else"})
    assert texts(folder, paths, source="filename") == {"a_red__fox runs.mp4": ("a red fox runs",)}
    (folder / "a_red__fox runs.txt").unlink()
    assert "no caption" in find_captions(folder, paths).problems[paths[0]]


def test_a_file_name_that_is_not_utf_8_is_no_caption(folder):
    path = folder / "caf\udce9.mp4"
    found = find_captions(folder, [path], source="filename")
    assert found.texts == {} and found.problems == {path: "its name is not UTF-8 text: rename it"}


def test_lines_of_a_file_are_captions_of_their_own_on_request(folder):
    paths = media(folder, "a.mp4", "b.mp4")
    write(folder, {"a.txt": "fox\n\n  a red fox \n"})
    write(folder, {"metadata.json": '[{"video": "b.mp4", "text": ["hare", "a hare"]}]'})
    assert texts(folder, paths, per_line=True) == {"a.mp4": ("fox", "a red fox"), "b.mp4": ("hare", "a hare")}
    found = find_captions(folder, paths)
    assert found.texts == {paths[0]: ("fox\n\n  a red fox",)}
    assert found.file_problems == [
        (folder / "metadata.json", "row 1 has several texts: pass --caption_per_line to draw one per sample")
    ]


def test_captions_beside_the_training_folder_are_found_too(folder):
    paths = media(folder / "train", "a.mp4", "b.mp4", "c.mp4")
    media(folder / "val", "v.mp4")
    write(folder, {"captions/a.txt": "fox", "metadata.csv": "video,text\ntrain/b.mp4,hare\nval/v.mp4,owl\nx.mp4,x\n"})
    write(folder, {"captions.txt": "one\n"})
    found = find_captions(folder / "train", paths, dataset=folder)
    assert found.texts == {paths[0]: ("fox",), paths[1]: ("hare",)}
    assert found.file_problems == [
        (folder / "captions.txt", "move it into train/: it must be beside the files that it lists"),
        (folder / "metadata.csv", "line 4 names x.mp4, which is not a media file of this folder"),
    ]


def test_csv_keeps_quoted_commas_and_line_breaks_and_jsonl_splits_at_newlines_only(folder):
    paths = media(folder, "a.mp4", "b.mp4")
    write(folder, {"metadata.csv": 'video,text\na.mp4,"a fox, fast\nand red"\n'})
    write(folder, {"metadata.jsonl": '{"video": "b.mp4", "text": "a\u2028hare"}\n'.encode()})
    assert texts(folder, paths) == {"a.mp4": ("a fox, fast\nand red",), "b.mp4": ("a\u2028hare",)}


def test_captions_that_are_empty_unreadable_or_contradictory_are_reported(folder):
    paths = media(folder, "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    write(folder, {"a.txt": " \n", "b.txt": "caf\xe9".encode("latin-1"), "c.txt": "fox", "captions/c.txt": "hare"})
    write(folder, {"d.txt": "\ufeffhare".encode("utf-16")})
    problems = {path.name: problem for path, problem in find_captions(folder, paths).problems.items()}
    assert problems["a.mp4"] == "its caption in a.txt is empty: write one"
    assert problems["b.mp4"] == "its caption b.txt is not UTF-8 text: save it as UTF-8"
    assert problems["d.mp4"] == "its caption d.txt is not UTF-8 text: save it as UTF-8"
    assert problems["c.mp4"].startswith("it has different captions in ") and problems["c.mp4"].endswith("keep one")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"video": "a.mp4"', "it is not valid JSONL"),
        ("metadata.json", '{"a.mp4": "fox"}', "it is not a list of rows"),
        (
            "metadata.json",
            '[{"video": "a.mp4"}]',
            "row 1 needs a file name (one of file_path, file_name, video, filename)",
        ),
        ("metadata.json", '["a.mp4"]', "row 1 needs a file name"),
        ("metadata.csv", "name,words\na.mp4,fox\n", "line 1, the header, has no column for file names"),
        ("metadata.csv", "video,text\nb.mp4,fox\n", "line 2 names b.mp4, which is not a media file of this folder"),
        ("metadata.csv", "video,text\n../outside.mp4,fox\n", "line 2 names ../outside.mp4, which is not a media file"),
        ("metadata.csv", f"video,text\n{5000 * 'a'},fox\n", "line 2 names aaaaa"),
        (
            "metadata.json",
            '[{"video": "a\\u0000.mp4", "text": "fox"}]',
            "row 1 names a\0.mp4, which is not a media file",
        ),
        ("metadata.json", '[{"video": "a.mp4", "text": "fox \\ud83d"}]', "row 1 is not valid Unicode"),
        ("metadata.jsonl", '{"video": "\\ud83d.mp4", "text": "fox"}', "line 1 is not valid Unicode"),
        ("metadata.json", 100_000 * "[", "it is not valid JSON"),
        ("metadata.json", f"[{5000 * '1'}]", "it is not valid JSON"),
        ("metadata.jsonl", b"\xff\xfe\x00", "it is not UTF-8 text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_metadata_is_reported_with_the_reason(folder, name, content, message):
    paths = media(folder / "set", "a.mp4")
    media(folder, "outside.mp4")
    write(folder / "set", {name: content})
    found = find_captions(folder / "set", paths)
    assert [file.name for file, _ in found.file_problems] == [name] and message in found.file_problems[0][1]
    assert list(found.problems) == paths


def notes(folder: Path, paths: list[Path], **options) -> list[str]:
    return find_captions(folder, paths, **options).notes


def test_letter_case_that_differs_is_found_in_every_layout_and_named_in_one_line(folder):
    for layout, example in {
        "beside": ({"clip01.txt": "fox", "CLIP02.TXT": "hare"}, "clip01.txt for Clip01.MP4"),
        "a folder": ({"Captions/clip01.txt": "fox", "CAPTIONS/CLIP02.txt": "hare"}, "clip01.txt for Clip01.MP4"),
        "a list": ({"Captions.TXT": "clip01.mp4: fox\nclip02: hare"}, "clip01.mp4 in Captions.TXT for Clip01.MP4"),
        "rows": ({"Metadata.CSV": "video;text\nclip01.mp4;fox\nclip02.mp4;hare\n"}, "clip01.mp4 in Metadata.CSV for"),
    }.items():
        paths = media(folder / layout, "Clip01.MP4", "Clip02.mp4")
        write(folder / layout, example[0])
        assert texts(folder / layout, paths) == {"Clip01.MP4": ("fox",), "Clip02.mp4": ("hare",)}
        (note,) = notes(folder / layout, paths)
        assert note.startswith(f"captions: 2 names differ in letter case, such as {example[1]}")


def test_notes_are_made_once_and_plain_layouts_have_none(folder):
    paths = media(folder, "Clip.mp4")
    write(folder, {"clip.txt": "fox"})
    assert notes(folder, paths) == ["captions: 1 name differs in letter case, such as clip.txt for Clip.mp4"]
    for number, files in enumerate(LAYOUTS.values()):
        paths = media(folder / str(number), "a.mp4", "b.mp4")
        write(folder / str(number), files)
        assert notes(folder / str(number), paths) == []


def test_the_exact_name_wins_and_two_that_are_only_alike_must_agree(folder):
    paths = media(folder, "a.mp4", "B.mp4", "C.mp4", "d.mp4")
    write(folder, {"a.txt": "exact", "A.txt": "alike", "b.txt": "one", "b.TXT": "two"})
    write(folder, {"c.txt": "same", "c.TXT": "same", "d.TXT": "alike", "d.txt": "exact"})
    found = find_captions(folder, paths)
    assert [text for (text,) in found.texts.values()] == ["same", "exact", "exact"]
    assert "it has different captions in " in found.problems[folder / "B.mp4"]


def test_a_caption_of_one_clip_is_not_taken_for_another_in_other_letter_case(folder):
    paths = media(folder, "Clip.mp4", "clip.mp4")
    write(folder, {"Clip.txt": "fox"})
    found = find_captions(folder, paths)
    assert found.texts == {folder / "Clip.mp4": ("fox",)} and found.missing == {folder / "clip.mp4"}


def test_composed_and_decomposed_names_are_the_same_without_a_note(folder):
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    for number, (clip, caption) in enumerate([(composed, decomposed), (decomposed, composed)]):
        for kind, files in {
            "own": {f"{caption}.txt": "fox"},
            "row": {"metadata.csv": f"video,text\n{caption}.mp4,fox\n"},
            "list": {"captions.txt": f"{caption}: fox"},
        }.items():
            here = folder / f"{number}{kind}"
            paths = media(here, f"{clip}.mp4")
            write(here, files)
            assert texts(here, paths) == {f"{clip}.mp4": ("fox",)} and notes(here, paths) == []


def test_rows_may_have_the_separators_of_windows_unless_a_file_has_that_name(folder):
    paths = media(folder, "sub/clip.mp4")
    write(folder, {"metadata.csv": "video,text\nsub\\clip.mp4,fox\n"})
    assert texts(folder, paths) == {"sub/clip.mp4": ("fox",)}
    paths = media(folder, "sub/clip.mp4", "sub\\clip.mp4")
    assert find_captions(folder, paths).texts == {folder / "sub\\clip.mp4": ("fox",)}
    assert find_captions(folder, [folder / "sub" / "clip.mp4"]).texts == {}


def test_rows_for_another_part_of_the_dataset_are_no_problem_in_any_spelling(folder):
    paths = media(folder / "train", "a.mp4")
    media(folder / "val", "v.mp4")
    write(folder, {"metadata.csv": "video,text\ntrain/a.mp4,fox\nval\\v.mp4,owl\nVal/V.mp4,owl\n"})
    found = find_captions(folder / "train", paths, dataset=folder)
    assert found.texts == {paths[0]: ("fox",)} and found.file_problems == []


def test_a_row_may_name_a_link_to_a_clip(folder):
    paths = media(folder, "Clip.mp4")
    (folder / "other.mp4").symlink_to("Clip.mp4")
    write(folder, {"metadata.csv": "video,text\nother.mp4,fox\n"})
    assert texts(folder, paths) == {"Clip.mp4": ("fox",)} and notes(folder, paths) == []


def test_names_that_are_not_utf_8_have_captions_like_others(folder):
    name = "\udcba\udcfc"
    for number, files in enumerate(
        [{f"{name}.txt": "fox"}, {f"captions/{name}.txt": "fox"}, {"metadata.csv": b"video,text\n\xba\xfc.mp4,fox\n"}]
    ):
        paths = media(folder / str(number), f"{name}.mp4")
        write(folder / str(number), files)
        assert texts(folder / str(number), paths) == {f"{name}.mp4": ("fox",)}


def test_links_in_a_circle_and_to_nowhere_are_problems_and_end_nothing(folder):
    paths = media(folder, "a.mp4", "b.mp4", "c.mp4")
    write(folder, {"c.txt": "fox"})
    for name, target in {"a.txt": "a.txt", "b.txt": "gone.txt", "captions": "captions"}.items():
        (folder / name).symlink_to(target)
    (folder / "metadata.csv").symlink_to("metadata.csv")
    (folder / "captions.txt").symlink_to("captions.txt")
    found = find_captions(folder, paths)
    circle = "cannot be read: Too many levels of symbolic links"
    assert found.texts == {folder / "c.mp4": ("fox",)}
    assert found.problems == {
        folder / "a.mp4": f"its caption a.txt {circle}",
        folder / "b.mp4": "its caption b.txt cannot be read: No such file or directory",
    }
    assert found.file_problems == [
        (folder / name, f"it {circle}") for name in ("captions", "captions.txt", "metadata.csv")
    ]


def test_a_caption_of_invisible_characters_is_empty_wherever_it_is(folder):
    nothing = "\u200b\ufeff\u3164\u2800"
    paths = media(folder, "file.mp4", "list.mp4", "row.mp4")
    write(folder, {"file.txt": nothing, "captions.txt": f"list: {nothing}\nlist: {nothing}"})
    write(folder, {"metadata.json": f'[{{"video": "row.mp4", "text": ["{nothing}", " "]}}]'})
    for per_line in (False, True):
        found = find_captions(folder, paths, per_line=per_line)
        empty = {path.name: reason for path, reason in found.problems.items() if "is empty" in reason}
        assert found.texts == {} and set(empty) >= {"file.mp4", "list.mp4"}
    assert empty["row.mp4"] == "its caption in metadata.json is empty: write one"
    assert empty["list.mp4"] == "its caption in captions.txt is empty, its characters are invisible: write one"


def test_a_file_name_that_says_nothing_is_no_caption(folder):
    found = find_captions(folder, [folder / "__.mp4", folder / "\u200b.mp4", folder / "a.mp4"], source="filename")
    assert found.texts == {folder / "a.mp4": ("a",)}
    assert set(found.problems.values()) == {"its name says nothing: rename it"}


def test_orphans_are_captions_without_a_clip(folder):
    paths = media(folder, "clip.mp4", "videos/deep.mp4", "Case.MP4", "caf\u00e9.mp4")
    belonging = ["clip.txt", "captions/deep.txt", "case.TXT", "cafe\u0301.txt", "captions.txt", "metadata.csv"]
    elsewhere = ["notes/readme.txt", ".hidden.txt", ".folder/captions/x.txt", "skip/captions/y.txt"]
    orphans = ["captions/gone.txt", "clip2.txt", "clip_mask.txt", "empty/captions/z.txt", "videos/other.TXT"]
    write(folder, dict.fromkeys([*belonging, *elsewhere, *orphans], "text"))
    media(folder, "clip_mask.mp4")
    assert find_orphans(folder, paths, [folder / "skip"]) == [folder / name for name in orphans]


def test_captions_of_other_parts_of_a_dataset_are_no_orphans(folder):
    train = media(folder, "a.mp4")
    media(folder, "val/v.mp4")
    write(folder, {"captions/a.txt": "fox", "captions/v.txt": "owl", "captions/x.txt": "nobody's", "val/x.txt": "x"})
    assert find_orphans(folder, train, [folder / "val"]) == [folder / "captions" / "x.txt"]
    train = media(folder / "set" / "train", "a.mp4")
    media(folder / "set" / "val", "v.mp4")
    write(folder / "set", {"captions/a.txt": "fox", "captions/v.txt": "owl", "captions/x.txt": "nobody's"})
    found = find_orphans(folder / "set" / "train", train, dataset=folder / "set")
    assert found == [folder / "set" / "captions" / "x.txt"]


def test_a_dataset_that_is_called_captions_has_orphans_too(folder):
    paths = media(folder / "captions", "clip.mp4")
    media(folder / "other", "gone.mp4")
    write(folder / "captions", {"clip.txt": "fox", "gone.txt": "hare"})
    assert find_orphans(folder / "captions", paths) == [folder / "captions" / "gone.txt"]


def test_looking_for_orphans_ends_where_links_go_in_circles(folder):
    paths = media(folder, "sub/clip.mp4")
    (folder / "sub" / "again").symlink_to(folder)
    (folder / "sub" / "captions").symlink_to("captions")
    os.symlink("loop.txt", folder / "sub" / "loop.txt")
    write(folder, {"captions/x.txt": "nobody's"})
    assert find_orphans(folder, paths) == [folder / "captions" / "x.txt", folder / "sub" / "loop.txt"]


def test_media_without_any_caption_are_told_from_those_with_a_bad_one(folder):
    paths = media(folder, "empty.mp4", "fox.mp4", "latin.mp4", "mute.mp4")
    write(folder, {"empty.txt": "", "fox.txt": "a fox", "latin.txt": "f\u00fcr".encode("latin-1")})
    found = find_captions(folder, paths)
    assert found.missing == {folder / "mute.mp4"} and len(found.problems) == 3


def test_clips_without_captions_refer_to_the_first_file_that_has_a_problem(folder):
    paths = media(folder, "a.mp4", "b.mp4", "empty.mp4")
    write(folder, {"empty.txt": "", "metadata.csv": b"video,text\na.mp4,caf\xe9\n"})
    empty = {folder / "empty.mp4": "its caption in empty.txt is empty: write one"}
    for name, content in {"metadata.csv": b"video,text\na.mp4,caf\xe9\n", "captions.txt": "one line"}.items():
        write(folder, {name: content})
        found = find_captions(folder, paths)
        assert found.problems == empty | dict.fromkeys(paths[:2], f"it has no caption: see {name}")
        assert found.missing == set(paths[:2])
    write(folder, {"metadata.csv": "video,text\ngone.mp4,fox\na.mp4,a fox\n"})
    (folder / "captions.txt").unlink()
    found = find_captions(folder, paths)
    assert found.problems == empty | {folder / "b.mp4": "it has no caption: see metadata.csv"}


def test_an_unknown_name_that_is_not_utf_8_says_so(folder):
    write(folder, {"captions.csv": b"video,text\ncaf\xe9.mp4,fox\n"})
    ((_, reason),) = find_captions(folder, media(folder, "caf\u00e9.mp4")).file_problems
    unknown = "line 2 names caf\udce9.mp4, which is not a media file of this folder"
    assert reason == f"{unknown}; it is not UTF-8: save it as UTF-8 (in Excel: CSV UTF-8)"


@pytest.mark.parametrize(
    "name", ["README.txt", "readme_first.TXT", "LICENSE.txt", "Licence-MIT.txt", "CHANGELOG.txt", "requirements.txt"]
)
def test_files_about_a_folder_are_no_orphans_but_may_be_captions(folder, name):
    paths = media(folder, "clip.mp4")
    write(folder, {name: "text", "Credits.txt": "text", "my_readme.txt": "text"})
    assert find_orphans(folder, paths) == [folder / "my_readme.txt"]
    paths += media(folder, f"{Path(name).stem}.mp4")
    assert find_captions(folder, paths).texts == {paths[1]: ("text",)}
