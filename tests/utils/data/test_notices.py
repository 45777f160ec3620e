from pathlib import Path

from utils.data.notices import Kind, Notice, format_notices

UNREAD, UNUSED = Kind("file", "not read"), Kind("start picture", "not used")


def notice(kind: Kind, path: str, name: str = "") -> Notice:
    return Notice(kind, Path(path), name or path)


def test_there_is_one_line_for_each_kind_with_the_first_of_them():
    notices = [
        notice(UNREAD, "b.psd"),
        notice(UNUSED, "a_first.png"),
        notice(UNREAD, "a.heic"),
        notice(UNREAD, "b.psd"),
    ]
    assert format_notices(notices) == [
        "2 files such as b.psd are not read",
        "the start picture a_first.png is not used",
    ]
    assert format_notices([]) == []


def test_files_of_the_same_name_in_two_folders_are_two():
    assert format_notices([notice(UNREAD, "a/x.psd", "x.psd"), notice(UNREAD, "b/x.psd", "x.psd")]) == [
        "2 files such as x.psd are not read"
    ]


def test_a_name_stays_on_its_line():
    assert format_notices([notice(UNREAD, "a\nb\udcff.psd")]) == ["the file a\\nb\\udcff.psd is not read"]
