"""Reads TOML files as people write them on any system: with a byte order mark, and with paths of Windows.

In double quotes a backslash begins an escape: "C:\\Users" is no TOML, and "C:\\tmp" is a path with a tab in it.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.common.errors import UserError

_LINE_OF_ERROR = re.compile(r"\(at line (\d+), ")
_STRINGS = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"?")
_WRONG_ESCAPE = re.compile(r'\\(?![btnfr"\\]|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8})')
_ESCAPES = {"\b": r"\b", "\t": r"\t", "\n": r"\n", "\f": r"\f", "\r": r"\r"}
_MEANINGS = {"\b": "a backspace", "\t": "a tab", "\n": "a line break", "\f": "a page break", "\r": "a carriage return"}
_COMMENT = re.compile(r"(?:^|\s)#")
# A value with a backslash, or with a slash and no number or sign in front, is meant as a path.
_LIKE_PATH = re.compile(r"(?!['\"{\[])(?:.*\\|(?![\d+-]).*/)")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises UserError where it cannot be read or is not TOML."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a valid TOML file: save it as UTF-8 ({error})") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: TOML's own errors, and numbers that are too long
        advice = "".join(f"\n{line}" for line in _advice_on(text, str(error)))
        raise UserError(f"{path} is not a valid TOML file: {error}{advice}") from None


def check_paths(values: object, name: str, file: Path) -> None:
    """Raises UserError for a path, or one of several, with tabs or line breaks, which its backslashes have become."""
    for value in values if isinstance(values, list | tuple) else [values]:
        if isinstance(value, str) and any(char < " " for char in value):
            typed = "".join(_escape(char) if char < " " else char for char in value)
            lines = file.read_text(encoding="utf-8-sig").split("\n")
            number = next((number for number, line in enumerate(lines, 1) if f'"{typed}"' in line), None)
            where = f"line {number}: {lines[number - 1].strip()}" if number else f'{name} = "{typed}"'
            raise UserError(f"{file}: {name}: {_meanings(value)}\n{where}\n{_escapes_or(typed)}")


def _advice_on(text: str, error: str) -> Iterator[str]:
    """How to write the path in the line where TOML ends, if it has backslashes that are no escapes, or no quotes."""
    lines = text.rstrip().split("\n")
    found = _LINE_OF_ERROR.search(error)
    number = min(int(found[1]), len(lines)) if found else len(lines)
    for string in _STRINGS.findall(lines[number - 1]):
        if string.startswith('"') and _WRONG_ESCAPE.search(string.strip('"')):
            yield f"line {number}: {lines[number - 1].strip()}"
            yield _escapes_or(string.strip('"'))
            return
    if (bare := _bare_path(lines[number - 1])) is not None:
        yield f"line {number}: {lines[number - 1].strip()}"
        yield f"a path needs quotes: write {_spellings(bare)}"


def _bare_path(line: str) -> str | None:
    """The first path without quotes in a line: its value, or one of a list."""
    key, equals, after = line.partition("=")
    value = _COMMENT.split(after if equals else key)[0].strip()
    parts = value.strip("[], ").split(",") if value.startswith("[") or not equals else [value]
    return next((part for part in map(str.strip, parts) if _LIKE_PATH.match(part)), None)


def _escape(char: str) -> str:
    return _ESCAPES.get(char, f"\\u{ord(char):04x}")


def _meanings(value: str) -> str:
    """What escapes have become in a path, such as: in double quotes \\t and \\n mean a tab and a line break."""
    chars = list(dict.fromkeys(char for char in value if char < " "))
    meanings = [_MEANINGS.get(char, "a control character") for char in chars]
    verb = "means" if len(chars) == 1 else "mean"
    return f"in double quotes {' and '.join(map(_escape, chars))} {verb} {' and '.join(meanings)}"


def _escapes_or(typed: str) -> str:
    return f"in double quotes a backslash begins an escape: write {_spellings(typed)}"


def _spellings(typed: str) -> str:
    """The right ways to write a path."""
    slashes = f'"{typed.replace(chr(92), "/")}"'
    single = [f"'{typed}' in single quotes"] if "'" not in typed else []
    return ", or ".join([*single, slashes])
