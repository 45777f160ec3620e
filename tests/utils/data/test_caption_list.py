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
    order = "its lines are read in natural order, clip2.mp4 before clip10.mp4"
    assert notes == [f"captions.txt: {order}; to be sure, write a name in each line: clip2.mp4: caption"]


def test_a_note_shows_the_first_files_whose_order_differs(tmp_path):
    _, (note,) = read(tmp_path, ["a.mp4", "b.mp4", "c.mp4", "x/B.mp4", "x/a.mp4"], "1\n2\n3\n4\n5")
    assert "natural order, x/a.mp4 before x/B.mp4; to be sure, write a name in each line: x/a.mp4: caption" in note


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
    "commas": "clip10.mp4, ten\nclip2.mp4,two",
    "semicolons": "CLIP10.mp4;ten\n\n.\\clip2.mp4 ; two",
    "all kinds": "clip10.mp4, ten\nclip2: two",
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


def test_commas_and_semicolons_separate_after_a_full_name_only(tmp_path):
    texts, _ = read(tmp_path, ["fox.mp4", "hare.mp4"], "fox, it runs\nhare; it sits")
    assert texts == {"fox.mp4": "fox, it runs", "hare.mp4": "hare; it sits"}
    names = ["a, b.mp4", "a.mp4", "c.mp4.mov"]
    texts, _ = read(tmp_path, names, "a, b.mp4, fox: red, fast\na.mp4; b.mp4, hare\nc.mp4.mov, owl")
    assert texts == {"a, b.mp4": "fox: red, fast", "a.mp4": "b.mp4, hare", "c.mp4.mov": "owl"}

    with pytest.raises(UnusableError, match="but not line 1, 'a.mp4, fox': begin each with one"):
        read(tmp_path, ["a.mp4.mov", "b.mp4", "c.mp4"], "a.mp4, fox\nb.mp4, hare\nc.mp4, owl")


def test_a_name_with_many_commas_and_a_colon_after_it_is_read(tmp_path):
    assert read(tmp_path, ["a,b,c,d,e,f,g,h,i,j.mp4"], "a,b,c,d,e,f,g,h,i,j: fox")[0].popitem()[1] == "fox"


@pytest.mark.parametrize("rest", [" a fox", " - a fox", "", "\u3000a fox", "\uff1aa fox", "\u72d0\u72f8", '","a fox"'])
def test_other_text_after_a_full_name_is_reported_with_the_accepted_forms(tmp_path, rest):
    quote = '"' if rest.startswith('"') else ""
    line = f"{quote}fox.mp4{rest}"
    remedy = "write fox.mp4: caption, with a colon, comma, semicolon, | or tab after the name"
    for other in ("hare.mp4: a hare", "hare.MP4, a hare", "hare.mp4 a hare"):
        with pytest.raises(UnusableError) as caught:
            read(tmp_path, ["fox.mp4", "hare.mp4"], f"\n{line}\n{other}")
        assert str(caught.value) == f"line 2, {line!r}, has no separator after the file name: {remedy}"


def test_a_caption_that_only_begins_like_a_name_is_none(tmp_path):
    texts, _ = read(tmp_path, ["fox.mp4", "hare.mp4"], "fox.mp4x runs\nhare.mp4_2")
    assert texts == {"fox.mp4": "fox.mp4x runs", "hare.mp4": "hare.mp4_2"}


def test_a_full_name_that_two_files_have_is_reported(tmp_path):
    fault = "line 1, 'clip.mp4, one', may mean 2 files: name its folder too, as in a/clip.mp4: caption"
    with pytest.raises(UnusableError, match=f"^{fault}$"):
        read(tmp_path, ["a/clip.mp4", "b/clip.mp4"], "clip.mp4, one\nclip.mp4: two")


def test_empty_lines_above_the_first_are_counted_but_not_as_captions(tmp_path):
    assert read(tmp_path, CLIPS[:2], "\n\none\nten")[0] == {"clip1.mp4": "one", "clip10.mp4": "ten"}


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
        with pytest.raises(UnusableError, match="^it is not UTF-8 text: save it as UTF-8$"):
            read(tmp_path, names, content)


def test_the_numbers_of_lines_and_media_agree(tmp_path):
    how = "write one per file, in natural order, or with its name as in clip1.mp4: caption"
    with pytest.raises(UnusableError, match=f"^it has 2 lines for 4 media files: {how}$"):
        read(tmp_path, CLIPS, "one\ntwo")
    with pytest.raises(UnusableError, match=r"^it has 1 lines for 0 media files: .* clip\.mp4: caption$"):
        read(tmp_path, [], "one")
