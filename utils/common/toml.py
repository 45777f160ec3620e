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
            typed = "".join(_ESCAPES.get(char, f"\\u{ord(char):04x}") if char < " " else char for char in value)
            lines = file.read_text(encoding="utf-8-sig").split("\n")
            number = next((number for number, line in enumerate(lines, 1) if f'"{typed}"' in line), None)
            where = f"line {number}: {lines[number - 1].strip()}" if number else f'{name} = "{typed}"'
            fault = f"{file}: {name} has a control character, which no path has"
            raise UserError(f"{fault}\n{where}\n{_spellings(typed)}")


def _advice_on(text: str, error: str) -> Iterator[str]:
    """How to write the path in the line where TOML ends, if there is one whose backslashes are no escapes."""
    lines = text.rstrip().split("\n")
    found = _LINE_OF_ERROR.search(error)
    number = min(int(found[1]), len(lines)) if found else len(lines)
    for string in _STRINGS.findall(lines[number - 1]):
        if string.startswith('"') and _WRONG_ESCAPE.search(string.strip('"')):
            yield f"line {number}: {lines[number - 1].strip()}"
            yield _spellings(string.strip('"'))
            return


def _spellings(typed: str) -> str:
    """The right ways to write a path that was typed in double quotes."""
    slashes = f'"{typed.replace(chr(92), "/")}"'
    single = [f"'{typed}' in single quotes"] if "'" not in typed else []
    return f"in double quotes a backslash begins an escape: write {', or '.join([*single, slashes])}"
