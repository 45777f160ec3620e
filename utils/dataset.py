"""From a folder to clips: which files, which captions, which frames at which size, in which order.

Knows the model only as numbers (`Grid`). All randomness is spent in `plan_epoch`: a `Window` is a sample on which
everything has been decided, and `load_clip` merely carries it out.

Letters in shapes: `F` frames, `H` height, `W` width.
"""

import itertools
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.buckets import WAN_GRID, Grid, bucket_size, count_tokens, max_frames
from utils.errors import UserError
from utils.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    MediaError,
    MediaInfo,
    crop_and_resize,
    is_image,
    is_video,
    probe,
    read_frames,
)

VALIDATION_NAMES = ("val", "validation", "eval", "test")
MIN_VIDEO_FRAMES = 5

T = TypeVar("T")

_PROBE_THREADS = 8
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Source:
    """A usable media file with its caption, and its control where one was asked for."""

    path: Path
    caption: str
    info: MediaInfo
    control: Path | None = None
    control_info: MediaInfo | None = None

    @property
    def frames(self) -> int:
        """Frames that both the file and its control have."""
        return min(self.info.frames, self.control_info.frames) if self.control_info else self.info.frames


@dataclass(frozen=True)
class Problem:
    """Why a media file cannot be trained on."""

    path: Path
    reason: str


@dataclass(frozen=True)
class SamplingOptions:
    """How samples are drawn; `token_limit` is inclusive, and several `base_res` are drawn from evenly."""

    base_res: tuple[int, ...] = (624,)
    token_limit: int = 10000
    max_frame_stride: int = 2
    random_frame_length: bool = False
    batch_size: int = 1
    grid: Grid = WAN_GRID


@dataclass(frozen=True)
class Window:
    """Everything about one sample, decided: frames start, start + stride, ... cut at `position` to width x height."""

    source: Source
    width: int
    height: int
    frames: int
    stride: int
    start: int
    position: tuple[float, float]
    grid: Grid = WAN_GRID

    @property
    def tokens(self) -> int:
        """Length of the transformer's sequence."""
        return count_tokens(self.width, self.height, self.frames, self.grid)

    @property
    def bucket(self) -> tuple[int, int, int]:
        """(width, height, frames): windows of equal bucket can share a batch."""
        return self.width, self.height, self.frames


@dataclass(frozen=True, eq=False)
class Clip:
    """Pixels of one window: uint8 RGB (3, F, H, W), and the control's where there is one."""

    pixels: Tensor
    caption: str
    control: Tensor | None
    path: Path

    def pin_memory(self) -> "Clip":
        """In page-locked memory, from where a GPU copies without the host waiting; the loader calls this."""
        control = None if self.control is None else self.control.pin_memory()
        return replace(self, pixels=self.pixels.pin_memory(), control=control)


def split_folders(dataset: Path) -> tuple[Path, list[Path]]:
    """The training folder (`train`, else the folder itself) and those of `VALIDATION_NAMES` that are there, in order.

    Hand these to `scan` of the first as `exclude`: they may lie inside.
    """
    train = dataset / "train"
    held_out = [dataset / name for name in VALIDATION_NAMES]
    return train if train.is_dir() else dataset, [folder for folder in held_out if folder.is_dir()]


def scan(
    folder: Path, load_control: bool = False, control_suffix: str = "_control", exclude: Sequence[Path] = ()
) -> tuple[list[Source], list[Problem]]:
    """Every media file below `folder`, as a source or as one or more problems, both in path order.

    Hidden files and folders and the folders `exclude` are left out. A source needs `<stem>.txt` beside it (UTF-8) and,
    with `load_control`, `<stem><control_suffix>.<suffix>` of the same kind. Raises `UserError` for a folder that is
    missing or has no media at all; a bad file never raises.
    """
    if load_control and not control_suffix:
        raise UserError("the control suffix is empty: it is what tells a control from its video, such as _control")
    files = _media_files(folder, exclude)
    controls = defaultdict(list)
    for path in files:
        if load_control and path.stem.endswith(control_suffix):
            controls[path.with_name(path.stem.removesuffix(control_suffix))].append(path)
    of_control = {path for paths in controls.values() for path in paths}
    candidates = [path for path in files if path not in of_control]
    namesakes = Counter(_stem(path) for path in candidates)
    probed = _probe_all(files)

    sources, problems = [], []
    for path in candidates:
        caption, reasons = _caption(path)
        reasons += _content_flaws(path, probed[path])
        if namesakes[_stem(path)] > 1:
            reasons.append(f"another file here is named {path.stem} too, and they would share a caption: rename one")
        control = None
        if load_control:
            control, flaws = _control(path, controls.get(_stem(path), []), control_suffix, probed)
            reasons += flaws
        problems += [Problem(path, reason) for reason in reasons]
        if not reasons:
            sources.append(Source(path, caption, probed[path], control, probed.get(control)))
    strays = [path for stem, paths in controls.items() for path in paths if stem not in namesakes]
    problems += [Problem(path, f"a control ({control_suffix}) without the file that it controls") for path in strays]
    return sources, problems


def plan_epoch(sources: Sequence[Source], options: SamplingOptions, seed: int, epoch: int) -> list[tuple[Window, ...]]:
    """The batches of one epoch: each source once, windows of equal bucket together, at most `batch_size` of them.

    The same arguments give the same plan on every machine. Raises `UserError` where `token_limit` is below one frame.
    """
    rng = random.Random(f"{seed}/{epoch}")
    buckets = defaultdict(list)
    for source in _shuffled(sources, rng):
        window = _draw_window(source, options, rng)
        buckets[window.bucket].append(window)
    size = options.batch_size
    parts = [tuple(windows[at : at + size]) for windows in buckets.values() for at in range(0, len(windows), size)]
    return _shuffled(parts, rng)


def validation_windows(sources: Sequence[Source], options: SamplingOptions, count: int) -> list[Window]:
    """At most `count` sources, evenly strided; of each the middle, as long as fits, at the first `base_res`.

    Raises `UserError` like `max_frames`.
    """
    count = min(count, len(sources))
    chosen = (sources[index * len(sources) // count] for index in range(count))
    return [_middle_window(source, options.base_res[0], options) for source in chosen]


def largest_windows(sources: Sequence[Source], options: SamplingOptions) -> list[Window]:
    """The most that a sample uses of each source, at every `base_res`. Raises `UserError` like `max_frames`."""
    return [_middle_window(source, base_res, options) for source in sources for base_res in options.base_res]


def load_clip(window: Window) -> Clip:
    """Read what `window` decided. The control is cut at the same fractions, whatever its own resolution.

    Raises `MediaError` for a file that has become unreadable.
    """
    source = window.source
    pixels = _read_window(source.path, source.info, window)
    control = _read_window(source.control, source.control_info, window) if source.control else None
    return Clip(pixels, source.caption, control, source.path)


def batches(
    sources: Sequence[Source],
    options: SamplingOptions,
    seed: int,
    start_epoch: int = 0,
    start_batch: int = 0,
    num_workers: int = 0,
) -> Iterator[list[Clip]]:
    """Clips of epoch after epoch without end, in the order of `plan_epoch`, loaded ahead by `num_workers` processes.

    `start_batch` batches are skipped, counted from the beginning of `start_epoch` and past its end if need be: with the
    number of batches that it has had, a run would go on where it was. Leaves the global random state alone. Closing
    the iterator ends the workers. It raises `MediaError` for a file that fails; this call raises `UserError` when
    nothing can be planned.
    """
    if not sources:
        raise UserError("there is nothing to train on: no usable image or video was found")
    plan_epoch(sources, options, seed, start_epoch)
    planned = (batch for epoch in itertools.count(start_epoch) for batch in plan_epoch(sources, options, seed, epoch))
    loader = DataLoader(
        _Loading(),
        batch_size=None,
        sampler=itertools.islice(planned, start_batch, None),
        num_workers=num_workers,
        collate_fn=_unchanged,
        prefetch_factor=_BATCHES_AHEAD if num_workers else None,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    return _raising(loader)


class _Loading(Dataset[list[Clip] | MediaError]):
    """Indexed by a planned batch. A failure is handed over as a value, since a raised one arrives with a traceback.

    DataLoader gives each worker one torch thread, and with it one decoding thread.
    """

    def __getitem__(self, windows: tuple[Window, ...]) -> list[Clip] | MediaError:
        try:
            return [load_clip(window) for window in windows]
        except MediaError as error:
            return error


def _unchanged(loaded: list[Clip] | MediaError) -> list[Clip] | MediaError:
    return loaded


def _raising(loader: Iterable[list[Clip] | MediaError]) -> Iterator[list[Clip]]:
    loaded = iter(loader)
    try:
        while True:
            clips = next(loaded)
            if isinstance(clips, MediaError):
                raise clips
            yield clips
    finally:
        # The last reference: a traceback that is kept would otherwise keep the workers too.
        del loaded


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


def _probe_all(files: list[Path]) -> dict[Path, MediaInfo | MediaError]:
    with ThreadPoolExecutor(_PROBE_THREADS) as pool:
        shown = tqdm(pool.map(_probe_or_error, files), total=len(files), desc="reading media", unit="file", delay=2)
        return dict(zip(files, shown, strict=True))


def _probe_or_error(path: Path) -> MediaInfo | MediaError:
    try:
        return probe(path)
    except MediaError as error:
        return error


def _stem(path: Path) -> Path:
    return path.with_name(path.stem)


def _caption(path: Path) -> tuple[str, list[str]]:
    """The caption of a media file, and what is wrong with it."""
    file, shouted = path.with_suffix(".txt"), path.with_suffix(".TXT")
    file = shouted if shouted.exists() and not file.exists() else file
    try:
        caption = file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        return "", [f"its caption {file.name} is not UTF-8 text: save it as UTF-8"]
    except OSError:
        return "", [f"it has no caption: write one into {file.name} beside it"]
    return caption, [] if caption else [f"its caption {file.name} is empty: write one"]


def _content_flaws(path: Path, info: MediaInfo | MediaError) -> list[str]:
    if isinstance(info, MediaError):
        return [info.reason]
    if is_video(path) and info.frames < MIN_VIDEO_FRAMES:
        return [f"it has {info.frames} frames: a video needs at least {MIN_VIDEO_FRAMES}"]
    return []


def _control(
    path: Path, found: list[Path], suffix: str, probed: dict[Path, MediaInfo | MediaError]
) -> tuple[Path | None, list[str]]:
    """The control of a media file, and what is wrong with it."""
    if len(found) != 1:
        names = " and ".join(control.name for control in found)
        flaw = f"has several controls, {names}: keep one" if found else f"has no control named {path.stem}{suffix}.*"
        return None, [f"it {flaw}"]
    control = found[0]
    if is_image(control) != is_image(path):
        return control, [f"its control {control.name} must be {'an image' if is_image(path) else 'a video'} as it is"]
    return control, [f"its control {control.name}: {flaw}" for flaw in _content_flaws(control, probed[control])]


def _fit(source: Source, base_res: int, options: SamplingOptions) -> tuple[int, int, int]:
    """Width, height and the most 4n+1 frames, by the token limit and by what the source has."""
    width, height = bucket_size(source.info.width, source.info.height, base_res, options.grid)
    step = options.grid.frame
    longest = (source.frames - 1) // step * step + 1
    return width, height, min(longest, max_frames(width, height, options.token_limit, options.grid))


def _draw_window(source: Source, options: SamplingOptions, rng: random.Random) -> Window:
    fits = [_fit(source, base_res, options) for base_res in options.base_res]
    width, height, frames = fits[_draw(len(fits), rng)]
    if options.random_frame_length:
        step = options.grid.frame
        frames = 1 + step * _draw((frames - 1) // step + 1, rng)
    stride = max(min(1 + _draw(options.max_frame_stride, rng), (source.frames - 1) // max(frames - 1, 1)), 1)
    start = _draw(source.frames - (frames - 1) * stride, rng)
    return Window(source, width, height, frames, stride, start, (rng.random(), rng.random()), options.grid)


def _middle_window(source: Source, base_res: int, options: SamplingOptions) -> Window:
    width, height, frames = _fit(source, base_res, options)
    return Window(source, width, height, frames, 1, (source.frames - frames) // 2, (0.5, 0.5), options.grid)


def _draw(count: int, rng: random.Random) -> int:
    """Uniform over 0 .. count - 1, from `random()` alone: the one generator method that Python promises to keep."""
    return int(rng.random() * count)


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    keys = [rng.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


def _read_window(path: Path, info: MediaInfo, window: Window) -> Tensor:
    indices = range(window.start, window.start + window.frames * window.stride, window.stride)
    frames = read_frames(path, indices, info)
    like = (window.source.info.width, window.source.info.height)
    pixels = crop_and_resize(frames, window.width, window.height, window.position, like)
    return rearrange(pixels, "f c h w -> c f h w").contiguous()
