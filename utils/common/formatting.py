"""Numbers and tables for people to read."""

from collections.abc import Sequence


def counted(count: int, noun: str, nouns: str = "") -> str:
    """1 clip, 2 clips; `nouns` is the plural where it is irregular."""
    return f"{count} {noun}" if count == 1 else f"{count} {nouns or noun + 's'}"


def readable_size(count: int) -> str:
    """A number of bytes as text, such as "11.36 GB" or "16.84 MB"; units are powers of ten."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns of text, with numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        aligned = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])
