"""From folders to sources: usable files with all that belongs to them, and the problems of all others.

Captions, controls, masks and start pictures belong to a file by its name.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from utils.common.console import say
from utils.common.errors import UserError
from utils.common.formatting import counted
from utils.data.captions import find_captions
from utils.data.folders import Folder, Rules
from utils.media.description import IMAGE_SUFFIXES, MIN_VIDEO_FRAMES, VIDEO_SUFFIXES, MediaError, MediaInfo
from utils.media.frame_rate import frames_at_rate, frames_within
from utils.media.inspection import Inspector
from utils.media.masks import BLACK
from utils.media.probing import is_image, is_video

VALIDATION_NAMES = ("val", "validation", "eval", "test")
# Rounding accounts for differences up to these shares between a clip and what belongs to it.
ASPECT_TOLERANCE, RATE_TOLERANCE = 0.05, 0.02

Candidates = dict[Path, list[Path]]  # what may belong to a clip, by the clip's path or name without its ending


@dataclass(frozen=True)
class PairedFile:
    """A clip's control or mask, whose frames correspond to the clip's one to one, or its start picture."""

    path: Path
    info: MediaInfo


@dataclass(frozen=True)
class Source:
    """A usable media file: its captions, of which each sample takes one, and the frames that samples may use.

    `frame_indices` number frames of the file, ascending: every frame, or the frames at the folder's frame rate. They
    end where a shorter control or mask ends, or at the folder's `max_duration`. `first` is a picture that a model is
    given in place of the file's first frame.
    """

    path: Path
    captions: tuple[str, ...]
    info: MediaInfo
    frame_indices: Sequence[int]
    folder: Path
    rules: Rules
    control: PairedFile | None = None
    mask: PairedFile | None = None
    first: PairedFile | None = None

    @property
    def files(self) -> list[Path]:
        """The file itself, then its control, its mask and its start picture if it has them."""
        return [self.path, *(paired.path for paired in (self.control, self.mask, self.first) if paired)]

    @property
    def readings(self) -> dict[str, dict[str, Any]]:
        """How the file, its control, mask and start picture are read, where versions up to 0.2 read other pictures."""
        infos = {"file": self.info}
        others = {"control": self.control, "mask": self.mask, "first": self.first}
        infos |= {name: paired.info for name, paired in others.items() if paired}
        return {name: info.reading for name, info in infos.items() if info.reading}


@dataclass(frozen=True)
class Problem:
    """Why a file cannot be used."""

    path: Path
    reason: str


def split_folders(dataset: Path) -> tuple[Path, list[Path]]:
    """(training folder, validation folders): `train` or else `dataset` itself, and the existing `VALIDATION_NAMES`.

    The validation folders may lie inside the training folder: pass them to its `scan` as `exclude`.
    """
    train = dataset / "train"
    validation = [dataset / name for name in VALIDATION_NAMES]
    return train if train.is_dir() else dataset, [folder for folder in validation if folder.is_dir()]


def scan(
    folder: Folder,
    model_fps: float,
    exclude: Sequence[Path] = (),
    dataset: Path | None = None,
    inspector: Inspector | None = None,
) -> tuple[list[Source], list[Problem]]:
    """Every media file below the folder, as a source or as one or more problems, both in path order.

    `dataset` is the folder that this one is a part of: captions may lie there. Hidden files, hidden folders and the
    folders `exclude` are skipped. Raises `UserError` if the folder is missing or holds no media; a bad file is a
    problem, never an exception. Start pictures that the rules do not use are neither: a line is printed about them.
    """
    rules = folder.rules
    pairings = [_Pairing("control", rules.control_suffix, rules.control_folder)] if rules.reads_control else []
    pairings += [_Pairing("mask", rules.mask_suffix, rules.mask_folder)] if rules.reads_mask else []
    pairings += [_START_PICTURES] if rules.reads_first else []
    files = _media_files(folder.path, [*exclude, *(pairing.folder for pairing in pairings if pairing.folder)])
    candidates = [pairing.find_candidates(files) for pairing in pairings]
    paired_paths = {path for found in candidates for paths in found.values() for path in paths}
    clips = _without_start_pictures(folder, [path for path in files if path not in paired_paths], dataset)
    captions = find_captions(folder.path, clips, rules.captions, rules.caption_per_line, dataset)
    stems = Counter(_stem(path) for path in clips)
    masks = {
        path
        for pairing, found in zip(pairings, candidates, strict=True)
        if pairing.name == "mask"
        for path in chain(*found.values())
    }
    media = _inspect([*clips, *sorted(paired_paths)], masks, inspector or Inspector())

    sources, problems = [], [Problem(path, reason) for path, reason in captions.file_problems]
    for path in clips:
        reasons = [known[path] for known in (captions.problems, media.unusable) if path in known]
        if stems[_stem(path)] > 1:
            reasons.append(f"another file in its folder is named {path.stem} too, so they share a caption: rename one")
        paired = {}
        for pairing, found in zip(pairings, candidates, strict=True):
            others = pairing.candidates_of(path, found)
            if pairing.is_optional and not others:
                continue
            mismatches = pairing.problems(path, others, media)
            reasons += mismatches
            if not mismatches:
                paired[pairing.name] = PairedFile(others[0], media.infos[others[0]])
        if not reasons:
            try:
                source = _source(folder, path, captions.texts[path], media.infos[path], paired, model_fps)
                reasons = _too_short(source, folder.rules.rate(model_fps))
                sources += [] if reasons else [source]
            except ValueError as error:
                reasons = [str(error)]
        problems += [Problem(path, reason) for reason in reasons]
    for pairing, found in zip(pairings, candidates, strict=True):
        problems += pairing.orphans(found, set(stems))
    return sources, problems


@dataclass(frozen=True)
class _Media:
    """What inspection found: `infos` of every readable file, and why a file is `unusable`, readable or not."""

    infos: dict[Path, MediaInfo]
    unusable: dict[Path, str]


def _inspect(files: Sequence[Path], masks: set[Path], inspector: Inspector) -> _Media:
    media = _Media({}, {})
    for path, result in inspector.inspect(files, masks).items():
        if isinstance(result, MediaError):
            media.unusable[path] = result.reason
            continue
        media.infos[path] = result
        if not result.is_image and result.frames < MIN_VIDEO_FRAMES:
            media.unusable[path] = f"it has {result.frames} frames: a video needs at least {MIN_VIDEO_FRAMES}"
        elif result.mask and result.mask.most <= BLACK:
            media.unusable[path] = "it is black all over, so nothing would count"
    return media


@dataclass(frozen=True)
class _Pairing:
    """How controls, or masks, are matched with clips: by a suffix beside them, or by name in a folder of their own.

    What `is_optional` belongs to the clips that have it: a picture beside a video. A file of such a name without a
    video is a clip like any other.
    """

    name: str
    suffix: str
    folder: Path | None = None
    is_optional: bool = False

    def find_candidates(self, files: Sequence[Path]) -> Candidates:
        """All controls (masks), by the path of their clip without its ending; in a folder, by the clip's name alone.

        Raises UserError for an empty suffix, and as `scan` does for the folder.
        """
        found = defaultdict(list)
        if self.folder is not None:
            for path in _media_files(self.folder, []):
                found[Path(path.stem)].append(path)
        elif not self.suffix:
            raise UserError(f"the {self.name} suffix is empty: give what a {self.name} is named by, like _{self.name}")
        else:
            for path in files:
                if path.stem.endswith(self.suffix):
                    found[path.with_name(path.stem.removesuffix(self.suffix))].append(path)
        if self.is_optional:
            videos = {_stem(path) for path in files if is_video(path)}
            pictures = {stem: list(filter(is_image, paths)) for stem, paths in found.items() if stem in videos}
            return {stem: paths for stem, paths in pictures.items() if paths}
        return found

    def candidates_of(self, clip: Path, candidates: Candidates) -> list[Path]:
        stem = _stem(clip)
        return candidates.get(Path(stem.name) if self.folder else stem, [])

    def problems(self, clip: Path, others: Sequence[Path], media: _Media) -> list[str]:
        """Why `others` are not exactly one control (mask) that fits the clip; nothing if they are."""
        if not others:
            expected = f"{clip.stem}.* in {self.folder}" if self.folder else f"{clip.stem}{self.suffix}.*"
            return [f"it has no {self.name} named {expected}"]
        if len(others) > 1:
            names = " and ".join(other.name for other in others)
            return [f"it has several {self.name}s, {names}: keep one"]
        other = others[0]
        own, info = media.infos.get(clip), media.infos.get(other)
        if info is None or other in media.unusable:
            reasons = [media.unusable[other]]
        elif own is not None and own.is_image and not info.is_image:
            return [f"its {self.name} {other.name} must be an image, like the file itself"]
        elif own is not None and self.name == "control" and info.is_image and not own.is_image:
            return [f"its {self.name} {other.name} must be a video, like the file itself"]
        else:
            reasons = _mismatches(info, own)
        return [f"its {self.name} {other.name}: {reason}" for reason in reasons]

    def orphans(self, candidates: Candidates, stems: set[Path]) -> list[Problem]:
        """Files beside the clips that belong to none of them. A folder of its own may also serve other datasets."""
        if self.folder:
            return []
        paths = (path for stem, found in candidates.items() if stem not in stems for path in found)
        return [Problem(path, f"there is no clip for this {self.name}") for path in paths]


_START_PICTURES = _Pairing("start picture", "_first", is_optional=True)


def _without_start_pictures(folder: Folder, clips: list[Path], dataset: Path | None) -> list[Path]:
    """The clips without start pictures that nothing reads; a line says so. One with a caption of its own is a clip."""
    named = {path for paths in _START_PICTURES.find_candidates(clips).values() for path in paths}
    if not named:
        return clips
    captions = find_captions(folder.path, clips, per_line=folder.rules.caption_per_line, dataset=dataset)
    unused = named & captions.missing
    if unused:
        pictures, are = counted(len(unused), _START_PICTURES.name), "is" if len(unused) == 1 else "are"
        say(f"{pictures} such as {min(unused).name} {are} not used: see --load_first_frame")
    return [path for path in clips if path not in unused]


def _mismatches(other: MediaInfo, clip: MediaInfo | None) -> list[str]:
    """Why the frames of a control or mask cannot correspond to the clip's; nothing for a clip that is unreadable."""
    if clip is None:
        return []
    reasons = []
    if abs(other.width * clip.height / (other.height * clip.width) - 1) > ASPECT_TOLERANCE:
        sizes = f"{other.width}x{other.height}", f"{clip.width}x{clip.height}"
        reasons.append("its aspect ratio differs: {} and {}".format(*sizes))
    if other.fps and clip.fps and abs(other.fps / clip.fps - 1) > RATE_TOLERANCE:
        reasons.append(f"it has {other.fps:.4g} frames per second, not {clip.fps:.4g}: frames must correspond")
    return reasons


def _source(
    folder: Folder, path: Path, texts: tuple[str, ...], info: MediaInfo, paired: dict[str, PairedFile], model_fps: float
) -> Source:
    frames = min([info.frames, *(other.info.frames for other in paired.values() if not other.info.is_image)])
    indices = _frame_indices(info, frames, folder.rules, folder.rules.rate(model_fps))
    captions = tuple(folder.rules.caption_prefix + text for text in texts)
    control, mask, first = (paired.get(name) for name in ("control", "mask", _START_PICTURES.name))
    return Source(path, captions, info, indices, folder.path, folder.rules, control, mask, first)


def _too_short(source: Source, rate: float | None) -> list[str]:
    """Why a video has too few frames left for a sample, if it has."""
    left = len(source.frame_indices)
    if source.info.is_image or left >= MIN_VIDEO_FRAMES:
        return []
    why = f" at {rate:g} frames per second" if rate is not None else ""
    return [f"only {left} of its {source.info.frames} frames are left{why}: a video needs at least {MIN_VIDEO_FRAMES}"]


def _frame_indices(info: MediaInfo, frames: int, rules: Rules, rate: float | None) -> Sequence[int]:
    """Which of a file's first `frames` frames samples may use: those at the rate, up to the longest duration."""
    if info.is_image or (rate is None and not rules.max_duration):
        return range(frames)
    times = info.frame_times()
    if rules.max_duration:
        times = times[: frames_within(times, rules.max_duration)]
    if rate is None:
        return range(min(frames, len(times)))
    return tuple(index for index in frames_at_rate(times, rate) if index < frames)


def _media_files(folder: Path, exclude: Sequence[Path]) -> list[Path]:
    """All media below `folder` in path order, following links but entering no folder twice.

    Raises `UserError` if the folder is missing or holds no media.
    """
    if not folder.is_dir():
        raise UserError(f"the dataset {folder} {'is a file, not a folder' if folder.exists() else 'does not exist'}")
    found, visited = [], {excluded.resolve() for excluded in exclude}
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
        raise UserError(f"there are no videos or images in {folder} or its subfolders\nlooked for {formats}")
    return sorted(media, key=lambda path: path.relative_to(folder).parts)


def _stem(path: Path) -> Path:
    return path.with_name(path.stem)
