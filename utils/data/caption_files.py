"""Reads caption files: the text of one media file, or rows and lines for many of them."""

import csv
import io
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_KEYS = ("file_path", "file_name", "video")
TEXT_KEYS = ("text", "caption", "prompt")

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

    number: int  # from 1
    name: str  # a path, as it is written
    texts: tuple[str, ...]


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


def read_text(file: Path, errors: str = "strict") -> str:
    """The text of a UTF-8 file, without spaces around it. Raises UnusableError for a file that cannot be read as such.

    `errors="surrogateescape"` keeps bytes that are not UTF-8 the way that file names have them.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would never end
            raise UnusableError("is not a file")
        text = file.read_text(encoding="utf-8-sig", errors=errors).strip()
        if "\0" in text:  # UTF-16 without a byte order mark
            raise UnicodeError
        return text
    except UnicodeError:
        raise UnusableError("is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise UnusableError(f"cannot be read: {error.strerror}") from None


def read_lines(file: Path) -> list[str]:
    """The lines of a file, as `read_text(errors="surrogateescape")` reads it."""
    return [line.strip() for line in read_text(file, "surrogateescape").split("\n")]


def read_rows(file: Path, per_line: bool) -> Iterator[Row]:
    """The rows of metadata in CSV, JSON or JSON lines. Raises UnusableError at the first that cannot be used."""
    text = read_text(file, "surrogateescape")
    kind = file.suffix[1:].lower()
    try:
        if kind == "csv":
            rows = _csv_rows(text)
        elif kind == "jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise UnusableError(f"it is not valid {kind.upper()}: {error}") from None
    if not isinstance(rows, list):
        raise UnusableError("it is not a list of rows")
    for number, row in enumerate(rows, 1):
        yield _parse_row(row, number, per_line)


def _csv_rows(text: str) -> list[Any]:
    first, _, rest = text.partition("\n")
    if said := _SEPARATOR_LINE.fullmatch(first):
        delimiter, text = said[1], rest
    else:
        columns = {mark: next(csv.reader([first], delimiter=mark), []) for mark in _DELIMITERS}
        delimiter = next((mark for mark in _DELIMITERS if any(key in columns[mark] for key in FILE_KEYS)), ",")
    rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    for number, row in enumerate(rows, 1):
        if None in row:
            remedy = f"put a text with {_DELIMITERS[delimiter]} in quotes"
            raise UnusableError(f"row {number} has more columns than the header: {remedy}")
    return rows


def _parse_row(row: Any, number: int, per_line: bool) -> Row:
    values = row if isinstance(row, dict) else {}
    name = next((values[key] for key in FILE_KEYS if values.get(key)), None)
    text = next((values[key] for key in TEXT_KEYS if key in values), None)
    texts = [text] if isinstance(text, str) else text
    if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(part, str) for part in texts):
        files, words = ", ".join(FILE_KEYS), ", ".join(TEXT_KEYS)
        raise UnusableError(f"row {number} needs a file name (one of {files}) and a text (one of {words})")
    if not _can_be_name(name) or not all(map(is_unicode, texts)):
        raise UnusableError(f"row {number} is not valid Unicode: save the file as UTF-8, without lone surrogates")
    if len(texts) > 1 and not per_line:
        raise UnusableError(f"row {number} has several texts: pass --caption_per_line to draw one per sample")
    return Row(number, name, tuple(line for part in texts for line in split_lines(part.strip(), per_line)))


def _can_be_name(name: str) -> bool:
    """Whether a file can have this name: one that is not UTF-8 has a lone surrogate for each byte."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
