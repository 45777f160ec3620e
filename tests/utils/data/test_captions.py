from pathlib import Path

import pytest

from utils.data.captions import find_captions


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
    reason = "it has 2 lines for 3 media files: write one per file, in sorted order"
    assert found.file_problems == [(folder / "captions.txt", reason)]
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
        (folder / "metadata.csv", "row 3 names x.mp4, which is not a media file of this folder"),
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
        ("metadata.json", '[{"video": "a.mp4"}]', "row 1 needs a file name (one of file_path, file_name, video)"),
        ("metadata.json", '["a.mp4"]', "row 1 needs a file name"),
        ("metadata.csv", "name,words\na.mp4,fox\n", "row 1 needs a file name"),
        ("metadata.csv", "video,text\nb.mp4,fox\n", "row 1 names b.mp4, which is not a media file of this folder"),
        ("metadata.csv", "video,text\n../outside.mp4,fox\n", "row 1 names ../outside.mp4, which is not a media file"),
        ("metadata.csv", f"video,text\n{5000 * 'a'},fox\n", "row 1 names aaaaa"),
        (
            "metadata.json",
            '[{"video": "a\\u0000.mp4", "text": "fox"}]',
            "row 1 names a\0.mp4, which is not a media file",
        ),
        ("metadata.json", '[{"video": "a.mp4", "text": "fox \\ud83d"}]', "row 1 is not valid Unicode"),
        ("metadata.jsonl", '{"video": "\\ud83d.mp4", "text": "fox"}', "row 1 is not valid Unicode"),
        ("metadata.json", 100_000 * "[", "it is not valid JSON"),
        ("metadata.json", f"[{5000 * '1'}]", "it is not valid JSON"),
        ("metadata.jsonl", b"\xff\xfe\x00", "is not UTF-8 text"),
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


def test_media_without_any_caption_are_told_from_those_with_a_bad_one(folder):
    paths = media(folder, "empty.mp4", "fox.mp4", "latin.mp4", "mute.mp4")
    write(folder, {"empty.txt": "", "fox.txt": "a fox", "latin.txt": "f\u00fcr".encode("latin-1")})
    found = find_captions(folder, paths)
    assert found.missing == {folder / "mute.mp4"} and len(found.problems) == 3
