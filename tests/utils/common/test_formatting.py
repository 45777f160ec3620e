"""Tables for people to read."""

from utils.common.formatting import format_table


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
