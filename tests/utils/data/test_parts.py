import os
from pathlib import Path

import pytest

from utils.data.notices import format_notices
from utils.data.parts import dataset_name, media_elsewhere, notices_of, split_folders


def dataset(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        (path if "." in name else path / "clip.mp4").parent.mkdir(parents=True, exist_ok=True)
        (path if "." in name else path / "clip.mp4").touch()
    return folder


def lines(folder: Path, used: tuple[Path, ...] = ()) -> list[str]:
    return format_notices(notices_of(split_folders(folder), used))


def test_a_dataset_has_the_name_of_its_folder_and_not_of_its_part(tmp_path, monkeypatch):
    (tmp_path / "foxes" / "Train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "foxes")
    for part in (tmp_path / "foxes", tmp_path / "foxes" / "Train", Path(), Path("Train")):
        assert dataset_name(part) == "foxes"


def test_a_list_is_of_the_whole_dataset_but_for_what_is_held_out(tmp_path):
    parts = split_folders(dataset(tmp_path, "train", "val", "test"), is_listed=True)
    assert (parts.train, parts.held_out, parts.unused) == (tmp_path, tmp_path / "val", (tmp_path / "test",))


@pytest.mark.parametrize(
    ("names", "train", "held_out", "unused", "said"),
    [
        ((), ".", None, [], []),
        (("a.mp4", "sub"), ".", None, [], []),
        (("train", "val"), "train", "val", [], []),
        (("a.mp4", "test", "eval"), ".", "eval", ["test"], ["the folder test/ is not used, as eval/ is"]),
        (
            ("Train", "VALIDATION"),
            *("Train", "VALIDATION", []),
            ["the folder Train/ is used as train/", "the folder VALIDATION/ is used as validation/"],
        ),
        (
            ("train", "Train", "val", "Val", "Eval"),
            *("train", "val", ["Train", "Val", "Eval"]),
            ["the folder Train/ is not used, as train/ is", "2 folders such as Val/ are not used, as val/ is"],
        ),
        (
            ("TRAIN", "Train", "Test"),
            *("TRAIN", "Test", ["Train"]),
            [
                *("the folder TRAIN/ is used as train/", "the folder Test/ is used as test/"),
                "the folder Train/ is not used, as TRAIN/ is",
            ],
        ),
        (("training", "value", "trаin"), ".", None, [], []),  # the last one has a Cyrillic letter
    ],
)
def test_parts_are_found_in_any_letter_case_the_exact_name_first(tmp_path, names, train, held_out, unused, said):
    folder = dataset(tmp_path, *names)
    if len(os.listdir(folder)) < len(names):
        pytest.skip("names of this system have no letter case")
    parts = split_folders(folder)
    assert (parts.train, parts.held_out) == (folder / train, held_out and folder / held_out)
    assert parts.unused == tuple(folder / name for name in unused)
    assert parts.not_trained == [folder / name for name in ([held_out] if held_out else []) + unused]
    assert lines(folder) == said


def test_media_beside_the_training_folder_are_counted(tmp_path):
    folder = dataset(
        tmp_path, "train", "val", "test", "a.mp4", "old/b.png", "masks/m.png", "other/c.mp4", "notes.txt", "d.heic"
    )
    assert lines(folder, (folder, folder / "masks", folder / "other")) == [
        "the folder test/ is not used, as val/ is",
        "3 files such as a.mp4 are not used, as only train/ is",
    ]
    assert "5 files such as a.mp4 are not used" in lines(folder)[1]


@pytest.mark.parametrize(
    ("names", "empty", "expected"),
    [
        (("a.mp4",), "train", ["1 file lies beside train/, such as a.mp4: move it in, or remove train/"]),
        (
            ("old/c.heic", "b\n.png", "val"),
            *("Train", ["2 files lie beside Train/, such as b\\n.png: move them in, or remove Train/"]),
        ),
        (("Train",), "train", ["the folder Train/ is not used, as train/ is"]),
        (("train", "validation", "a.mp4"), "val", ["the folder validation/ is not used, as val/ is"]),
        (("val",), ".", ["the files in val/ are held out for validation"]),
        (("val",), "train", []),
        (("notes.txt",), ".", []),
        (("val/notes.txt",), ".", []),
    ],
)
def test_where_media_lie_is_said_of_a_part_that_holds_none(tmp_path, names, empty, expected):
    (dataset(tmp_path, *names) / empty).mkdir(exist_ok=True)
    assert media_elsewhere(split_folders(tmp_path), tmp_path / empty) == expected
    if expected and "beside" in expected[0]:
        assert media_elsewhere(split_folders(tmp_path), tmp_path / "val") == []


def test_a_link_to_a_part_is_no_other_part_and_files_are_none(tmp_path):
    folder = dataset(tmp_path, "train", "val")
    (folder / "Train").symlink_to("train")
    (folder / "test").symlink_to("val")
    (folder / "eval").symlink_to("eval")
    assert split_folders(folder).unused == () and lines(folder) == []
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "train").touch()
    assert split_folders(tmp_path / "file").train == tmp_path / "file"
    assert split_folders(tmp_path / "nowhere").train == tmp_path / "nowhere"
