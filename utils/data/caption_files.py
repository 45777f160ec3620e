"""Reads caption files: the text of one media file, or rows and lines for many of them."""

import csv
import io
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.common.formatting import one_line, shorten

# Names of columns, in any letter case.
FILE_KEYS = ("file_path", "file_name", "video", "filename")
TEXT_KEYS = ("text", "caption", "prompt")
SHOWN_COLUMNS = 100  # columns of a console for the names of columns in a message

# Letters and symbols by their category that leave no mark: Hangul fillers, Braille's empty cell, a null notehead, and
# the blanks of hieroglyphs.
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0\U0001d159\U00013441\U00013442"
# What separates the columns of a CSV file, in the order in which they are tried. Excel writes semicolons in Europe.
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
# Excel's own first line, which says what separates the columns.
_SEPARATOR_LINE = re.compile(r"sep=([,;\t])", re.IGNORECASE)


class UnusableError(Exception):
    """Why a caption file cannot be used."""


@dataclass(frozen=True)
class Row:
    """What a row of a metadata file says of one media file."""

    place: str  # such as "line 2", counted as editors do, or "row 1" of a list in JSON
    name: str  # a path, as written
    texts: tuple[str, ...]
    kind: str = ""  # what it says that the file is, as written; nothing where it does not


def is_visible(text: str) -> bool:
    """Whether a text shows anything: a letter, a number, a punctuation mark or a symbol that is not blank.

    Spaces of any width, joiners, byte order marks, marks of direction and lone accents show nothing.
    """
    return any(unicodedata.category(char)[0] in "LNPS" and char not in _BLANKS for char in text)


def is_unicode(text: str) -> bool:
    """False for a lone surrogate: JSON can spell one, and bytes that are not UTF-8 are read as such."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def split_lines(text: str, per_line: bool) -> tuple[str, ...]:
    """The captions in a text: it is one itself, or each of its visible lines is."""
    return tuple(line.strip() for line in text.splitlines() if is_visible(line)) if per_line else (text,)


def read_text(file: Path, errors: str = "strict", keep_lines: bool = False) -> str:
    """The text of a UTF-8 file, without spaces around it. Raises UnusableError for a file that cannot be read as such.

    `errors="surrogateescape"` keeps bytes that are not UTF-8 the way that file names have them. `keep_lines` keeps the
    line breaks before the text.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would never end
            raise UnusableError("is not a file")
        text = file.read_text(encoding="utf-8-sig", errors=errors)
        if "\0" in text:  # UTF-16 without a byte order mark
            raise UnicodeError
        inner = text.strip()
        return "\n" * text[: text.index(inner)].count("\n") + inner if keep_lines else inner
    except UnicodeError:
        raise UnusableError(not_utf8(file)) from None
    except OSError as error:
        raise UnusableError(f"cannot be read: {error.strerror}") from None


def not_utf8(file: Path) -> str:
    """What is wrong with a file that is not UTF-8, and what to do: the rest of a sentence after "it"."""
    if file.suffix.lower() == ".csv":
        return "is not UTF-8: save it as UTF-8 (in Excel: CSV UTF-8)"
    return "is not UTF-8 text: save it as UTF-8"


def read_lines(file: Path) -> list[str]:
    """The lines of a file without spaces around them, numbered as editors do: empty ones at the end alone are left out.

    Bytes that are not UTF-8 are kept as by `read_text`. Raises UnusableError for a file that cannot be read.
    """
    return [line.strip() for line in _read_many(file).split("\n")]


def read_rows(file: Path, per_line: bool) -> Iterator[Row]:
    """The rows of metadata in CSV, JSON or JSON lines. Raises UnusableError at the first that cannot be used."""
    text = _read_many(file)
    fault = "is not valid Unicode: replace its lone surrogates"
    read = {".csv": _csv_rows, ".jsonl": _jsonl_rows}.get(file.suffix.lower(), _json_rows)
    for place, row in read(text):
        yield _parse_row(row, place, per_line, f"{place} {fault}" if is_unicode(text) else f"it {not_utf8(file)}")


def _read_many(file: Path) -> str:
    """The text of a file for many media files, with the line breaks before it. Raises UnusableError, a sentence."""
    try:
        return read_text(file, "surrogateescape", keep_lines=True)
    except UnusableError as error:
        raise UnusableError(f"it {error}") from None


def _json_rows(text: str) -> list[tuple[str, Any]]:
    rows = _load_json(text, "JSON")
    if not isinstance(rows, list):
        raise UnusableError("it is not a list of rows")
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _jsonl_rows(text: str) -> list[tuple[str, Any]]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(f"line {number}", _load_json(line, "JSONL", number)) for number, line in lines]


def _load_json(text: str, kind: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise UnusableError(f"it is not valid {kind}: {place}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"it is not valid {kind}: {error}") from None


def _csv_rows(text: str) -> list[tuple[str, Any]]:
    table = text.lstrip("\n")
    before = len(text) - len(table)  # lines above the header
    first, _, rest = table.partition("\n")
    if said := _SEPARATOR_LINE.fullmatch(first):
        delimiter, table, before = said[1], rest, before + 1
    else:
        delimiter = _find_delimiter(first)
    records = _csv_records(table, delimiter, before)
    line, header = next(records, (1, []))
    columns = [column.strip() for column in header]
    for keys, what in ((FILE_KEYS, "file names"), (TEXT_KEYS, "texts")):
        if header and not _has_any(keys, columns):
            names = shorten(", ".join(map(one_line, columns)), SHOWN_COLUMNS)
            fault = f"line {line}, the header, has no column for {what} (one of {', '.join(keys)})"
            raise UnusableError(f"{fault}: its columns are {names}")
    rows = []
    for line, cells in records:
        if len(cells) > len(columns):
            remedy = f"put a text with {_DELIMITERS[delimiter]} in quotes"
            raise UnusableError(f"line {line} has more columns than the header: {remedy}")
        rows.append((f"line {line}", dict(zip(columns, cells, strict=False))))
    return rows


def _find_delimiter(header: str) -> str:
    """The first that gives a column for file names, or else the one that gives the most columns."""
    columns = {mark: next(csv.reader([header], delimiter=mark), []) for mark in _DELIMITERS}
    most = max(columns, key=lambda mark: len(columns[mark]))
    return next((mark for mark, found in columns.items() if _has_any(FILE_KEYS, found)), most)


def _csv_records(table: str, delimiter: str, before: int) -> Iterator[tuple[int, list[str]]]:
    """The records that are not empty, each with the line where it begins, after so many lines `before` the table."""
    reader = csv.reader(io.StringIO(table, newline=""), delimiter=delimiter)
    while True:
        line = before + reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UnusableError(f"it is not valid CSV: line {line}: {error}") from None
        if cells is None:
            return
        if cells:
            yield line, cells


def _has_any(keys: Sequence[str], columns: Sequence[str]) -> bool:
    return any(column.strip().lower() in keys for column in columns)


def _parse_row(row: Any, place: str, per_line: bool, not_unicode: str) -> Row:
    exact = row if isinstance(row, dict) else {}
    spellings = (exact, {key.strip().lower(): value for key, value in exact.items()})
    name = next((values[key] for values in spellings for key in FILE_KEYS if values.get(key)), None)
    text = next((values[key] for values in spellings for key in TEXT_KEYS if key in values), None)
    texts = [text] if isinstance(text, str) else text
    if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(part, str) for part in texts):
        files, words = ", ".join(FILE_KEYS), ", ".join(TEXT_KEYS)
        raise UnusableError(f"{place} needs a file name (one of {files}) and a text (one of {words})")
    if not _can_be_name(name) or not all(map(is_unicode, texts)):
        raise UnusableError(not_unicode)
    if len(texts) > 1 and not per_line:
        raise UnusableError(f"{place} has several texts: pass --caption_per_line to draw one per sample")
    kind = next((values["type"] for values in spellings if values.get("type")), "")
    return Row(place, name, tuple(line for part in texts for line in split_lines(part.strip(), per_line)), str(kind))


def _can_be_name(name: str) -> bool:
    """Whether a file can have this name: one that is not UTF-8 has a lone surrogate for each byte."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
