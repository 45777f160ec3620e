"""File names as people see them: when two are the same, and in which order they come."""

import re
import unicodedata
from pathlib import Path

_NUMBERS = re.compile(r"(\d+)")


def same_name(name: str) -> str:
    """A name in the one form of all that look alike: NFC or NFD, in any letter case.

    macOS used to store `é` as two characters, and other systems keep it that way when files are copied.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def differs_in_case(name: str, other: str) -> bool:
    """Whether two names that are the same by `same_name` differ in more than NFC and NFD: in letter case."""
    return unicodedata.normalize("NFC", name) != unicodedata.normalize("NFC", other)


def natural_order(path: Path) -> tuple[tuple[tuple[str, int], ...], ...]:
    """A sort key: clip2 before clip10, in any letter case, folder by folder."""
    return tuple(_natural_parts(part) for part in path.parts)


def _natural_parts(name: str) -> tuple[tuple[str, int], ...]:
    # re.split with a group gives text and digits in turns.
    texts, numbers = _NUMBERS.split(same_name(name))[::2], _NUMBERS.split(name)[1::2]
    return tuple(zip(texts, (*map(int, numbers), -1), strict=True))
