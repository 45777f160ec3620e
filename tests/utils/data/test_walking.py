"""Files here are empty: only their names are looked at."""

import os
from pathlib import Path

import pytest

from utils.common.errors import UserError
from utils.data.walking import NoMediaError, find_files, require_files


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(folder: Path, paths: list[Path]) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_media_and_files_that_no_decoder_reads_are_found_in_path_order(tmp_path):
    touch(
        tmp_path, "b.PNG", "a/z.mkv", "a/y.HEIC", "c.jxl", "notes.txt", "d", ".hidden.mp4", ".cache/e.mp4", "skip/f.mp4"
    )
    touch(tmp_path, "a-b.mp4")
    files = find_files(tmp_path, [tmp_path / "skip"])
    assert names(tmp_path, files.media) == ["a/z.mkv", "a-b.mp4", "b.PNG"]
    assert names(tmp_path, files.unread) == ["a/y.HEIC", "c.jxl"] and files.faults == {}


def test_links_that_cannot_be_followed_are_faults_and_others_are_not(tmp_path):
    touch(tmp_path, "clip.mp4", "file")
    links = {"loop.mp4": "loop.mp4", "one": "two", "two": "one", "gone": "nowhere/clips", "gone.png": "x.png"}
    links |= {"below": "file/below", "a.txt": "gone.txt", "again.mp4": "clip.mp4", "circle": "."}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    files = find_files(tmp_path)
    assert names(tmp_path, files.media) == ["again.mp4", "clip.mp4", "gone.png", "loop.mp4"]
    assert {path.name: fault for path, fault in files.faults.items()} == {
        "below": "it is a link: Not a directory",
        "gone": "it is a link to nowhere/clips, and nothing is there",
        "gone.png": "it is a link to x.png, and nothing is there",
        **dict.fromkeys(("loop.mp4", "one", "two"), "it is a link that leads to itself"),
    }


def test_a_folder_that_cannot_be_entered_is_a_fault(tmp_path, monkeypatch):
    touch(tmp_path, "clip.mp4", "locked/a.mp4", "open/b.mp4")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    files = require_files(tmp_path)
    assert names(tmp_path, files.media) == ["clip.mp4", "open/b.mp4"]
    assert files.faults == {tmp_path / "locked": "the folder cannot be read: Permission denied"}
    files = require_files(tmp_path / "locked")
    assert files.media == [] and list(files.faults) == [tmp_path / "locked"]


def test_what_is_no_folder_of_media_is_refused_with_the_reason(tmp_path):
    touch(tmp_path, "file", "formats/a.heic", "formats/b.psd")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    reasons = {
        "none": "the dataset .*none does not exist",
        "file": "is a file, not a folder",
        "loop": "cannot be read: it is a link that leads to itself",
        "gone": "cannot be read: it is a link to nowhere, and nothing is there",
        "x" * 300: "cannot be read: File name too long",
        "formats": r"no videos or images .*: docs/formats\.md lists .*\nnot read: 2 files such as a.heic: convert",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            require_files(tmp_path / name)
    with pytest.raises(NoMediaError) as caught:
        require_files(tmp_path / "formats")
    assert caught.value.folder == tmp_path / "formats"
    with pytest.raises(UserError, match="the mask folder .*none does not exist"):
        require_files(tmp_path / "none", what="mask folder")
