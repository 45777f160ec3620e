"""From folders to sources: which files, with which captions, controls and masks, and what is wrong with the others."""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from utils.common.errors import UserError
from utils.data.captions import find_captions
from utils.data.folders import Folder, Rules
from utils.media.frame_rate import frames_at_rate
from utils.media.inspection import inspect_all
from utils.media.probing import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaError, MediaInfo, frame_times, is_image, is_video

VALIDATION_NAMES = ("val", "validation", "eval", "test")
MIN_VIDEO_FRAMES = 5
OTHER_SHAPE, OTHER_RATE = 0.05, 0.02  # a control or mask may differ by these shares, which rounding brings

Found = dict[Path, MediaInfo | MediaError]


@dataclass(frozen=True)
class PairedFile:
    """A file that goes with another, frame for frame: its control, or its mask."""

    path: Path
    info: MediaInfo


@dataclass(frozen=True)
class Source:
    """A usable media file: its captions, of which each sample takes one, and the frames to choose from.

    `shown` are frame numbers of the file: all of them, or those at the folder's frame rate, also where a control or
    mask ends earlier.
    """

    path: Path
    captions: tuple[str, ...]
    info: MediaInfo
    shown: Sequence[int]
    folder: Path
    rules: Rules
    control: PairedFile | None = None
    mask: PairedFile | None = None


@dataclass(frozen=True)
class Problem:
    """Why a media file cannot be trained on."""

    path: Path
    reason: str


def split_folders(dataset: Path) -> tuple[Path, list[Path]]:
    """The training folder (`train`, else the folder itself) and those of `VALIDATION_NAMES` that are there, in order.

    Hand these to `scan` of the first as `exclude`: they may lie inside.
    """
    train = dataset / "train"
    held_out = [dataset / name for name in VALIDATION_NAMES]
    return train if train.is_dir() else dataset, [folder for folder in held_out if folder.is_dir()]


def scan(
    folder: Folder, model_fps: float, exclude: Sequence[Path] = (), dataset: Path | None = None
) -> tuple[list[Source], list[Problem]]:
    """Every media file below the folder, as a source or as one or more problems, both in path order.

    `dataset` is the folder that this one is a part of: captions may lie there. Hidden files and folders and the
    folders `exclude` are left out. Raises `UserError` for a folder that is missing or has no media at all; a bad file
    never raises.
    """
    rules = folder.rules
    roles = [
        _Role("control", rules.reads_control, rules.control_suffix, rules.control_folder),
        _Role("mask", rules.reads_mask, rules.mask_suffix, rules.mask_folder),
    ]
    files = _media_files(folder.path, [*exclude, *(role.folder for role in roles if role.folder)])
    wanted = {role.name: role.among(files) for role in roles if role.wanted}
    companions = {path for found in wanted.values() for paths in found.values() for path in paths}
    media = [path for path in files if path not in companions]
    captions = find_captions(folder.path, media, rules.captions, rules.caption_per_line, dataset)
    namesakes = Counter(_stem(path) for path in media)
    found = _inspect([*media, *sorted(companions)])

    sources, problems = [], [Problem(path, reason) for path, reason in captions.strays]
    for path in media:
        reasons = [captions.flaws[path]] if path in captions.flaws else []
        reasons += _content_flaws(path, found[path])
        if namesakes[_stem(path)] > 1:
            reasons.append(f"another file here is named {path.stem} too, and they would share a caption: rename one")
        goes_with = {}
        for role in roles:
            if role.wanted:
                goes_with[role.name], flaws = role.of(path, wanted[role.name], found)
                reasons += flaws
        problems += [Problem(path, reason) for reason in reasons]
        if not reasons:
            sources.append(_source(folder, path, captions.texts[path], found, goes_with, model_fps))
    known = {_stem(path) for path in media}
    for role in roles:
        problems += role.strays(wanted.get(role.name, {}), known)
    return sources, problems


def _content_flaws(path: Path, info: MediaInfo | MediaError) -> list[str]:
    """What is wrong with a file's content."""
    if isinstance(info, MediaError):
        return [info.reason]
    if is_video(path) and info.frames < MIN_VIDEO_FRAMES:
        return [f"it has {info.frames} frames: a video needs at least {MIN_VIDEO_FRAMES}"]
    return []


def _mismatches(other: MediaInfo, info: MediaInfo | MediaError) -> list[str]:
    """Why a companion cannot go with its file, frame for frame and place for place."""
    if isinstance(info, MediaError):
        return []
    flaws = []
    if abs(other.width * info.height / (other.height * info.width) - 1) > OTHER_SHAPE:
        sizes = f"{other.width}x{other.height}", f"{info.width}x{info.height}"
        flaws.append("it is {}, of another shape than {}".format(*sizes))
    if other.fps and info.fps and abs(other.fps / info.fps - 1) > OTHER_RATE:
        flaws.append(f"it has {other.fps:.4g} frames per second, not {info.fps:.4g}: they must go frame by frame")
    return flaws


@dataclass(frozen=True)
class _Role:
    """What a file can be to another: named with a suffix beside it, or alike in a folder of its own."""

    name: str
    wanted: bool
    suffix: str
    folder: Path | None

    def among(self, files: Sequence[Path]) -> dict[Path, list[Path]]:
        """The files of this role by the path, without ending, of what they go with; in a folder by name alone."""
        found = defaultdict(list)
        if self.folder is not None:
            for path in _media_files(self.folder, []):
                found[Path(path.stem)].append(path)
        elif not self.suffix:
            raise UserError(f"the {self.name} suffix is empty: it tells a {self.name} from its clip, as _{self.name}")
        else:
            for path in files:
                if path.stem.endswith(self.suffix):
                    found[path.with_name(path.stem.removesuffix(self.suffix))].append(path)
        return found

    def of(self, path: Path, wanted: dict[Path, list[Path]], found: Found) -> tuple[PairedFile | None, list[str]]:
        """The companion of a media file, and what is wrong with it."""
        paths = wanted.get(self._key(_stem(path)), [])
        if len(paths) != 1:
            names = " and ".join(other.name for other in paths)
            named = f"{path.stem}.* in {self.folder}" if self.folder else f"{path.stem}{self.suffix}.*"
            flaw = f"has several {self.name}s, {names}: keep one" if paths else f"has no {self.name} named {named}"
            return None, [f"it {flaw}"]
        other = paths[0]
        if is_image(path) and not is_image(other):
            return None, [f"its {self.name} {other.name} must be an image as it is"]
        if self.name == "control" and is_image(other) and not is_image(path):
            return None, [f"its {self.name} {other.name} must be a video as it is"]
        flaws = _content_flaws(other, found[other]) or _mismatches(found[other], found[path])
        return (None if flaws else PairedFile(other, found[other])), [
            f"its {self.name} {other.name}: {f}" for f in flaws
        ]

    def strays(self, wanted: dict[Path, list[Path]], known: set[Path]) -> list[Problem]:
        """Files beside the clips that go with none of them; a folder of its own may hold those of others too."""
        reason = f"a {self.name} without the file that it goes with"
        lonely = (paths for key, paths in wanted.items() if key not in known and not self.folder)
        return [Problem(path, reason) for paths in lonely for path in paths]

    def _key(self, stem: Path) -> Path:
        return Path(stem.name) if self.folder else stem


def _source(
    folder: Folder, path: Path, texts: tuple[str, ...], found: Found, goes_with: dict[str, PairedFile], model_fps: float
) -> Source:
    info, rate = found[path], folder.rules.rate(model_fps)
    frames = min([info.frames, *(c.info.frames for c in goes_with.values() if not is_image(c.path))])
    shown: Sequence[int] = range(frames)
    if rate is not None and not is_image(path):
        shown = tuple(index for index in frames_at_rate(frame_times(path), rate) if index < frames)
    prefixed = tuple(folder.rules.caption_prefix + text for text in texts)
    return Source(path, prefixed, info, shown, folder.path, folder.rules, **goes_with)


def _media_files(folder: Path, exclude: Sequence[Path]) -> list[Path]:
    """All media below `folder` in path order, through links but no folder twice. Raises `UserError` for none."""
    if not folder.is_dir():
        raise UserError(f"the dataset {folder} {'is a file, not a folder' if folder.exists() else 'does not exist'}")
    found, visited = [], {left_out.resolve() for left_out in exclude}
    for here, folders, names in os.walk(folder, followlinks=True):
        real = Path(here).resolve()
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, name) for name in names if not name.startswith(".")]
    media = [path for path in found if is_image(path) or is_video(path)]
    if not media:
        formats = " ".join(sorted(VIDEO_SUFFIXES) + sorted(IMAGE_SUFFIXES))
        raise UserError(f"there are no videos or images in {folder}\nlooked for {formats}, in subfolders too")
    return sorted(media, key=lambda path: path.relative_to(folder).parts)


def _inspect(files: Sequence[Path]) -> Found:
    shown = tqdm(inspect_all(files), total=len(files), desc="reading media", unit="file", delay=2)
    return dict(zip(files, shown, strict=True))


def _stem(path: Path) -> Path:
    return path.with_name(path.stem)
