"""What caption files say, and what does not count as a caption."""

import os
from pathlib import Path

import pytest

from utils.data.caption_files import Row, UnusableError, is_visible, read_lines, read_rows, read_text, split_lines


def saved(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


INVISIBLE = {
    "nothing": "",
    "spaces": " \t\n\u00a0\u2003\u3000",
    "joiners": "\u200b\u200c\u200d\u2060\u034f",
    "byte order mark": "\ufeff",
    "soft hyphen": "\u00ad",
    "marks of direction": "\u200e\u200f\u202a\u202e\u2066\u2069\u061c",
    "Hangul fillers": "\u115f\u1160\u3164\uffa0",
    "Braille": "\u2800",
    "variation selectors": "\ufe0e\ufe0f\U000e0100",
    "accents": "\u0301\u0308",
    "tags": "\U000e0020\U000e007f",
    "controls": "\x00\x1b\x7f\x85",
    "Mongolian": "\u180b\u180e",
    "a null notehead": "\U0001d159",
}


@pytest.mark.parametrize("kind", INVISIBLE)
def test_text_that_shows_nothing_is_invisible(kind):
    assert not is_visible(INVISIBLE[kind])
    assert is_visible(f"{INVISIBLE[kind]}a{INVISIBLE[kind]}")


@pytest.mark.parametrize("text", ["a", "é", "e\u0301", "7", "狐", "한", "!", "_", "€", "🦊", "⠁", "ـ"])
def test_letters_numbers_marks_and_symbols_are_visible(text):
    assert is_visible(text)


def test_a_line_that_shows_nothing_is_no_caption_and_visible_ones_are_unchanged():
    assert split_lines("fox\n\u200b\n \u2800 \n\ufeffhare", per_line=True) == ("fox", "\ufeffhare")
    assert split_lines("fox\n\u200b", per_line=False) == ("fox\n\u200b",)


def test_what_is_no_file_of_text_is_reported_and_never_waited_for(tmp_path):
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "gone.txt").symlink_to("nothing.txt")
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    reasons = {}
    for name in ("loop.txt", "gone.txt", "folder.txt", "pipe.txt"):
        with pytest.raises(UnusableError) as caught:
            read_text(tmp_path / name)
        reasons[name] = str(caught.value)
    assert reasons == {
        "loop.txt": "cannot be read: Too many levels of symbolic links",
        "gone.txt": "cannot be read: No such file or directory",
        "folder.txt": "is not a file",
        "pipe.txt": "is not a file",
    }


TABLES = {
    "commas": "file_name,text\na.mp4,fox\n",
    "semicolons": "file_name;text\na.mp4;fox\n",
    "tabs": "text\tvideo\nfox\ta.mp4\n",
    "a byte order mark": "\ufefffile_name;text\r\na.mp4;fox\r\n",
    "Excel's line": "sep=;\nfile_name;text\na.mp4;fox\n",
    "Excel's line and a mark": "\ufeffSEP=\t\r\ntext\tfile_name\r\nfox\ta.mp4\r\n",
    "quotes": '"file_name";"text"\n"a.mp4";"fox"\n',
    "other columns": "size;file_path;caption\n64;a.mp4;fox\n",
    "any letter case": "File_Name,TEXT\na.mp4,fox\n",
    "filename": "FileName;Prompt\na.mp4;fox\n",
    "spaces around the columns": "filename , text \na.mp4,fox\n",
}


@pytest.mark.parametrize("kind", TABLES)
def test_columns_are_separated_as_the_header_is(tmp_path, kind):
    line = 3 if TABLES[kind].lower().lstrip("\ufeff").startswith("sep=") else 2
    rows = list(read_rows(saved(tmp_path, "Metadata.CSV", TABLES[kind]), False))
    assert rows == [Row(f"line {line}", "a.mp4", ("fox",))]


def test_semicolons_in_a_text_do_not_separate_columns_of_a_file_with_commas(tmp_path):
    table = saved(tmp_path, "metadata.csv", "video,text\na.mp4,a fox; fast\n")
    assert list(read_rows(table, False)) == [Row("line 2", "a.mp4", ("a fox; fast",))]
    table = saved(tmp_path, "metadata.csv", "video;text\na.mp4;a fox, fast\nb.mp4;a fox; fast\n")
    with pytest.raises(UnusableError, match="^line 3 has more columns than the header: put a text with semicolons in"):
        list(read_rows(table, False))


def test_names_keep_bytes_that_are_not_utf_8_and_texts_may_have_none(tmp_path):
    named = saved(tmp_path, "metadata.csv", b"video,text\n\xba\xfc.mp4,fox\n")
    assert list(read_rows(named, False)) == [Row("line 2", "\udcba\udcfc.mp4", ("fox",))]
    escaped = saved(tmp_path, "metadata.json", '[{"video": "\\udcba.mp4", "text": "fox"}]')
    assert list(read_rows(escaped, False)) == [Row("row 1", "\udcba.mp4", ("fox",))]


def reason(folder: Path, name: str, content: str | bytes) -> str:
    """Why a file of rows cannot be used."""
    with pytest.raises(UnusableError) as caught:
        list(read_rows(saved(folder, name, content), False))
    return str(caught.value)


EXCEL, PLAIN = "it is not UTF-8: save it as UTF-8 (in Excel: CSV UTF-8)", "it is not UTF-8 text: save it as UTF-8"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", b"video,text\na.mp4,caf\xe9\n", EXCEL),
        ("Captions.CSV", b"video;text\na.mp4;\x93fox\x94\n", EXCEL),
        ("metadata.csv", "video\ttext\na.mp4\tfox\n".encode("utf-16"), EXCEL),
        ("metadata.jsonl", b'{"video": "a.mp4", "text": "caf\xe9"}', PLAIN),
        ("metadata.json", b'[{"video": "a.mp4", "text": "caf\xe9"}]', PLAIN),
    ],
)
def test_another_encoding_is_reported_with_how_to_save_the_file(tmp_path, name, content, message):
    assert reason(tmp_path, name, content) == message


def test_lone_surrogates_of_json_are_told_from_another_encoding(tmp_path):
    message = "row 1 is not valid Unicode: replace its lone surrogates"
    assert reason(tmp_path, "metadata.json", '[{"video": "a.mp4", "text": "fox \\ud83d"}]') == message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "video,text\na.mp4,fox\nb.mp4\n", "line 3 needs a file name"),
        ("a.csv", "\n \n\nvideo,text\n\na.mp4,fox\n\nb.mp4\n", "line 8 needs a file name"),
        ("a.csv", 'video,text\r\na.mp4,"a\r\nfox"\r\nb.mp4\r\n', "line 4 needs a file name"),
        ("a.csv", "sep=;\nvideo;text\na.mp4;fox;red\n", "line 3 has more columns"),
        ("a.csv", f"video,text\na.mp4,fox\nb.mp4,{140_000 * 'a'}\n", "it is not valid CSV: line 3: field larger"),
        ("a.jsonl", '\n{"video": "a.mp4", "text": "fox"}\n\n{"video": "b.mp4"}\n', "line 4 needs a file name"),
        ("a.jsonl", '{"video": "a.mp4", "text": "fox"}\n{"video" 1}\n', "it is not valid JSONL: line 2, column 10: "),
        ("a.json", '\n[\n{"video" 1}]', "it is not valid JSON: line 3, column 10: "),
        ("a.json", '[\n{"video": "a.mp4", "text": "fox"},\n\n{}]', "row 2 needs a file name"),
    ],
)
def test_lines_are_numbered_as_editors_do(tmp_path, name, content, message):
    assert reason(tmp_path, name, content).startswith(message)


def test_a_header_without_a_usable_column_is_reported_with_its_columns(tmp_path):
    files = "line 1, the header, has no column for file names (one of file_path, file_name, video, filename)"
    assert reason(tmp_path, "a.csv", "name;words\na.mp4;fox\n") == f"{files}: its columns are name, words"
    assert reason(tmp_path, "a.csv", "a.mp4,fox\nb.mp4,hare\n") == f"{files}: its columns are a.mp4, fox"
    texts = "line 2, the header, has no column for texts (one of text, caption, prompt)"
    assert reason(tmp_path, "a.csv", "sep=,\nVideo,words\na.mp4,fox\n") == f"{texts}: its columns are Video, words"
    assert reason(tmp_path, "a.csv", ",".join(100 * ["column"])).endswith(", column, c...")
    assert list(read_rows(saved(tmp_path, "a.csv", ""), False)) == []


def test_keys_of_json_count_in_any_letter_case_and_the_exact_one_first(tmp_path):
    rows = (
        '[{"FileName": "a.mp4", "Text": "fox"}, {"Text": "no", "prompt": "hare", "File_Name": "7", "video": "b.mp4"}]'
    )
    found = list(read_rows(saved(tmp_path, "metadata.json", rows), False))
    assert found == [Row("row 1", "a.mp4", ("fox",)), Row("row 2", "b.mp4", ("hare",))]


def test_lines_are_stripped(tmp_path):
    assert read_lines(saved(tmp_path, "captions.txt", "\ufeff a\r\n\r\n b \r\n")) == ["a", "", "b"]
    assert read_lines(saved(tmp_path, "captions.txt", "\n\u2003\n a\n\n")) == ["", "", "a"]
    with pytest.raises(UnusableError, match="^it cannot be read: No such file or directory$"):
        read_lines(tmp_path / "gone.txt")
