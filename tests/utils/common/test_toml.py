"""TOML files from any editor, and what is said about paths of Windows in them."""

from pathlib import Path

import pytest

from utils.common.errors import UserError
from utils.common.toml import check_paths, read_toml


def saved(folder: Path, content: str | bytes) -> Path:
    path = folder / "a.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def message(folder: Path, content: str | bytes) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_toml(saved(folder, content))
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(tmp_path):
    assert read_toml(saved(tmp_path, "\ufeffa = 1\r\n[[b]]\r\nc = 'C:\\new'\r\n")) == {"a": 1, "b": [{"c": "C:\\new"}]}


@pytest.mark.parametrize(
    ("line", "typed"),
    [
        (r'path = "C:\Users\me\clips"', r"C:\Users\me\clips"),
        (r'path = "D:\videos"', r"D:\videos"),
        (r'  path = "D:\clips\"  # mine', "D:\\clips\\"),
        (r'path = "D:\"', "D:\\"),
        (r'path = "\\server\share"', r"\\server\share"),
        (r"""a = ["x", 'C:\x', "sub\clips"]""", r"sub\clips"),
        (r'path = "C:\ufox"', r"C:\ufox"),
    ],
)
@pytest.mark.parametrize("end", ["", "\nseed = 1\n"])
def test_a_path_with_backslashes_is_answered_with_the_right_spellings(tmp_path, line, typed, end):
    first, *rest = message(tmp_path, f"[[dataset]]\n{line}{end}")
    assert first.startswith("a.toml is not a valid TOML file: ")
    slashes = typed.replace("\\", "/")
    assert rest == [
        f"line 2: {line.strip()}",
        f"in double quotes a backslash begins an escape: write '{typed}' in single quotes, or \"{slashes}\"",
    ]


def test_the_spellings_are_right(tmp_path):
    text = "a = 'C:\\Users\\me'\nb = \"C:/Users/me\""
    assert read_toml(saved(tmp_path, text)) == {"a": "C:\\Users\\me", "b": "C:/Users/me"}


def test_a_path_with_an_apostrophe_has_one_spelling(tmp_path):
    *_, last = message(tmp_path, 'path = "C:\\Users\\O\'Hara"')
    assert last == 'in double quotes a backslash begins an escape: write "C:/Users/O\'Hara"'


@pytest.mark.parametrize(
    "text",
    ["a = ", 'a = "b\\tc" d', "a = 'C:\\x' d", "a = 1/2", "a = b # c/d", "[[a]", 100_000 * "[", f"a = {5000 * '1'}"],
)
def test_other_mistakes_get_no_advice_about_paths(tmp_path, text):
    (line,) = message(tmp_path, text)
    assert line.startswith("a.toml is not a valid TOML file: ")


@pytest.mark.parametrize(
    ("line", "typed"),
    [
        (r"path = C:\clips", r"C:\clips"),
        (r"path = C:\my clips # mine", r"C:\my clips"),
        ("  path = C:/clips", "C:/clips"),
        ("path = /clips/fox", "/clips/fox"),
        ("path = ~/clips", "~/clips"),
        (r"path = \\server\share", r"\\server\share"),
        (r"path = 2024\clips", r"2024\clips"),
        (r"files = ['a', C:\b, c]", r"C:\b"),
    ],
)
def test_a_path_without_quotes_is_answered_with_the_right_spellings(tmp_path, line, typed):
    first, *rest = message(tmp_path, f"seed = 1\n{line}\nrank = 4")
    assert first.startswith("a.toml is not a valid TOML file: ")
    slashes = typed.replace("\\", "/")
    remedy = f"a path needs quotes: write '{typed}' in single quotes, or \"{slashes}\""
    assert rest == [f"line 2: {line.strip()}", remedy]


def test_text_that_is_not_utf_8_is_reported(tmp_path):
    assert message(tmp_path, "a = 'é'".encode("latin-1"))[0].startswith("a.toml is not a valid TOML file: save it as")


def test_a_path_with_control_characters_is_reported_with_its_line(tmp_path):
    file = saved(tmp_path, 'x = 1\npath = "D:\\train\\next"\nother = "C:\\\\a\\b"\n')
    values = read_toml(file)
    for name, line in {"path": r'line 2: path = "D:\train\next"', "other": r'other = "C:\a\b"'}.items():
        with pytest.raises(UserError) as caught:
            check_paths(["fine", values[name]], name, file)
        assert str(caught.value).splitlines()[1] == line
        meanings = {"path": r"\t and \n mean a tab and a line break", "other": r"\b means a backspace"}
        assert str(caught.value).splitlines()[0] == f"{file}: {name}: in double quotes {meanings[name]}"
    for fine in ("D:\\train", "D:/train", "caf\u00e9", 3, ["a", "b"], ""):
        check_paths(fine, "path", file)
