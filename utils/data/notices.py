"""What is used in another way than its name says, or not at all: no fault, but nothing is left out silently."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.common.formatting import counted, one_line


@dataclass(frozen=True)
class Kind:
    """What something is, a noun, and what becomes of it: the rest of a sentence after "is" or "are"."""

    noun: str
    outcome: str


@dataclass(frozen=True)
class Notice:
    """One file or folder of a kind, and how it is called in the line about them."""

    kind: Kind
    path: Path
    name: str


def format_notices(notices: Sequence[Notice]) -> list[str]:
    """A line for each kind, in the order in which they come: how many there are, and the first of them."""
    groups: dict[Kind, dict[Path, str]] = {}
    for notice in notices:
        groups.setdefault(notice.kind, {}).setdefault(notice.path, notice.name)
    return [_line(kind, list(names.values())) for kind, names in groups.items()]


def _line(kind: Kind, names: list[str]) -> str:
    first, *others = map(one_line, names)
    if not others:
        return f"the {kind.noun} {first} is {kind.outcome}"
    return f"{counted(len(names), kind.noun)} such as {first} are {kind.outcome}"
