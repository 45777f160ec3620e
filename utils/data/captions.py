"""Finds the captions of a folder's media in the layouts that trainers use.

    clip.txt beside clip.mp4
    captions/clip.txt                               in a folder beside the media or beside their folder
    captions.txt                                    a line per media file, in sorted order
    metadata.jsonl, metadata.json, metadata.csv     rows of a file name and a text
    the file name itself                            only with `--captions filename`

Different captions for one file in two places are a problem of that file: nothing says which one is right.
"""

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CAPTION_SOURCES = ("files", "filename")
LISTING = "captions.txt"
METADATA = ("metadata.jsonl", "metadata.json", "metadata.csv")
FILE_KEYS = ("file_path", "file_name", "video")
TEXT_KEYS = ("text", "caption", "prompt")


@dataclass
class Captions:
    """`texts` by media file; `problems` by media file without a usable caption; `file_problems` of caption files.

    The media files in `missing` have no caption at all; they are among the problems too.
    """

    texts: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    problems: dict[Path, str] = field(default_factory=dict)
    missing: set[Path] = field(default_factory=set)
    file_problems: list[tuple[Path, str]] = field(default_factory=list)


Candidate = tuple[Path, tuple[str, ...]]  # a caption file and its texts for one media file


class _Unusable(Exception):
    """Why a caption file cannot be used."""


def find_captions(
    folder: Path, media: Sequence[Path], source: str = "files", per_line: bool = False, dataset: Path | None = None
) -> Captions:
    """The captions of `media`: files below `folder`, in sorted order; `folder` may be a part (`train`) of `dataset`.

    The `source` "filename" uses the file's own name, with underscores as spaces, and reads no file. With `per_line`
    each line of a caption file is a caption. Raises nothing: problems are part of the result.
    """
    found = Captions()
    if source == "filename":
        for path in media:
            if _is_unicode(path.stem):
                found.texts[path] = (" ".join(path.stem.replace("_", " ").split()),)
            else:
                found.problems[path] = "its name is not UTF-8 text: rename it"
        return found
    candidates: dict[Path, list[Candidate]] = defaultdict(list)
    for path in media:
        for file in _own_files(dataset or folder, path):
            try:
                candidates[path].append((file, _split(_read_text(file), per_line)))
            except _Unusable as error:
                found.problems[path] = f"its caption {file.name} {error}"
    places = list(dict.fromkeys((folder, dataset or folder)))
    for path, file, texts in _read_shared_files(places, media, found.file_problems, per_line):
        candidates[path].append((file, texts))
    for path in media:
        if path not in found.problems:
            _choose(path, candidates[path], found)
    return found


def _choose(path: Path, candidates: list[Candidate], found: Captions) -> None:
    """Records the one caption among the candidates, or why there is not exactly one."""
    if len({texts for _, texts in candidates}) > 1:
        files = " and ".join(f"{file.parent.name}/{file.name}" for file, _ in candidates)
        found.problems[path] = f"it has different captions in {files}: keep one"
    elif not candidates:
        found.missing.add(path)
        found.problems[path] = f"it has no caption: write one to {path.stem}.txt beside it"
    elif not any(candidates[0][1]):
        found.problems[path] = f"its caption in {candidates[0][0].name} is empty: write one"
    else:
        found.texts[path] = tuple(text for text in candidates[0][1] if text)


def _own_files(dataset: Path, path: Path) -> list[Path]:
    """The existing caption files that belong to one media file alone."""
    beside = [path.with_suffix(suffix) for suffix in (".txt", ".TXT")]
    own = next(([file] for file in beside if file.exists()), [])
    # clip.mp4 with captions/clip.txt, or videos/clip.mp4 with captions/clip.txt; never above the dataset's folder.
    places = [path.parent] if path.parent == dataset else [path.parent, path.parent.parent]
    return own + [file for place in places if (file := place / "captions" / f"{path.stem}.txt").exists()]


def _read_shared_files(
    places: Sequence[Path], media: Sequence[Path], problems: list[tuple[Path, str]], per_line: bool
) -> Iterator[tuple[Path, Path, tuple[str, ...]]]:
    """(media file, caption file, texts) of the files that caption many media files; adds to `problems`.

    `places` are the folder of the media, then the dataset's folder where that is another one.
    """
    folder, *above = places
    for listing in (place / LISTING for place in above):
        # Its lines would have to be in the order of all parts of the dataset, which are scanned one by one.
        if listing.exists():
            problems.append((listing, f"move it into {folder.name}/: it must be beside the files that it lists"))
    listing = folder / LISTING
    if listing.exists() and not any(path.parent == folder and path.stem == "captions" for path in media):
        try:
            yield from ((path, listing, (line,)) for path, line in _read_listing(listing, media))
        except _Unusable as error:
            problems.append((listing, str(error)))
    known = {_resolve(path): path for path in media}
    for file in (place / name for place in places for name in METADATA):
        if not file.exists():
            continue
        try:
            for number, row in enumerate(_read_rows(file), 1):
                name, texts = _parse_row(row, number, per_line)
                named = _resolve(file.parent / name)
                if named in known:
                    yield known[named], file, texts
                elif file.parent == folder or not os.path.isfile(named):
                    problems.append((file, f"row {number} names {name}, which is not a media file of this folder"))
        except _Unusable as error:
            problems.append((file, str(error)))


def _read_listing(listing: Path, media: Sequence[Path]) -> list[tuple[Path, str]]:
    lines = [line.strip() for line in _read_text(listing).split("\n")]
    if len(lines) != len(media):
        raise _Unusable(f"it has {len(lines)} lines for {len(media)} media files: write one per file, in sorted order")
    return list(zip(media, lines, strict=True))


def _read_rows(file: Path) -> list[Any]:
    text = _read_text(file)
    try:
        if file.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        rows = json.loads(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise _Unusable(f"it is not valid {file.suffix[1:].upper()}: {error}") from None
    if not isinstance(rows, list):
        raise _Unusable("it is not a list of rows")
    return rows


def _parse_row(row: Any, number: int, per_line: bool) -> tuple[str, tuple[str, ...]]:
    """The file name and the texts of a row."""
    values = row if isinstance(row, dict) else {}
    if None in values:
        raise _Unusable(f"row {number} has more columns than the header: put a text with commas in quotes")
    name = next((values[key] for key in FILE_KEYS if values.get(key)), None)
    text = next((values[key] for key in TEXT_KEYS if key in values), None)
    texts = [text] if isinstance(text, str) else text
    if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(part, str) for part in texts):
        files, words = ", ".join(FILE_KEYS), ", ".join(TEXT_KEYS)
        raise _Unusable(f"row {number} needs a file name (one of {files}) and a text (one of {words})")
    if not all(map(_is_unicode, (name, *texts))):
        raise _Unusable(f"row {number} is not valid Unicode: it has a lone surrogate")
    if len(texts) > 1 and not per_line:
        raise _Unusable(f"row {number} has several texts: pass --caption_per_line to draw one per sample")
    return name, tuple(line for part in texts for line in _split(part.strip(), per_line))


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate: JSON can spell one, and a file name that is not UTF-8 is read with them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _resolve(path: Path) -> Path:
    """Without links and `..`; unchanged if no file can have this name."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a circle of links
        return path


def _split(text: str, per_line: bool) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip()) if per_line else (text,)


def _read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
        if "\0" in text:  # UTF-16 without a byte order mark
            raise UnicodeError
        return text
    except UnicodeError:
        raise _Unusable("is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise _Unusable(f"cannot be read: {error.strerror}") from None
