"""From sources to samples: which frames, at which size, with which caption, in which order.

All random decisions about the data are made here: a `Window` is a sample with every decision made.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import mean
from typing import TypeVar

from utils.common.errors import UserError
from utils.common.options import option
from utils.data.buckets import bucket_size, count_tokens, max_frames, round_up_frames
from utils.data.scan import PairedFile, Source
from utils.media.description import MIN_VIDEO_FRAMES
from wan.configs.grid import Grid

T = TypeVar("T")
CROPPED_SHARE = 0.1  # of samples that --random_frame_crop gives fewer frames


@dataclass(frozen=True)
class Batching:
    """batches"""

    token_limit: int = option(
        10_000,
        "most tokens per clip, (w/16) * (h/16) * ((frames-1)/4 + 1); on Wan 2.2 TI2V-5B w/32 and h/32",
        minimum=1,
    )
    batch_size: int = option(1, "clips of equal size per step", minimum=1, aliases=("train_batch_size",))
    num_workers: int = option(
        2,
        "processes that load the next clips during a training step",
        minimum=0,
        affects_training=False,
        aliases=("dataloader_num_workers",),
    )

    def limits(self, grid: Grid) -> "Limits":
        """The most a training step takes of a model whose tokens cover `grid`."""
        return Limits(self.token_limit, self.batch_size, grid)


@dataclass(frozen=True)
class Limits:
    """The most a training step takes: `token_limit` tokens per clip, counted on `grid`, and `batch_size` clips."""

    token_limit: int
    batch_size: int
    grid: Grid


@dataclass(frozen=True)
class Window:
    """One sample: the frames `indices` of a source's file, cropped at `position` and resized to width x height.

    `position` is (x, y) in 0..1 of the room that the crop leaves in the picture.
    """

    source: Source
    caption: str
    width: int
    height: int
    indices: tuple[int, ...]
    position: tuple[float, float]
    grid: Grid

    @property
    def frames(self) -> int:
        return len(self.indices)

    @property
    def first(self) -> PairedFile | None:
        """The source's start picture, for a sample that begins where the file does: it stands for that frame alone."""
        return self.source.first if self.indices[0] == self.source.frame_indices[0] else None

    @property
    def tokens(self) -> int:
        """Length of the transformer's sequence."""
        return count_tokens(self.width, self.height, self.frames, self.grid)

    @property
    def bucket(self) -> tuple[int, int, int]:
        """(width, height, frames): windows of equal bucket can share a batch."""
        return self.width, self.height, self.frames


WindowGroup = tuple[Window, ...]  # one use of a clip: a single window, or several that cover it (chunks, slide)


@dataclass(frozen=True)
class Plan:
    """The samples of a run, epoch after epoch: the same on every machine and with any number of workers.

    With `fixed`, whose entries belong to the sources in order, each use of a source draws one of its fixed groups
    instead of a new one.
    """

    sources: Sequence[Source]
    limits: Limits
    seed: int
    fixed: Sequence[Sequence[WindowGroup]] | None = None

    @property
    def fixed_windows(self) -> list[Window]:
        """Every window that a sample can be, where they are fixed; else none."""
        return flatten_windows(self.fixed or [])

    def steps_per_epoch(self, batches_per_step: int | Fraction) -> int:
        """Optimizer steps of the first epoch; the last one may have fewer batches."""
        return math.ceil(len(self.epoch(0)) / Fraction(batches_per_step))

    def epoch(self, epoch: int) -> list[tuple[Window, ...]]:
        """The batches of one epoch in order: at most `batch_size` windows of equal bucket each.

        An epoch uses each source as often as its folder's `repeats`, and videos `video_repeat` times that. For the
        fraction of `repeats`, successive epochs take successive sources of a fixed order, so that over many epochs all
        are used equally often. An epoch after the first may be empty. Raises `UserError` if one frame exceeds
        `token_limit`.
        """
        rng = random.Random(f"{self.seed}/{epoch}")
        buckets = defaultdict(list)
        for index in _shuffled(self._source_indices(epoch), rng):
            for window in self._windows(index, rng):
                buckets[window.bucket].append(window)
        size = self.limits.batch_size
        batches = [tuple(group[at : at + size]) for group in buckets.values() for at in range(0, len(group), size)]
        return _shuffled(batches, rng)

    @property
    def largest_batch(self) -> tuple[Window, ...]:
        """The largest window that any epoch can have, as often as the fullest batch of the first epoch has windows."""
        windows = self.fixed_windows or full_length_windows(self.sources, self.limits)
        return (largest_window(windows),) * max(map(len, self.epoch(0)))

    @property
    def mean_tokens(self) -> float:
        """The tokens of a batch, on average over the first epoch."""
        return mean(map(count_batch, self.epoch(0)))

    def _windows(self, index: int, rng: random.Random) -> Iterator[Window]:
        """The windows of one use of a source. A generator: captions are drawn between the draws of the windows."""
        source = self.sources[index]
        fixed = None if self.fixed is None else self.fixed[index]
        for window in _draw_windows(source, source.sides, self.limits, rng) if fixed is None else _choose(fixed, rng):
            yield replace(window, caption=_draw_caption(source, rng))

    def _source_indices(self, epoch: int) -> list[int]:
        """The indices of the sources that an epoch uses, each as often as it is used."""
        folders = defaultdict(list)
        for index, source in enumerate(self.sources):
            folders[source.folder, source.rules].append(index)
        used: list[int] = []
        for (folder, rules), group in folders.items():
            whole, fraction = divmod(rules.repeats, 1)
            # How many sources the fraction has used before and after this epoch; rounded, as 3 * 0.1 * 10 exceeds 3.
            first, last = (math.ceil(round(count * fraction * len(group), 6)) for count in (epoch, epoch + 1))
            order = _shuffled(group, random.Random(f"{self.seed}/{folder.name}"))
            in_turn = group * int(whole) + [order[turn % len(group)] for turn in range(first, last)]
            used += [index for index in in_turn for _ in range(self.sources[index].uses)]
        return used


def count_batch(batch: Sequence[Window]) -> int:
    """The tokens of a batch."""
    return sum(window.tokens for window in batch)


def make_plan(sources: Sequence[Source], limits: Limits, seed: int, num_fixed: int) -> Plan:
    """A plan that draws new windows in every epoch, or with `num_fixed` above 0 one of so many windows per source."""
    return Plan(sources, limits, seed, fixed_windows(sources, limits, num_fixed) if num_fixed else None)


def fixed_windows(sources: Sequence[Source], limits: Limits, count: int) -> list[list[WindowGroup]]:
    """The window groups to cache of each source at every side: its middle if `count` is 1, else `count` draws.

    They depend on the source and the limits alone, so that another run finds them in the cache.
    """
    return [list(_fixed_groups(source, limits, count)) for source in sources]


def flatten_windows(fixed: Sequence[Sequence[WindowGroup]]) -> list[Window]:
    """All windows of `fixed_windows`, in order."""
    return [window for groups in fixed for group in groups for window in group]


def validation_windows(sources: Sequence[Source], limits: Limits, count: int) -> list[Window]:
    """The middle of at most `count` sources, evenly spaced in their order, at the first side of each.

    Raises `UserError` as `max_frames` does.
    """
    count = min(count, len(sources))
    chosen = (sources[index * len(sources) // count] for index in range(count))
    return [middle_window(source, source.sides[0], limits) for source in chosen]


def largest_window(windows: Iterable[Window]) -> Window:
    """The one with the most tokens; the first of several."""
    return max(windows, key=lambda window: window.tokens)


def full_length_windows(sources: Sequence[Source], limits: Limits) -> list[Window]:
    """The longest window of each source at every side. Raises `max_frames`' `UserError`, naming the file."""
    windows = []
    for source in sources:
        try:
            windows += [middle_window(source, side, limits) for side in source.sides]
        except UserError as error:
            raise UserError(f"{source.path}: {error}") from None
    return windows


def middle_window(source: Source, side: int, limits: Limits) -> Window:
    """The middle frames of a source, as many as fit, cropped to the middle of the picture, with the first caption.

    The first frames of a source that has a start picture. `side` is one of the source's.
    """
    width, height, frames = _largest_bucket(source, side, limits)
    stride = source.rules.frame_stride or 1
    length = (frames - 1) * stride + 1
    first = 0 if source.first else (len(source.frame_indices) - length) // 2
    indices = tuple(source.frame_indices[first : first + length : stride])
    return Window(source, source.captions[0], width, height, indices, (0.5, 0.5), limits.grid)


def _fixed_groups(source: Source, limits: Limits, count: int) -> Iterator[WindowGroup]:
    for side in source.sides:
        if count == 1 and not source.rules.covers_clip:
            yield (middle_window(source, side, limits),)
            continue
        for number in range(count):
            rng = random.Random(f"{source.path.name}/{side}/{number}")
            drawn = _draw_windows(source, (side,), limits, rng)
            yield tuple(replace(window, position=(0.5, 0.5)) for window in drawn) if count == 1 else tuple(drawn)


def _largest_bucket(source: Source, side: int, limits: Limits) -> tuple[int, int, int]:
    """Width, height and the most frames, a multiple of `grid.frame` plus 1, by the limits, the rules and the source."""
    rules, grid = source.rules, limits.grid
    width, height = bucket_size(source.info.width, source.info.height, side, grid, rules.shapes)
    available = (source.num_frames - 1) // grid.frame * grid.frame + 1
    if rules.has_sizes:
        # A bucket may have a few pixels more than its square, and fewer where a clip is not enlarged.
        most = round_up_frames(rules.max_frames, grid)
        return width, height, min(available, rules.frames_of_area(min(side**2, width * height), most, grid.frame))
    frames = min(available, max_frames(width, height, limits.token_limit, grid))
    return width, height, min(frames, round_up_frames(rules.max_frames, grid)) if rules.max_frames else frames


def _draw_windows(source: Source, sides: Sequence[int], limits: Limits, rng: random.Random) -> Iterator[Window]:
    """One use of a source at one of these sides: several windows if its rules cover long clips, else one."""
    rules, step = source.rules, limits.grid.frame
    buckets = [_largest_bucket(source, side, limits) for side in sides]  # a bad one raises, drawn or not
    width, height, frames = _choose(buckets, rng)
    if rules.random_frame_length:
        frames = 1 + step * _draw_index((frames - 1) // step + 1, rng)
    elif rules.random_frame_crop and rng.random() < CROPPED_SHARE and frames > step:
        frames = 1 + step * _draw_index((frames - 1) // step, rng)
    for places in _draw_places(source, frames, step, rng):
        indices = tuple(source.frame_indices[place] for place in places)
        position = rng.random(), rng.random()
        yield Window(source, source.captions[0], width, height, indices, position, limits.grid)


def _draw_caption(source: Source, rng: random.Random) -> str:
    dropped = rng.random() < source.rules.caption_dropout
    return "" if dropped else _choose(source.captions, rng)


def _draw_places(source: Source, frames: int, step: int, rng: random.Random) -> Iterator[Sequence[int]]:
    """For each window the ascending places of its frames among the `frame_indices` of the source.

    Every window has `frames` frames; the last chunk may have fewer. A lone window of a source that has a start picture
    begins with the source, where it can be given the picture.
    """
    rules, available = source.rules, len(source.frame_indices)
    if rules.frame_sampling == "uniform":
        spacing = (available - 1) / max(frames - 1, 1)
        yield [round(number * spacing) for number in range(frames)] if frames > 1 else [available // 2]
        return
    if rules.frame_sampling == "chunks":
        yield from _chunks(available, frames, step)
        return
    last = available - frames
    if rules.frame_sampling == "slide":
        yield from (range(first, first + frames) for first in (*range(0, last, max(frames // 2, 1)), last))
        return
    stride = rules.frame_stride or 1
    if rules.fps == "native" and not rules.frame_stride:
        stride = max(min(1 + _draw_index(rules.max_frame_stride, rng), (available - 1) // max(frames - 1, 1)), 1)
    num_starts = available - (frames - 1) * stride
    start = 0 if source.first else {"head": 0, "middle": (num_starts - 1) // 2}.get(rules.frame_sampling)
    start = _draw_index(num_starts, rng) if start is None else start
    yield range(start, start + frames * stride, stride)


def _chunks(available: int, frames: int, step: int) -> Iterator[range]:
    """Consecutive windows without overlap; the rest is a shorter one if it is long enough for a video."""
    for first in range(0, available, frames):
        length = min(frames, (available - first - 1) // step * step + 1)
        if length >= min(frames, MIN_VIDEO_FRAMES):
            yield range(first, first + length)


def _draw_index(count: int, rng: random.Random) -> int:
    """Uniform over 0 .. count - 1. From `random()` alone: the one method whose sequence Python promises to keep."""
    return int(rng.random() * count)


def _choose(items: Sequence[T], rng: random.Random) -> T:
    return items[_draw_index(len(items), rng)]


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    keys = [rng.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]
