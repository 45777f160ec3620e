import os

import pytest

from utils.media.description import MediaError
from utils.media.files import check_file

posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")


def reason(path) -> str:
    with pytest.raises(MediaError) as caught:
        check_file(path)
    assert caught.value.path == path
    return caught.value.reason


def test_a_file_with_content_has_a_status_also_through_a_link(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"12345")
    assert check_file(tmp_path / "a.mp4").st_size == 5
    if os.name != "nt":
        (tmp_path / "link.mp4").symlink_to("a.mp4")
        assert check_file(tmp_path / "link.mp4") == check_file(tmp_path / "a.mp4")


def test_files_that_are_missing_or_empty_and_names_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "empty.mp4").touch()
    assert reason(tmp_path / "empty.mp4") == "the file is empty"
    assert reason(tmp_path / "none.mp4") == reason(tmp_path / "a\0b.mp4") == "there is no such file"
    assert reason(tmp_path) == "not a regular file, but a folder, a pipe or a device"


@posix_only
def test_what_is_no_regular_file_is_refused_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "file.mp4").write_bytes(b"1")
    for name in ("pipe.mp4", "device.mp4"):
        assert reason(tmp_path / name).startswith("not a regular file")
    assert reason(tmp_path / "loop.mp4").startswith("the file cannot be read: ")
    assert reason(tmp_path / "file.mp4" / "b.mp4") == "the file cannot be read: Not a directory"
    assert reason(tmp_path / ("a" * 300)) == "the file cannot be read: File name too long"
