"""Numbers and tables for people to read."""

from utils.common.formatting import counted, format_table, readable_size


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
