"""Numbers, texts and tables for people to read."""

import unicodedata
from collections.abc import Sequence

# What ends or rewrites a line of a console, and what is no character; the latter reverse the order of those around.
_HARMFUL = ("Cc", "Cs", "Zl", "Zp")
_REORDERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def counted(count: int, noun: str, nouns: str = "") -> str:
    """1 clip, 2 clips; `nouns` is the plural where it is irregular."""
    return f"{count} {noun}" if count == 1 else f"{count} {nouns or noun + 's'}"


def readable_size(count: int) -> str:
    """A number of bytes as text, such as "11.36 GB" or "16.84 MB"; units are powers of ten."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def one_line(text: str) -> str:
    """The text with a backslash escape, as Python writes it, for each character that would not stay in its line."""
    return "".join(map(_escaped, text))


def display_width(text: str) -> int:
    """How many columns a text takes on a console: two for wide characters, none for those that join another."""
    return sum(map(_columns, unicodedata.normalize("NFC", text)))


def shorten(text: str, columns: int) -> str:
    """The text if it takes at most so many columns, else its beginning with three dots."""
    if display_width(text) <= columns:
        return text
    text, width, end = unicodedata.normalize("NFC", text), 0, 0
    while (width := width + _columns(text[end])) <= columns - 3:
        end += 1
    return f"{text[:end]}..."


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns of text, with numbers to the right; each row stays on its line, whatever its texts hold."""
    cells = [[one_line(str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(map(display_width, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        spaces = [" " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)]
        aligned = (s + c if n else c + s for c, s, n in zip(row, spaces, numeric, strict=True))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def _escaped(char: str) -> str:
    harmful = unicodedata.category(char) in _HARMFUL or unicodedata.bidirectional(char) in _REORDERING
    return char.encode("unicode_escape").decode() if harmful else char


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1
