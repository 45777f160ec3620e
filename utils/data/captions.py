"""The captions of a folder's media, in whichever of the usual layouts they are kept.

    clip.txt beside clip.mp4
    captions/clip.txt                        in a folder beside the media or beside their folder
    captions.txt                             a line per media file, in sorted order
    metadata.jsonl, metadata.json, metadata.csv     rows of a file name and a text
    the file name itself                     only where that is asked for

A file that has captions in two places has none: which one counts must not be guessed.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
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
    """What was found: `texts` of each media file, `flaws` of those without, and `strays` that belong to none."""

    texts: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    flaws: dict[Path, str] = field(default_factory=dict)
    strays: list[tuple[Path, str]] = field(default_factory=list)


class _Unusable(Exception):
    """Why a caption file says nothing."""


def find_captions(
    folder: Path, media: Sequence[Path], source: str = "files", per_line: bool = False, dataset: Path | None = None
) -> Captions:
    """The captions of `media`, files below `folder` in sorted order, which may be a part (`train`) of `dataset`.

    `source` "filename" takes the file's own name, underscores as spaces, and reads nothing. With `per_line` every line
    of a caption file is a caption of its own.
    """
    found = Captions()
    if source == "filename":
        found.texts = {path: (" ".join(path.stem.replace("_", " ").split()),) for path in media}
        return found
    offers: dict[Path, list[tuple[Path, tuple[str, ...]]]] = defaultdict(list)
    for path in media:
        for file in _own_files(dataset or folder, path):
            try:
                offers[path].append((file, _split(_text(file), per_line)))
            except _Unusable as error:
                found.flaws[path] = f"its caption {file.name} {error}"
    homes = list(dict.fromkeys((folder, dataset or folder)))
    for path, file, texts in _listed(homes, media, found.strays, per_line):
        offers[path].append((file, texts))
    for path in media:
        if path not in found.flaws:
            _settle(path, offers[path], found)
    return found


def _settle(path: Path, offers: list[tuple[Path, tuple[str, ...]]], found: Captions) -> None:
    if len({texts for _, texts in offers}) > 1:
        files = " and ".join(f"{file.parent.name}/{file.name}" for file, _ in offers)
        found.flaws[path] = f"it has different captions in {files}: keep one"
    elif not offers:
        found.flaws[path] = f"it has no caption: write one into {path.stem}.txt beside it"
    elif not any(offers[0][1]):
        found.flaws[path] = f"its caption in {offers[0][0].name} is empty: write one"
    else:
        found.texts[path] = tuple(text for text in offers[0][1] if text)


def _own_files(dataset: Path, path: Path) -> list[Path]:
    """The caption files of one media file that are there."""
    beside = [path.with_suffix(suffix) for suffix in (".txt", ".TXT")]
    there = next(([file] for file in beside if file.exists()), [])
    # videos/clip.mp4 with captions/clip.txt, or clip.mp4 with captions/clip.txt; never above the dataset's folder.
    homes = [path.parent] if path.parent == dataset else [path.parent, path.parent.parent]
    return there + [file for home in homes if (file := home / "captions" / f"{path.stem}.txt").exists()]


def _listed(
    homes: Sequence[Path], media: Sequence[Path], strays: list[tuple[Path, str]], per_line: bool
) -> Iterable[tuple[Path, Path, tuple[str, ...]]]:
    """(media, file, texts) of listings and metadata; what is wrong with those goes to `strays`.

    `homes` are the folder of the media and, where it is a part of a dataset, that one: its listing cannot be of both.
    """
    folder, *above = homes
    for listing in (home / LISTING for home in above):
        if listing.exists():
            strays.append((listing, f"move it into {folder.name}/, whose files it is to list"))
    listing = folder / LISTING
    if listing.exists() and not any(path.parent == folder and path.stem == "captions" for path in media):
        try:
            lines = _text(listing).split("\n")
            if len(lines) != len(media):
                reason = f"it has {len(lines)} lines for {len(media)} media files: a line for each, in sorted order"
                raise _Unusable(reason)
            yield from ((path, listing, (line.strip(),)) for path, line in zip(media, lines, strict=True))
        except _Unusable as error:
            strays.append((listing, str(error)))
    known = {path.resolve(): path for path in media}
    for file in (home / name for home in homes for name in METADATA):
        if not file.exists():
            continue
        try:
            for number, row in enumerate(_rows(file), 1):
                name, texts = _row(row, number, per_line)
                named = (file.parent / name).resolve()
                if named in known:
                    yield known[named], file, texts
                elif file.parent == folder or not named.is_file():
                    strays.append((file, f"row {number} names {name}, which is no media file of this folder"))
        except _Unusable as error:
            strays.append((file, str(error)))


def _rows(file: Path) -> list[Any]:
    text = _text(file)
    try:
        if file.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        rows = json.loads(text)
    except (json.JSONDecodeError, csv.Error) as error:
        raise _Unusable(f"it is not valid {file.suffix[1:].upper()}: {error}") from None
    if not isinstance(rows, list):
        raise _Unusable("it is not a list of rows")
    return rows


def _row(row: Any, number: int, per_line: bool) -> tuple[str, tuple[str, ...]]:
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
    if len(texts) > 1 and not per_line:
        raise _Unusable(f"row {number} has several texts: pass --caption_per_line to draw one per sample")
    return name, tuple(line for part in texts for line in _split(part.strip(), per_line))


def _split(text: str, per_line: bool) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip()) if per_line else (text,)


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
        if "\0" in text:  # UTF-16
            raise UnicodeError
        return text
    except UnicodeError:
        raise _Unusable("is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise _Unusable(f"cannot be read: {error.strerror}") from None
