"""captions.txt: lines in natural order, and lines with names."""

from pathlib import Path

import pytest

from utils.data.caption_files import UnusableError
from utils.data.caption_list import read_listing


def read(folder: Path, names: list[str], content: str | bytes) -> tuple[dict[str, str], list[str]]:
    """The captions by name, and the notes without the folder."""
    listing = folder / "captions.txt"
    listing.write_bytes(content if isinstance(content, bytes) else content.encode())
    lines, notes = read_listing(listing, [folder / name for name in names])
    texts = {line.path.relative_to(folder).as_posix(): line.text for line in lines}
    return texts, [note.replace(f"{folder}/", "") for note in notes]


CLIPS = ["clip1.mp4", "clip10.mp4", "clip11.mp4", "clip2.mp4"]


def test_lines_belong_to_the_media_in_natural_order_which_a_note_says_where_it_matters(tmp_path):
    texts, notes = read(tmp_path, CLIPS, "one\ntwo\nten\neleven")
    assert texts == {"clip1.mp4": "one", "clip2.mp4": "two", "clip10.mp4": "ten", "clip11.mp4": "eleven"}
    order = "its lines are read in natural order (clip2.mp4 before clip10.mp4): clip1.mp4, clip2.mp4, clip10.mp4, ..."
    assert notes == [f"captions.txt: {order}; to be sure, write a name in each line: clip2.mp4: caption"]


def test_a_note_shows_the_files_where_the_orders_differ(tmp_path):
    _, (note,) = read(tmp_path, ["a.mp4", "b.mp4", "c.mp4", "x/B.mp4", "x/a.mp4"], "1\n2\n3\n4\n5")
    assert "(x/a.mp4 before x/B.mp4): ..., c.mp4, x/a.mp4, x/B.mp4; to be sure" in note


def test_there_is_no_note_where_both_orders_are_the_same(tmp_path):
    texts, notes = read(tmp_path, ["clip01.mp4", "clip02.mp4", "clip10.mp4"], "one\ntwo\nten\n")
    assert texts == {"clip01.mp4": "one", "clip02.mp4": "two", "clip10.mp4": "ten"} and notes == []


NAMED = {
    "with an ending": "clip10.mp4: ten\nclip2.mp4: two",
    "without": "clip10: ten\n\n\u200b\nclip2: two",
    "bars": "clip10.mp4 | ten\nclip2.mp4|two",
    "tabs": "clip10\tten\nclip2.mp4\ttwo",
    "mixed": "clip10.mp4: ten\n./clip2 |two",
    "a byte order mark": "\ufeffclip10:ten\r\nclip2:two\r\n",
}


@pytest.mark.parametrize("kind", NAMED)
def test_lines_with_names_belong_to_these(tmp_path, kind):
    assert read(tmp_path, CLIPS, NAMED[kind]) == ({"clip10.mp4": "ten", "clip2.mp4": "two"}, [])


def test_a_name_may_have_folders_colons_and_any_letter_case(tmp_path):
    names = ["a/clip.mp4", "b/clip.mp4", "b/Caf\u00e9.MP4", "x: y.mp4"]
    lines = "a/clip: one\nb\\clip.mp4: two\ncafe\u0301.mp4: three: four\nx: y: five"
    texts, _ = read(tmp_path, names, lines)
    assert texts == {"a/clip.mp4": "one", "b/clip.mp4": "two", "b/Caf\u00e9.MP4": "three: four", "x: y.mp4": "five"}
    found, _ = read_listing(tmp_path / "captions.txt", [tmp_path / name for name in names])
    assert [line.name for line in found if line.other_case] == ["cafe\u0301.mp4"]


def test_the_longest_name_counts(tmp_path):
    texts, _ = read(tmp_path, ["a.mp4", "a: b.mp4"], "a: one\na: b: two")
    assert texts == {"a.mp4": "one", "a: b.mp4": "two"}


def test_a_name_that_two_files_have_fits_neither(tmp_path):
    texts, _ = read(tmp_path, ["a/clip.mp4", "b/clip.mp4"], "clip: one\nclip: two")
    assert texts == {"a/clip.mp4": "clip: one", "b/clip.mp4": "clip: two"}


def test_colons_in_captions_are_no_separators_unless_all_lines_begin_with_names(tmp_path):
    names = ["fox.mp4", "hare.mp4"]
    texts, _ = read(tmp_path, names, "fox: it runs\na hare: it sits")
    assert texts == {"fox.mp4": "fox: it runs", "hare.mp4": "a hare: it sits"}


def test_one_line_without_a_name_among_many_with_names_is_reported(tmp_path):
    reason = "most lines begin with the name of a media file, but not line 3, 'clip3.mp4: three': begin each with one"
    with pytest.raises(UnusableError, match=f"^{reason}, as in clip1.mp4: one$"):
        read(tmp_path, CLIPS, "clip1.mp4: one\nclip2.mp4: two\nclip3.mp4: three\nclip10: ten")


def test_bytes_that_are_not_utf_8_are_read_in_names_only(tmp_path):
    names = ["\udcba\udcfc.mp4", "hare.mp4"]
    texts, _ = read(tmp_path, names, b"\xba\xfc.mp4: fox\nhare: hare")
    assert texts == {"\udcba\udcfc.mp4": "fox", "hare.mp4": "hare"}
    for content in (b"\xba\xfc.mp4: caf\xe9\nhare: hare", b"caf\xe9\nhare"):
        with pytest.raises(UnusableError, match="is not UTF-8 text"):
            read(tmp_path, names, content)


def test_the_numbers_of_lines_and_media_agree(tmp_path):
    how = "write one per file, in natural order, or with its name as in clip1.mp4: caption"
    with pytest.raises(UnusableError, match=f"^it has 2 lines for 4 media files: {how}$"):
        read(tmp_path, CLIPS, "one\ntwo")
    with pytest.raises(UnusableError, match=r"^it has 1 lines for 0 media files: .* clip\.mp4: caption$"):
        read(tmp_path, [], "one")
