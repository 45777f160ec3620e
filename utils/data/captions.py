"""Finds the captions of a folder's media in the layouts that trainers use.

    clip.txt beside clip.mp4
    captions/clip.txt                               in a folder beside the media or beside their folder
    captions.txt                                    a line per media file, in natural order or with its name in front
    metadata.jsonl, metadata.json, metadata.csv     rows of a file name and a text; also captions.csv
    the file name itself                            only with `--captions filename`

Names in NFC and NFD are the same. A name in another letter case is found too, where nothing has the exact one.
Different captions for one file in two places are a problem of that file: nothing says which one is right.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.common.formatting import counted
from utils.data.caption_files import UnusableError, is_unicode, is_visible, not_utf8, read_rows, read_text, split_lines
from utils.data.caption_list import LISTING, read_listing
from utils.data.names import differs_in_case, same_name

CAPTION_SOURCES = ("files", "filename")
METADATA = ("metadata.jsonl", "metadata.json", "metadata.csv", "captions.csv")
FOLDER = "captions"
# How names of text files begin that people put beside clips, and that are no captions.
ABOUT = ("readme", "license", "licence", "changelog", "requirements", "credits")


@dataclass
class Captions:
    """`texts` by media file; `problems` by media file without a usable caption; `file_problems` of caption files.

    The media files in `missing` have no caption at all; they are among the problems too. `file_problems` may be the
    cause: if there are any, the problems of `missing` refer to the first of these files. `notes` are sentences about
    what was understood, but may be a mistake.
    """

    texts: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    problems: dict[Path, str] = field(default_factory=dict)
    missing: set[Path] = field(default_factory=set)
    file_problems: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Candidate:
    """What a caption file says of one media file, which it calls `name`."""

    file: Path
    texts: tuple[str, ...]
    name: str
    other_case: bool = False  # whether letter case differs from the media file's own name


def find_captions(
    folder: Path, media: Sequence[Path], source: str = "files", per_line: bool = False, dataset: Path | None = None
) -> Captions:
    """The captions of `media`: files below `folder`, which may be a part (`train`) of `dataset`.

    The `source` "filename" uses the file's own name, with underscores as spaces, and reads no file. With `per_line`
    each line of a caption file is a caption. Raises nothing: problems are part of the result.
    """
    if source == "filename":
        return _captions_of_names(media)
    found = Captions()
    folders = _Folders(found.file_problems)
    candidates: dict[Path, list[_Candidate]] = defaultdict(list)
    for path, files in _own_files(media, dataset or folder, folders).items():
        for file in files:
            try:
                texts = split_lines(read_text(file), per_line)
            except UnusableError as error:
                found.problems[path] = f"its caption {file.name} {error}"
            else:
                candidates[path].append(_Candidate(file, texts, file.name, differs_in_case(file.stem, path.stem)))
    places = list(dict.fromkeys((folder, dataset or folder)))
    for path, candidate in (*_listed(places, media, folders, found), *_in_rows(places, media, folders, per_line)):
        candidates[path].append(candidate)
    for path in media:
        if path not in found.problems:
            _choose(path, candidates[path], found)
    found.notes += _case_notes(candidates)
    return found


def find_orphans(
    folder: Path, media: Sequence[Path], exclude: Sequence[Path] = (), dataset: Path | None = None
) -> list[Path]:
    """Caption files that belong to no media file, in path order: beside `media`, and in folders named captions.

    `media` are those below `folder` that need captions. Hidden files and folders and the folders `exclude` are skipped.
    With a `dataset` above `folder` its captions folder is looked through too; it may also serve the dataset's other
    parts, and what is named like a file of these is no orphan. Nor is a README, a license or the like.
    """
    folders = _Folders([])
    top = dataset or folder
    used = {file for files in _own_files(media, top, folders).values() for file in files}
    beside, skipped = {path.parent for path in media}, {_resolve(path) for path in exclude}
    places = [] if top == folder else folders.captions_in(top)
    visited: set[Path] = set()
    for here, names, _ in os.walk(folder, followlinks=True):
        real = _resolve(Path(here))
        if real in visited or real in skipped:
            names.clear()
            continue
        visited.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        if Path(here) in beside or same_name(Path(here).name) == FOLDER:
            places.append(Path(here))
    found = []
    for place in dict.fromkeys(places):
        others = set() if place in beside else _stems_elsewhere(place, folder, skipped, folders)
        for name, files in folders.texts(place).items():
            if name not in others:
                found += [file for file in files if file not in used and not file.name.startswith(".")]
    return sorted(file for file in found if same_name(file.name) != LISTING and not _is_about(file))


def _is_about(file: Path) -> bool:
    return same_name(file.name).startswith(ABOUT)


def _stems_elsewhere(captions: Path, folder: Path, skipped: set[Path], folders: "_Folders") -> set[str]:
    """The names of files that this captions folder may serve, outside of `folder` or in folders that are skipped."""
    above = captions.parent
    places = [above, *(above / name for name in folders.names(above))]
    outside = [place for place in places if _resolve(place) in skipped or not place.is_relative_to(folder)]
    names = (Path(name) for place in outside if place != captions for name in folders.names(place))
    return {same_name(name.stem) for name in names if name.suffix.lower() != ".txt"}


def _captions_of_names(media: Sequence[Path]) -> Captions:
    found = Captions()
    for path in media:
        text = " ".join(path.stem.replace("_", " ").split())
        if not is_unicode(path.stem):
            found.problems[path] = "its name is not UTF-8 text: rename it"
        elif not is_visible(text):
            found.problems[path] = "its name says nothing: rename it"
        else:
            found.texts[path] = (text,)
    return found


def _choose(path: Path, candidates: list[_Candidate], found: Captions) -> None:
    """Records the one caption among the candidates, or why there is not exactly one."""
    if len({candidate.texts for candidate in candidates}) > 1:
        files = " and ".join(f"{candidate.file.parent.name}/{candidate.file.name}" for candidate in candidates)
        found.problems[path] = f"it has different captions in {files}: keep one"
        return
    if not candidates:
        found.missing.add(path)
        faulty = [file.name for file, _ in found.file_problems]
        advice = f"see {faulty[0]}" if faulty else f"write one to {path.stem}.txt beside it"
        found.problems[path] = f"it has no caption: {advice}"
        return
    texts = tuple(filter(is_visible, candidates[0].texts))
    if texts:
        found.texts[path] = texts
    else:
        invisible = ", its characters are invisible" if any(candidates[0].texts) else ""
        found.problems[path] = f"its caption in {candidates[0].file.name} is empty{invisible}: write one"


def _case_notes(candidates: dict[Path, list[_Candidate]]) -> Iterator[str]:
    """At most one sentence: how many captions name their media file in another letter case, and one of them."""
    pairs = [(path, each[0]) for path, of_path in candidates.items() if (each := [c for c in of_path if c.other_case])]
    if pairs:
        path, candidate = pairs[0]
        where = "" if candidate.file.name == candidate.name else f" in {candidate.file.name}"
        differ = "differs" if len(pairs) == 1 else "differ"
        example = f"{candidate.name}{where} for {path.name}"
        yield f"captions: {counted(len(pairs), 'name')} {differ} in letter case, such as {example}"


# ------------------------------------------------------------------------------------------- a file for each media file


class _Folders:
    """What lies in folders, each listed once. What cannot be listed is added to `problems` or taken for empty."""

    def __init__(self, problems: list[tuple[Path, str]]) -> None:
        self.problems = problems
        self._names: dict[Path, list[str]] = {}
        self._texts: dict[Path, dict[str, list[Path]]] = {}
        self._captions: dict[Path, list[Path]] = {}

    def names(self, folder: Path) -> list[str]:
        if folder not in self._names:
            try:
                self._names[folder] = sorted(os.listdir(folder))
            except OSError:
                self._names[folder] = []
        return self._names[folder]

    def named(self, folder: Path, name: str) -> list[Path]:
        """What is called so in a folder, in any letter case."""
        return [folder / other for other in self.names(folder) if same_name(other) == same_name(name)]

    def texts(self, folder: Path) -> dict[str, list[Path]]:
        """The text files in a folder by their names without an ending, as `same_name` makes them; .txt before .TXT."""
        if folder not in self._texts:
            found: dict[str, list[Path]] = {}
            for name in sorted(self.names(folder), key=lambda name: (not name.endswith(".txt"), name)):
                file = folder / name
                if file.suffix.lower() == ".txt":
                    found.setdefault(same_name(file.stem), []).append(file)
            self._texts[folder] = found
        return self._texts[folder]

    def captions_in(self, folder: Path) -> list[Path]:
        """The folders named captions in a folder."""
        if folder not in self._captions:
            self._captions[folder] = [place for place in self.named(folder, FOLDER) if self._is_readable(place)]
        return self._captions[folder]

    def _is_readable(self, place: Path) -> bool:
        try:
            os.listdir(place)
        except NotADirectoryError:
            return False
        except OSError as error:  # a link to nowhere, no permission
            self.problems.append((place, f"it cannot be read: {error.strerror}"))
            return False
        return True


def _own_files(media: Sequence[Path], dataset: Path, folders: _Folders) -> dict[Path, list[Path]]:
    """The caption files that belong to one media file alone."""
    looked_in: dict[Path, list[Path]] = {}
    exact: dict[Path, set[str]] = defaultdict(set)
    for path in media:
        # clip.mp4 with captions/clip.txt, or videos/clip.mp4 with captions/clip.txt; never above the dataset's folder.
        above = [path.parent] if path.parent == dataset else [path.parent, path.parent.parent]
        looked_in[path] = [path.parent, *(captions for place in above for captions in folders.captions_in(place))]
        for place in looked_in[path]:
            exact[place].add(path.stem)
    own: dict[Path, list[Path]] = {}
    for path, places in looked_in.items():
        own[path] = []
        for place in places:
            alike = folders.texts(place).get(same_name(path.stem), [])
            same = [file for file in alike if file.stem == path.stem]
            own[path] += same[:1] or [file for file in alike if file.stem not in exact[place]]
    return own


# ------------------------------------------------------------------------------------------------ one file for many


def _listed(
    places: Sequence[Path], media: Sequence[Path], folders: _Folders, found: Captions
) -> Iterator[tuple[Path, _Candidate]]:
    """Each media file with its line of captions.txt. Adds to the problems and notes of `found`.

    `places` are the folder of the media, then the dataset's folder where that is another one.
    """
    folder, *above = places
    for listing in (file for place in above for file in folders.named(place, LISTING)):
        # Its lines would have to be in the order of all parts of the dataset, which are scanned one by one.
        found.file_problems.append((listing, f"move it into {folder.name}/: it must be beside the files that it lists"))
    if any(path.parent == folder and same_name(path.stem) == Path(LISTING).stem for path in media):
        return
    for listing in folders.named(folder, LISTING):
        try:
            lines, notes = read_listing(listing, media)
        except UnusableError as error:
            found.file_problems.append((listing, str(error)))
            continue
        found.notes += notes
        for line in lines:
            yield line.path, _Candidate(listing, (line.text,), line.name, line.other_case)


def _in_rows(
    places: Sequence[Path], media: Sequence[Path], folders: _Folders, per_line: bool
) -> Iterator[tuple[Path, _Candidate]]:
    """Each media file with its row of metadata."""
    names = _MediaNames(media, folders)
    for file in (file for place in places for name in METADATA for file in folders.named(place, name)):
        try:
            for row in read_rows(file, per_line):
                if found := names.find(file.parent, row.name):
                    path, other_case = found
                    yield path, _Candidate(file, row.texts, row.name, other_case)
                elif file.parent == places[0] or not names.is_file(file.parent, row.name):
                    cause = "" if is_unicode(row.name) else f"; it {not_utf8(file)}"
                    reason = f"{row.place} names {row.name}, which is not a media file of this folder{cause}"
                    folders.problems.append((file, reason))
        except UnusableError as error:
            folders.problems.append((file, str(error)))


class _MediaNames:
    """Which media file a row means: the one of this path, or else the only one that looks the same."""

    def __init__(self, media: Sequence[Path], folders: _Folders) -> None:
        self.folders = folders
        self.known = {_resolve(path): path for path in media}
        self.alike: dict[str, list[Path]] = defaultdict(list)
        for real, path in self.known.items():
            self.alike[same_name(str(real))].append(path)

    def find(self, place: Path, name: str) -> tuple[Path, bool] | None:
        """The media file, and whether the name's letter case differs from its own."""
        for real in _spellings(place, name):
            if real in self.known:
                return self.known[real], False
            alike = self.alike.get(same_name(str(real)), [])
            if len(alike) == 1 and (not os.path.lexists(real) or os.path.samefile(real, alike[0])):
                return alike[0], differs_in_case(str(real), str(_resolve(alike[0])))
            if os.path.lexists(real):
                return None
        return None

    def is_file(self, place: Path, name: str) -> bool:
        """Whether any file has this name, in any letter case."""
        if any(os.path.isfile(real) for real in _spellings(place, name)):
            return True
        found = [place]
        for part in Path(name.replace("\\", "/")).parts:
            found = [path for above in found for path in self.folders.named(above, part)]
        return bool(found)


def _spellings(place: Path, name: str) -> list[Path]:
    """The path that a row means: as written, or with the separators of Windows."""
    return [_resolve(place / text) for text in dict.fromkeys((name, name.replace("\\", "/")))]


def _resolve(path: Path) -> Path:
    """Without links and `..`; unchanged if no file can have this name."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a circle of links
        return path
