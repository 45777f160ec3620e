"""From folders to sources: usable files with their captions, controls and masks, and the problems of all others."""

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
# Rounding accounts for differences up to these shares between a clip and its control or mask.
ASPECT_TOLERANCE, RATE_TOLERANCE = 0.05, 0.02

Candidates = dict[Path, list[Path]]  # controls or masks, by their clip's path or name without its ending


@dataclass(frozen=True)
class PairedFile:
    """A clip's control or mask: its frames correspond to the clip's one to one."""

    path: Path
    info: MediaInfo


@dataclass(frozen=True)
class Source:
    """A usable media file: its captions, of which each sample takes one, and the frames that samples may use.

    `frame_indices` number frames of the file, ascending: every frame, or the frames at the folder's frame rate. They
    end where a shorter control or mask ends.
    """

    path: Path
    captions: tuple[str, ...]
    info: MediaInfo
    frame_indices: Sequence[int]
    folder: Path
    rules: Rules
    control: PairedFile | None = None
    mask: PairedFile | None = None

    @property
    def files(self) -> list[Path]:
        """The file itself, then its control and its mask if it has them."""
        return [self.path, *(paired.path for paired in (self.control, self.mask) if paired)]


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
    folder: Folder, model_fps: float, exclude: Sequence[Path] = (), dataset: Path | None = None
) -> tuple[list[Source], list[Problem]]:
    """Every media file below the folder, as a source or as one or more problems, both in path order.

    `dataset` is the folder that this one is a part of: captions may lie there. Hidden files, hidden folders and the
    folders `exclude` are skipped. Raises `UserError` if the folder is missing or holds no media; a bad file is a
    problem, never an exception.
    """
    rules = folder.rules
    pairings = [_Pairing("control", rules.control_suffix, rules.control_folder)] if rules.reads_control else []
    pairings += [_Pairing("mask", rules.mask_suffix, rules.mask_folder)] if rules.reads_mask else []
    files = _media_files(folder.path, [*exclude, *(pairing.folder for pairing in pairings if pairing.folder)])
    candidates = [pairing.find_candidates(files) for pairing in pairings]
    paired_paths = {path for found in candidates for paths in found.values() for path in paths}
    clips = [path for path in files if path not in paired_paths]
    captions = find_captions(folder.path, clips, rules.captions, rules.caption_per_line, dataset)
    stems = Counter(_stem(path) for path in clips)
    media = _inspect([*clips, *sorted(paired_paths)])

    sources, problems = [], [Problem(path, reason) for path, reason in captions.file_problems]
    for path in clips:
        reasons = [known[path] for known in (captions.problems, media.unusable) if path in known]
        if stems[_stem(path)] > 1:
            reasons.append(f"another file in its folder is named {path.stem} too, so they share a caption: rename one")
        paired = {}
        for pairing, found in zip(pairings, candidates, strict=True):
            others = pairing.candidates_of(path, found)
            mismatches = pairing.problems(path, others, media)
            reasons += mismatches
            if not mismatches:
                paired[pairing.name] = PairedFile(others[0], media.infos[others[0]])
        problems += [Problem(path, reason) for reason in reasons]
        if not reasons:
            sources.append(_source(folder, path, captions.texts[path], media.infos[path], paired, model_fps))
    for pairing, found in zip(pairings, candidates, strict=True):
        problems += pairing.orphans(found, set(stems))
    return sources, problems


@dataclass(frozen=True)
class _Media:
    """What inspection found: `infos` of every readable file, and why a file is `unusable`, readable or not."""

    infos: dict[Path, MediaInfo]
    unusable: dict[Path, str]


def _inspect(files: Sequence[Path]) -> _Media:
    media = _Media({}, {})
    results = tqdm(inspect_all(files), total=len(files), desc="reading media", unit="file", delay=2)
    for path, result in zip(files, results, strict=True):
        if isinstance(result, MediaError):
            media.unusable[path] = result.reason
            continue
        media.infos[path] = result
        if is_video(path) and result.frames < MIN_VIDEO_FRAMES:
            media.unusable[path] = f"it has {result.frames} frames: a video needs at least {MIN_VIDEO_FRAMES}"
    return media


@dataclass(frozen=True)
class _Pairing:
    """How controls, or masks, are matched with clips: by a suffix beside them, or by name in a folder of their own."""

    name: str
    suffix: str
    folder: Path | None

    def find_candidates(self, files: Sequence[Path]) -> Candidates:
        """All controls (masks), by the path of their clip without its ending; in a folder, by the clip's name alone."""
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
        if is_image(clip) and not is_image(other):
            return [f"its {self.name} {other.name} must be an image, like the file itself"]
        if self.name == "control" and is_image(other) and not is_image(clip):
            return [f"its {self.name} {other.name} must be a video, like the file itself"]
        if other in media.unusable:
            reasons = [media.unusable[other]]
        else:
            reasons = _mismatches(media.infos[other], media.infos.get(clip))
        return [f"its {self.name} {other.name}: {reason}" for reason in reasons]

    def orphans(self, candidates: Candidates, stems: set[Path]) -> list[Problem]:
        """Files beside the clips that belong to none of them. A folder of its own may also serve other datasets."""
        if self.folder:
            return []
        paths = (path for stem, found in candidates.items() if stem not in stems for path in found)
        return [Problem(path, f"there is no clip for this {self.name}") for path in paths]


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
    rules, rate = folder.rules, folder.rules.rate(model_fps)
    frames = min([info.frames, *(other.info.frames for other in paired.values() if not is_image(other.path))])
    indices: Sequence[int] = range(frames)
    if rate is not None and not is_image(path):
        indices = tuple(index for index in frames_at_rate(frame_times(path), rate) if index < frames)
    captions = tuple(rules.caption_prefix + text for text in texts)
    return Source(path, captions, info, indices, folder.path, rules, paired.get("control"), paired.get("mask"))


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
