"""captions.txt: a line for each media file, in natural order or with the file's name in front.

a red fox                       the first file in natural order
clip2.mp4: a brown hare         this file; also clip2: or with | or a tab instead of the colon
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from utils.data.caption_files import UnusableError, is_unicode, is_visible, read_lines
from utils.data.names import differs_in_case, natural_order, same_name

LISTING = "captions.txt"
SHOWN = 3  # files in a note about the order

_SEPARATORS = re.compile(r"[:|\t]")
_MOST_SEPARATORS = 8  # that a name may hold


@dataclass(frozen=True)
class Line:
    """What a line says of a media file, which it calls `name`."""

    path: Path
    text: str
    name: str
    other_case: bool = False  # whether letter case differs from the media file's own name


def read_listing(listing: Path, media: Sequence[Path]) -> tuple[list[Line], list[str]]:
    """The lines for media below the listing's folder, and notes about what may be a mistake.

    The lines have names if every one of them begins with that of a media file. Raises UnusableError for a file that
    cannot be read, for a number of lines other than that of the media, and where most lines have names, but not all.
    """
    lines = read_lines(listing)
    ordered = sorted(media, key=lambda path: _order(path, listing.parent))
    names = _Names(listing.parent, ordered)
    written = [(number, line) for number, line in enumerate(lines, 1) if is_visible(line)]
    named = [names.read(line) for _, line in written]
    fitting = [line for line in named if line is not None]
    if not all(is_unicode(line.text) for line in fitting):
        raise UnusableError("is not UTF-8 text: save it as UTF-8")
    if fitting and len(fitting) == len(named):
        return fitting, []
    if not all(map(is_unicode, lines)):
        raise UnusableError("is not UTF-8 text: save it as UTF-8")
    if 2 * len(fitting) > len(named):
        number, line = next(line for line, found in zip(written, named, strict=True) if found is None)
        fault = f"most lines begin with the name of a media file, but not line {number}, {line[:40]!r}"
        raise UnusableError(f"{fault}: begin each with one, as in {fitting[0].path.name}: {fitting[0].text[:20]}")
    if len(lines) != len(media):
        example = ordered[0].name if ordered else "clip.mp4"
        how = f"in natural order, or with its name as in {example}: caption"
        raise UnusableError(f"it has {len(lines)} lines for {len(media)} media files: write one per file, {how}")
    found = [Line(path, line, path.name) for path, line in zip(ordered, lines, strict=True)]
    return found, list(_order_notes(listing, ordered))


def _order(path: Path, folder: Path) -> tuple[object, ...]:
    relative = path.relative_to(folder)
    return natural_order(relative), relative.parts


def _order_notes(listing: Path, ordered: Sequence[Path]) -> list[str]:
    """A sentence where people who sort by characters would list the files in another order."""
    names = [path.relative_to(listing.parent) for path in ordered]
    by_characters = sorted(names, key=lambda name: name.parts)
    differing = [index for index, pair in enumerate(zip(names, by_characters, strict=True)) if pair[0] != pair[1]]
    if not differing:
        return []
    first = differing[0]
    example = f"{names[first].as_posix()} before {by_characters[first].as_posix()}"
    start = max(first - 1, 0)
    shown = [name.as_posix() for name in names[start : start + SHOWN]]
    cut = ["..."] * (start > 0), ["..."] * (start + SHOWN < len(names))
    files = ", ".join([*cut[0], *shown, *cut[1]])
    remedy = f"to be sure, write a name in each line: {names[first].as_posix()}: caption"
    return [f"{listing}: its lines are read in natural order ({example}): {files}; {remedy}"]


class _Names:
    """The media files by their names: the path in the folder or the name alone, with and without an ending."""

    def __init__(self, folder: Path, media: Sequence[Path]) -> None:
        self.exact: list[dict[str, list[tuple[str, Path]]]] = [defaultdict(list) for _ in range(4)]
        self.alike: list[dict[str, list[tuple[str, Path]]]] = [defaultdict(list) for _ in range(4)]
        for path in media:
            relative = path.relative_to(folder)
            forms = (relative.as_posix(), relative.with_name(path.stem).as_posix(), path.name, path.stem)
            for form, exact, alike in zip(forms, self.exact, self.alike, strict=True):
                exact[form].append((form, path))
                alike[same_name(form)].append((form, path))

    def read(self, line: str) -> Line | None:
        """The line as a name, a separator and a caption; None if it does not begin with the name of one file."""
        for match in reversed(list(islice(_SEPARATORS.finditer(line), _MOST_SEPARATORS))):
            written = line[: match.start()].strip()
            for name in dict.fromkeys((written, written.replace("\\", "/").removeprefix("./"))):
                if found := self._find(name):
                    form, path = found
                    return Line(path, line[match.end() :].strip(), written, differs_in_case(name, form))
        return None

    def _find(self, name: str) -> tuple[str, Path] | None:
        """The form of a name, and the only file that has it."""
        levels = [*((level, name) for level in self.exact), *((level, same_name(name)) for level in self.alike)]
        found = next((level[key] for level, key in levels if key in level), [])
        return found[0] if len(found) == 1 else None
