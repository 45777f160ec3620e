"""Numbers, texts and tables for people to read."""

import unicodedata

import pytest

from utils.common.formatting import counted, display_width, format_table, one_line, readable_size, shorten


def test_a_count_agrees_with_its_noun():
    assert [counted(1, "clip"), counted(2, "clip"), counted(0, "match", "matches")] == [
        "1 clip",
        "2 clips",
        "0 matches",
    ]


def test_a_size_is_in_the_unit_that_reads_best():
    sizes = {999: "0.00 MB", 40_000: "0.04 MB", 87_400_000: "87.40 MB", 350_000_000: "0.35 GB"}
    assert {size: readable_size(size) for size in sizes} == sizes


def test_a_table_aligns_text_left_and_numbers_right():
    table = format_table(("clip", "frames"), [("a.mp4", 5), ("longer.mp4", 121)])
    assert table.splitlines() == [
        "clip        frames",
        "----------  ------",
        "a.mp4            5",
        "longer.mp4     121",
    ]


def test_a_column_with_a_word_among_numbers_is_text():
    assert format_table(("fps",), [(16,), ("image",)]).splitlines() == ["fps", "-----", "16", "image"]


def test_an_empty_table_is_its_header():
    assert format_table(("clip", "frames"), []).splitlines() == ["clip  frames", "----  ------"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a fox, ü 狐 🦊", "a fox, ü 狐 🦊"),
        ("a\tb\nc\r\x0b", "a\\tb\\nc\\r\\x0b"),
        ("\x1b[2J\x07\x9b", "\\x1b[2J\\x07\\x9b"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\udcba\udcfc.mp4", "\\udcba\\udcfc.mp4"),
        ("gpj\u202e.exe\u2066", "gpj\\u202e.exe\\u2066"),
        ("zero\u200bwidth\u200d", "zero\u200bwidth\u200d"),
    ],
)
def test_what_would_leave_its_line_is_escaped(text, line):
    assert one_line(text) == line


def test_width_is_counted_in_columns_of_a_console():
    widths = {"fox": 3, "狐": 2, "ﬀ": 1, "Ａ": 2, "e\u0301": 1, "a\u200bb\u200d": 2, "🦊": 2, "": 0, "한글": 4}
    assert {text: display_width(text) for text in widths} == widths
    assert display_width(unicodedata.normalize("NFD", "한글")) == 4


def test_a_text_is_cut_to_columns_and_never_within_a_character():
    assert [shorten("abcdefgh", columns) for columns in (9, 8, 7, 3)] == ["abcdefgh", "abcdefgh", "abcd...", "..."]
    assert shorten("狐" * 5, 10) == "狐" * 5 and shorten("狐" * 6, 10) == "狐" * 3 + "..."
    assert shorten(unicodedata.normalize("NFD", "é" * 8), 7) == "é" * 4 + "..."
    assert shorten("abcq\u0331efgh", 7) == "abcq\u0331..."


def test_columns_are_aligned_whatever_their_texts_hold():
    names = ["a\nb.mp4", "\udcba.mp4", "狐狐.mp4", "cafe\u0301.mp4"]
    assert format_table(("file", "n"), [(name, 5) for name in names]).splitlines() == [
        "file        n",
        "----------  -",
        "a\\nb.mp4    5",
        "\\udcba.mp4  5",
        "狐狐.mp4    5",
        "cafe\u0301.mp4    5",
    ]
