"""From folders to sources: usable files with all that belongs to them, and the problems of all others.

Captions, controls, masks and start pictures belong to a file by its name. Files are inspected before they are paired:
an image format may hold a picture or an animation.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.common.console import say
from utils.data.captions import Captions, find_captions, find_orphans
from utils.data.clip_list import read_clip_list
from utils.data.folders import Folder, Rules
from utils.data.notices import Kind, Notice, format_notices
from utils.data.pairing import (
    CONTROL,
    MASK,
    START,
    START_PICTURES,
    Matches,
    Media,
    Pairing,
    find_pairings,
    find_unasked,
    match_start_pictures,
)
from utils.data.walking import CONVERT, require_files
from utils.media.description import MIN_VIDEO_FRAMES, MediaError, MediaInfo
from utils.media.frame_rate import frames_at_rate, frames_within
from utils.media.inspection import Inspector
from utils.media.masks import BLACK

_UNREAD = Kind("file", f"not read, as no decoder here knows the format: {CONVERT}")
_UNLISTED = Kind("file", "not used, as it is not in --clip_list")
_ORPHAN = Kind("caption file", "not used, as no clip has this name")


@dataclass(frozen=True)
class PairedFile:
    """A clip's control or mask, whose frames correspond to the clip's one to one, or its start picture."""

    path: Path
    info: MediaInfo


@dataclass(frozen=True)
class Source:
    """A usable media file: its captions, of which each sample takes one, and the frames that samples may use.

    `frame_indices` number frames of the file, ascending: every frame, or the frames at the folder's frame rate. They
    end where a shorter control or mask ends, or at the folder's `max_duration`. Where an image stands for a video, they
    are those of that video. `first` is a picture that a model is given in place of the file's first frame.
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
    def sides(self) -> tuple[int, ...]:
        """The sides in pixels of the squares whose area a sample may have."""
        return self.rules.sides(self.info.is_image)

    @property
    def uses(self) -> int:
        """How often it is used where a clip is used once: videos as often as the rules repeat them."""
        return 1 if self.info.is_image else max(self.rules.video_repeat, 1)

    @property
    def num_frames(self) -> int:
        """The most frames that a sample can have: those at the folder's frame stride."""
        return -(-len(self.frame_indices) // (self.rules.frame_stride or 1))

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
    """Why a file cannot be used. `folder` is the part of a dataset where it was found, or whose clip needs it."""

    path: Path
    reason: str
    folder: Path | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Scan:
    """What a folder holds: its sources in path order, its problems, and what else is worth a line.

    `notices` are about files that are not used, `notes` about captions.
    """

    sources: list[Source]
    problems: list[Problem]
    notices: list[Notice]
    notes: list[str]


def scan(
    folder: Folder,
    model_fps: float,
    exclude: Sequence[Path] = (),
    dataset: Path | None = None,
    inspector: Inspector | None = None,
) -> tuple[list[Source], list[Problem]]:
    """The sources and problems that `survey` finds; the lines about everything else are printed."""
    found = survey(folder, model_fps, exclude, dataset, inspector)
    for line in [*found.notes, *format_notices(found.notices)]:
        say(line)
    return found.sources, found.problems


def survey(
    folder: Folder,
    model_fps: float,
    exclude: Sequence[Path] = (),
    dataset: Path | None = None,
    inspector: Inspector | None = None,
) -> Scan:
    """Every media file below the folder, as a source or as one or more problems, and notices of what is not used.

    `dataset` is the folder that this one is a part of: captions may lie there. Hidden files, hidden folders and the
    folders `exclude` are skipped. Raises `UserError` if the folder is missing, `NoMediaError` if it holds no media; a
    bad file is a problem, never an exception. Controls, masks and start pictures that the rules do not use are neither.
    With a list of clips, only files that it names are sources, and `dataset` is the folder itself.
    """
    rules = folder.rules
    skipped = [*exclude, *(path for path in (rules.control_folder, rules.mask_folder) if path)]
    files = _find_files(folder, skipped)
    if rules.clip_list is not None:
        return _survey_listed(folder, model_fps, files, inspector or Inspector())
    media = _inspect(files, inspector or Inspector())
    pairs = _pair(folder, files, media, dataset)
    captions = find_captions(folder.path, pairs.clips, rules.captions, rules.caption_per_line, dataset)
    sources, problems = _judge(folder, model_fps, files, media, pairs, captions)
    orphans = [] if rules.captions == "filename" else find_orphans(folder.path, files.named, skipped, dataset)
    kinds = {_UNREAD: files.unread, **pairs.unused, _ORPHAN: orphans}
    return Scan(sources, problems, _notices(kinds, pairs.matches, dataset or folder.path), captions.notes)


@dataclass(frozen=True)
class _Files:
    """All files of a folder in path order: `clips`, and the files named as `others` that belong to them.

    `faults` say why a file or a folder cannot be opened. `named` are the files that captions may belong to.
    """

    clips: list[Path]
    others: dict[Pairing, list[Path]]
    unread: list[Path]
    faults: dict[Path, str]
    named: list[Path]

    @cached_property
    def media(self) -> set[Path]:
        return {*self.clips, *(path for paths in self.others.values() for path in paths)}


def _find_files(folder: Folder, skipped: Sequence[Path]) -> _Files:
    """The files of the folder, and of folders of controls and masks. Raises as `survey` does."""
    files = require_files(folder.path, skipped)
    unread, faults, others = list(files.unread), dict(files.faults), {}
    for pairing in find_pairings(folder.rules):
        if pairing.folder is None:
            others[pairing] = pairing.named(files.media)
            continue
        own = require_files(pairing.folder, what=f"{pairing.name} folder")
        others[pairing] = own.media
        unread += own.unread
        faults |= own.faults
    apart = {path for paths in others.values() for path in paths}
    clips = [path for path in files.media if path not in apart]
    return _Files(clips, others, unread, faults, files.media + files.unread)


def _inspect(files: _Files, inspector: Inspector) -> Media:
    masks = {path for pairing, paths in files.others.items() if pairing.name == MASK for path in paths}
    others = sorted(files.media - set(files.clips))
    media = Media({}, {path: fault for path, fault in files.faults.items() if path in files.media})
    readable = [path for path in [*files.clips, *others] if path not in files.faults]
    for path, result in inspector.inspect(readable, masks).items():
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
class _Pairs:
    """The `clips` in path order, what belongs to them, and what is named like that but not used, by its kind."""

    clips: list[Path]
    matches: list[Matches]
    unused: dict[Kind, list[Path]]


def _pair(folder: Folder, files: _Files, media: Media, dataset: Path | None) -> _Pairs:
    starts = match_start_pictures(files.clips, files.clips, media)
    asked, unasked = ([starts], []) if folder.rules.reads_first else ([], [starts])
    unasked += [pairing.match(files.clips, pairing.named(files.clips)) for pairing in find_unasked(folder.rules)]
    unused = _find_unused(folder, files.clips, unasked, dataset)
    apart = {path for paths in (*unused.values(), *(match.clips for match in asked)) for path in paths}
    clips = [path for path in files.clips if path not in apart]
    return _Pairs(clips, [pairing.match(clips, paths) for pairing, paths in files.others.items()] + asked, unused)


def _find_unused(
    folder: Folder, clips: list[Path], unasked: Sequence[Matches], dataset: Path | None
) -> dict[Kind, list[Path]]:
    """What is named like something that the rules do not ask for, and has no caption: what has one is a clip."""
    if not any(match.clips for match in unasked):
        return {}
    captions = find_captions(folder.path, clips, per_line=folder.rules.caption_per_line, dataset=dataset)
    return {
        Kind(match.pairing.name, _why_unused(folder.rules, match.pairing.name)): sorted(
            captions.missing & {*match.clips}
        )
        for match in unasked
    }


def _why_unused(rules: Rules, name: str) -> str:
    folders = {CONTROL: rules.control_folder, MASK: rules.mask_folder}
    if folders.get(name):
        return f"not used, as --{name}_folder is given"
    return f"not used: see --load_{'first_frame' if name == START else name}"


def _judge(
    folder: Folder, model_fps: float, files: _Files, media: Media, pairs: _Pairs, captions: Captions
) -> tuple[list[Source], list[Problem]]:
    """A source of each clip that nothing is wrong with, and whatever is wrong with clips and other files."""
    sources, faults = [], list(captions.file_problems)
    faults += [(path, fault) for path, fault in files.faults.items() if path not in files.media]
    twins = {} if folder.rules.clip_list else _find_twins(pairs.clips)
    for path in pairs.clips:
        reasons = [found[path] for found in (captions.problems, media.unusable, twins) if path in found]
        reasons += [reason for match in pairs.matches for reason in match.problems(path, media)]
        if not reasons:
            try:
                sources.append(_source(folder, path, captions.texts[path], media, pairs.matches, model_fps))
            except ValueError as error:
                reasons = [str(error)]
        faults += [(path, reason) for reason in reasons]
    for match in pairs.matches:
        others = match.unmatched(files.others.get(match.pairing, []))
        faults += [(path, f"there is no clip for this {match.pairing.name}") for path in others]
    return sources, [Problem(path, reason, folder.path) for path, reason in faults]


def _survey_listed(folder: Folder, model_fps: float, files: _Files, inspector: Inspector) -> Scan:
    """What `survey` finds where a list says which files are used. Raises `UserError` for a list that cannot be read."""
    rules = folder.rules
    assert rules.clip_list is not None
    listed = read_clip_list(rules.clip_list, folder.path, files.clips, rules.caption_per_line)
    clips = [path for path in files.clips if path in listed.rows]
    unlisted = [path for path in files.clips if path not in listed.rows]
    starts = START_PICTURES.named(unlisted) if rules.reads_first else []
    used = replace(files, clips=clips + starts)
    faults = {path: fault for path, fault in files.faults.items() if path in used.media or path.is_dir()}
    used = replace(used, faults=faults)
    media = _inspect(used, inspector)
    for path in clips:
        if path in media.infos and (misfit := listed.misfit(path, media.infos[path])):
            media.unusable.setdefault(path, misfit)
    matches = [pairing.match(clips, paths) for pairing, paths in files.others.items()]
    matches += [match_start_pictures(clips, starts, media)] if rules.reads_first else []
    sources, problems = _judge(folder, model_fps, used, media, _Pairs(clips, matches, {}), listed.captions)
    apart = {path for match in matches for path in match.clips}
    unused = {_UNLISTED: [path for path in unlisted if path not in apart]}
    return Scan(sources, problems, _notices(unused, matches, folder.path), [])


def _find_twins(clips: Sequence[Path]) -> dict[Path, str]:
    """Clips that differ in their endings alone."""
    stems = Counter((path.parent, path.stem) for path in clips)
    twins = (path for path in clips if stems[path.parent, path.stem] > 1)
    return {p: f"another file in its folder is named {p.stem} too, so they share a caption: rename one" for p in twins}


def _notices(kinds: dict[Kind, list[Path]], matches: Sequence[Matches], root: Path) -> list[Notice]:
    def called(path: Path) -> str:
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name

    found = []
    for match in matches:
        kind = Kind(match.pairing.name, "used, though letter case differs")
        found += [Notice(kind, other, f"{called(other)} for {called(clip)}") for other, clip in match.respelled.items()]
    return found + [Notice(kind, path, called(path)) for kind, paths in kinds.items() for path in paths]


def _source(
    folder: Folder, path: Path, texts: tuple[str, ...], media: Media, matches: Sequence[Matches], model_fps: float
) -> Source:
    """The source of a clip that nothing is wrong with. Raises ValueError for a video of which too little is left."""
    rules, info, paired = folder.rules, media.infos[path], {}
    for match in matches:
        for other in match.of[path]:
            paired[match.pairing.name] = PairedFile(other, media.infos[other])
    ends = [(other.info.frames, name) for name, other in paired.items() if not other.info.is_image]
    frames, shortest = min([(info.frames, ""), *ends])
    indices = _frame_indices(info, frames, rules, rules.rate(model_fps))
    num_left = len(indices[:: rules.frame_stride or 1])
    if not info.is_image and num_left < MIN_VIDEO_FRAMES:
        left = f"only {num_left} of its {info.frames} frames {'is' if num_left == 1 else 'are'} left"
        raise ValueError(f"{left}{_limits(rules, model_fps, shortest)}: a video needs at least {MIN_VIDEO_FRAMES}")
    captions = tuple(rules.caption_prefix + text for text in texts)
    control, mask, first = (paired.get(name) for name in (CONTROL, MASK, START))
    return Source(path, captions, info, indices, folder.path, rules, control, mask, first)


def _limits(rules: Rules, model_fps: float, shortest: str) -> str:
    """What leaves fewer frames than a video has: a rate, a stride, the longest duration, the end of another file."""
    rate = rules.rate(model_fps)
    limits = [f" at {rate:g} frames per second"] if rate is not None else []
    limits += [f" with --frame_stride {rules.frame_stride}"] if rules.frame_stride > 1 else []
    limits += [f" in its first {rules.max_duration:g} s"] if rules.max_duration else []
    return "".join([*limits, f" before its {shortest} ends" if shortest else ""])


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
