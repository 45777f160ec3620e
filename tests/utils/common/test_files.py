"""Files that appear whole or not at all, and folders that are checked before they are needed."""

import os
import stat
from pathlib import Path

import pytest

from utils.common.errors import UserError
from utils.common.files import UNFINISHED, check_writable, existing_parent, replacing


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with replacing(path) as unfinished:
        unfinished.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old" and unfinished in set(tmp_path.glob(UNFINISHED))
    assert path.read_text(encoding="utf-8") == "new" and list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), replacing(path) as unfinished:
        unfinished.write_text("half", encoding="utf-8")
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="there are no permission bits here")
def test_a_writer_that_hides_its_file_does_not_decide_who_may_read_it(tmp_path):
    (tmp_path / "usual").touch()
    with replacing(tmp_path / "a.txt") as unfinished:
        unfinished.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_nearest_existing_folder_is_found(tmp_path, monkeypatch):
    assert existing_parent(tmp_path) == tmp_path
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert existing_parent(Path("a/b")) == tmp_path


def test_checking_a_folder_creates_nothing(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_a_folder_is_reported(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match=f"cannot write to --where {tmp_path}/a/b: {tmp_path}/a is a file"):
        check_writable(tmp_path / "a" / "b", "--where")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc here")
def test_a_folder_that_nobody_can_write_to_is_reported_to_root_too():
    with pytest.raises(UserError, match="cannot write to --output_dir /proc/self/runs: "):
        check_writable(Path("/proc/self/runs"))


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_reported(tmp_path):
    (tmp_path / "a").mkdir(mode=0o555)
    with pytest.raises(UserError, match="Permission denied"):
        check_writable(tmp_path / "a" / "b")
