"""captions.txt: a line for each media file, in natural order or with the file's name in front.

a red fox                       the first file in natural order
clip2.mp4: a brown hare         this file; also clip2: or with | or a tab instead of the colon
clip2.mp4, a brown hare         also with a semicolon; only after a name with its ending
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from utils.data.caption_files import UnusableError, is_unicode, is_visible, not_utf8, read_lines
from utils.data.names import differs_in_case, natural_order, same_name

LISTING = "captions.txt"

_SEPARATORS = re.compile(r"[:|\t]")
_MOST_SEPARATORS = 8  # that a name may hold
_QUOTES = "\"'`\u201c\u2018"
_FULL = (0, 2)  # those of the forms of a name in `_Names` that have an ending
_FORMS = "a colon, comma, semicolon, | or tab"


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
    cannot be read, for a number of lines other than that of the media, and where most lines begin with names, but not
    all as they should.
    """
    lines = read_lines(listing)
    above = next((number for number, line in enumerate(lines) if line), 0)  # empty lines before the first
    ordered = sorted(media, key=lambda path: _order(path, listing.parent))
    names = _Names(listing.parent, ordered)
    written = [(number, line) for number, line in enumerate(lines, 1) if is_visible(line)]
    named = [names.read(line) for _, line in written]
    fitting = [line for line in named if line is not None]
    if not all(is_unicode(line.text) for line in fitting):
        raise UnusableError(f"it {not_utf8(listing)}")
    if fitting and len(fitting) == len(named):
        return fitting, []
    if not all(map(is_unicode, lines)):
        raise UnusableError(f"it {not_utf8(listing)}")
    others = [line for line, found in zip(written, named, strict=True) if found is None]
    begun = [(number, line, paths) for number, line in others if (paths := names.at_start(line))]
    if 2 * (len(fitting) + len(begun)) > len(named):
        raise UnusableError(_fault(others[0], begun, fitting, listing.parent))
    lines = lines[above:]
    if len(lines) != len(media):
        example = ordered[0].name if ordered else "clip.mp4"
        how = f"in natural order, or with its name as in {example}: caption"
        raise UnusableError(f"it has {len(lines)} lines for {len(media)} media files: write one per file, {how}")
    found = [Line(path, line, path.name) for path, line in zip(ordered, lines, strict=True)]
    return found, list(_order_notes(listing, ordered))


def _fault(
    other: tuple[int, str], begun: Sequence[tuple[int, str, list[Path]]], fitting: Sequence[Line], folder: Path
) -> str:
    """What is wrong with the first of the lines that have `begun` with a full name, or else with the `other` line."""
    if not begun:
        number, line = other
        fault = f"most lines begin with the name of a media file, but not line {number}, {line[:40]!r}"
        return f"{fault}: begin each with one, as in {fitting[0].path.name}: {fitting[0].text[:20]}"
    number, line, (path, *more) = begun[0]
    if more:
        example = f"{path.relative_to(folder).as_posix()}: caption"
        return f"line {number}, {line[:40]!r}, may mean {1 + len(more)} files: name its folder too, as in {example}"
    separated = f"{path.name}: caption, with {_FORMS} after the name"
    return f"line {number}, {line[:40]!r}, has no separator after the file name: write {separated}"


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
    first = names[differing[0]].as_posix()
    order = f"its lines are read in natural order, {first} before {by_characters[differing[0]].as_posix()}"
    return [f"{listing}: {order}; to be sure, write a name in each line: {first}: caption"]


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
        endings = sorted({re.escape(path.suffix) for path in media if path.suffix}, key=len, reverse=True)
        # Where a name may end. Scripts without spaces may continue there.
        self.ends = re.compile(rf"(?:{'|'.join(endings) or '(?!)'})(?![A-Za-z0-9_])", re.IGNORECASE)

    def read(self, line: str) -> Line | None:
        """The line as a name, a separator and a caption; None if it does not begin with the name of one file."""
        for match in _last_first(_SEPARATORS, line):
            written = line[: match.start()].strip()
            for name in _spellings(written):
                if len(found := self._find(name)) == 1:
                    ((form, path),) = found
                    return Line(path, line[match.end() :].strip(), written, differs_in_case(name, form))
        for written, name, found in self._full_names(line):
            rest = line[len(written) :].lstrip()
            if rest.startswith((",", ";")) and len(found) == 1:
                ((form, path),) = found
                return Line(path, rest[1:].strip(), written, differs_in_case(name, form))
        return None

    def at_start(self, line: str) -> list[Path]:
        """The files that may be meant by a name with its ending at the start of a line, in quotes or not."""
        found = next((found for _, _, found in self._full_names(line.lstrip(_QUOTES))), [])
        return [path for _, path in found]

    def _full_names(self, line: str) -> Iterator[tuple[str, str, list[tuple[str, Path]]]]:
        """Names with an ending at the start of a line, the longest first: as written, as found, and what has them."""
        for match in _last_first(self.ends, line):
            written = line[: match.end()]
            for name in _spellings(written):
                if found := self._find(name, _FULL):
                    yield written, name, found

    def _find(self, name: str, levels: Sequence[int] = range(4)) -> list[tuple[str, Path]]:
        """The form of a name, and the files that have it, in the first of these levels that has any."""
        exact = [(self.exact[level], name) for level in levels]
        alike = [(self.alike[level], same_name(name)) for level in levels]
        return next((level[key] for level, key in [*exact, *alike] if key in level), [])


def _last_first(pattern: re.Pattern[str], line: str) -> list[re.Match[str]]:
    return list(islice(pattern.finditer(line), _MOST_SEPARATORS))[::-1]


def _spellings(name: str) -> list[str]:
    """A name as written, and with the separators of other systems."""
    return list(dict.fromkeys((name, name.replace("\\", "/").removeprefix("./"))))
