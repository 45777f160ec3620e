"""From sources to samples: which frames, at which size, with which caption, in which order.

All randomness is spent here: a `Window` is a sample on which everything has been decided.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from utils.common.errors import UserError
from utils.data.buckets import bucket_size, count_tokens, max_frames
from utils.data.scan import MIN_VIDEO_FRAMES, Source
from wan.configs.grid import Grid

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The most a training step takes: `token_limit` tokens per clip, counted on `grid`, and `batch_size` clips."""

    token_limit: int
    batch_size: int
    grid: Grid


@dataclass(frozen=True)
class Window:
    """Everything about one sample, decided: the frames `indices` of its file, cut at `position` to width x height."""

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
    def tokens(self) -> int:
        """Length of the transformer's sequence."""
        return count_tokens(self.width, self.height, self.frames, self.grid)

    @property
    def bucket(self) -> tuple[int, int, int]:
        """(width, height, frames): windows of equal bucket can share a batch."""
        return self.width, self.height, self.frames


Showing = tuple[Window, ...]  # of a clip: one window, or several that use all of it


@dataclass(frozen=True)
class Plan:
    """The samples of a run, epoch after epoch: the same on every machine.

    With `fixed`, a showing of a source is one of those instead of a new one.
    """

    sources: Sequence[Source]
    limits: Limits
    seed: int
    fixed: Sequence[Sequence[Showing]] | None = None

    def epoch(self, epoch: int) -> list[tuple[Window, ...]]:
        """The batches of one epoch: windows of equal bucket together, at most `batch_size` of them.

        Each source comes as often as its folder's `repeats` says; of a fraction, as many of the folder's sources as
        make it up come once more, one after another, so that over many epochs all come equally often. Only the first
        epoch is sure to show something. Raises `UserError` where `token_limit` is below one frame.
        """
        rng = random.Random(f"{self.seed}/{epoch}")
        buckets = defaultdict(list)
        for index in _shuffled(self._shown(epoch), rng):
            for window in self._windows(index, rng):
                buckets[window.bucket].append(window)
        size = self.limits.batch_size
        parts = [tuple(windows[at : at + size]) for windows in buckets.values() for at in range(0, len(windows), size)]
        return _shuffled(parts, rng)

    def _windows(self, index: int, rng: random.Random) -> Iterator[Window]:
        source = self.sources[index]
        if self.fixed is None:
            windows = _draw_windows(source, self.limits, rng)
        else:
            windows = self.fixed[index][_draw(len(self.fixed[index]), rng)]
        return (replace(window, caption=_draw_caption(source, rng)) for window in windows)

    def _shown(self, epoch: int) -> list[int]:
        """The places of the sources that an epoch shows, each as often as it does."""
        folders = defaultdict(list)
        for index, source in enumerate(self.sources):
            folders[source.folder, source.rules].append(index)
        shown: list[int] = []
        for (folder, rules), group in folders.items():
            whole, fraction = divmod(rules.repeats, 1)
            first, last = (math.ceil(round(turn * fraction * len(group), 6)) for turn in (epoch, epoch + 1))
            order = _shuffled(group, random.Random(f"{self.seed}/{folder.name}"))
            shown += group * int(whole) + [order[turn % len(group)] for turn in range(first, last)]
        return shown


def fixed_windows(sources: Sequence[Source], limits: Limits, count: int) -> list[list[Showing]]:
    """For each source the only showings that there are of it: its middle for a `count` of 1, else random ones.

    At every `base_res`; they depend on the source and nothing else, so that another run finds them encoded.
    """
    return [list(_fixed(source, limits, count)) for source in sources]


def flatten_windows(fixed: Sequence[Sequence[Showing]]) -> list[Window]:
    """All of them, in order."""
    return [window for showings in fixed for showing in showings for window in showing]


def _fixed(source: Source, limits: Limits, count: int) -> Iterator[Showing]:
    for base_res in source.rules.base_res:
        alone = replace(source, rules=replace(source.rules, base_res=(base_res,)))
        if count == 1 and not source.rules.covers_clip:
            yield (middle_window(source, base_res, limits),)
            continue
        for number in range(count):
            rng = random.Random(f"{source.path.name}/{base_res}/{number}")
            drawn = _draw_windows(alone, limits, rng)
            windows = [replace(w, position=(0.5, 0.5)) for w in drawn] if count == 1 else drawn
            yield tuple(replace(window, source=source) for window in windows)


def validation_windows(sources: Sequence[Source], limits: Limits, count: int) -> list[Window]:
    """At most `count` sources, evenly strided; of each the middle, as long as fits, at the first `base_res`.

    Raises `UserError` like `max_frames`.
    """
    count = min(count, len(sources))
    chosen = (sources[index * len(sources) // count] for index in range(count))
    return [middle_window(source, source.rules.base_res[0], limits) for source in chosen]


def full_length_windows(sources: Sequence[Source], limits: Limits) -> list[Window]:
    """The most that a sample uses of each source, at every `base_res`. Raises `UserError` like `max_frames`."""
    windows = []
    for source in sources:
        try:
            windows += [middle_window(source, base_res, limits) for base_res in source.rules.base_res]
        except UserError as error:
            raise UserError(f"{source.path}: {error}") from None
    return windows


def middle_window(source: Source, base_res: int, limits: Limits) -> Window:
    """The middle of a source and of its picture, as long as fits, with its first caption."""
    width, height, frames = _fit(source, base_res, limits)
    first = (len(source.shown) - frames) // 2
    indices = tuple(source.shown[first : first + frames])
    return Window(source, source.captions[0], width, height, indices, (0.5, 0.5), limits.grid)


def _fit(source: Source, base_res: int, limits: Limits) -> tuple[int, int, int]:
    """Width, height and the most 4n+1 frames, by the token limit and by what the source has."""
    width, height = bucket_size(source.info.width, source.info.height, base_res, limits.grid, source.rules.shapes)
    step = limits.grid.frame
    longest = (len(source.shown) - 1) // step * step + 1
    return width, height, min(longest, max_frames(width, height, limits.token_limit, limits.grid))


def _draw_windows(source: Source, limits: Limits, rng: random.Random) -> Iterator[Window]:
    """The samples of one showing of a source: several where long clips are used as a whole, else one."""
    rules = source.rules
    fits = [_fit(source, base_res, limits) for base_res in rules.base_res]
    width, height, frames = fits[_draw(len(fits), rng)]
    step = limits.grid.frame
    if rules.random_frame_length:
        frames = 1 + step * _draw((frames - 1) // step + 1, rng)
    for places in _places(source, frames, step, rng):
        indices = tuple(source.shown[place] for place in places)
        position = rng.random(), rng.random()
        yield Window(source, source.captions[0], width, height, indices, position, limits.grid)


def _draw_caption(source: Source, rng: random.Random) -> str:
    dropped = rng.random() < source.rules.caption_dropout
    return "" if dropped else source.captions[_draw(len(source.captions), rng)]


def _places(source: Source, frames: int, step: int, rng: random.Random) -> Iterator[Sequence[int]]:
    """Which of the frames a source shows, as its folder's rules say: ascending places, `frames` of them or fewer."""
    rules, available = source.rules, len(source.shown)
    if rules.frame_sampling == "uniform":
        spread = (available - 1) / max(frames - 1, 1)
        yield [round(place * spread) for place in range(frames)] if frames > 1 else [available // 2]
        return
    if rules.frame_sampling == "chunks":
        yield from _chunks(available, frames, step)
        return
    if rules.frame_sampling == "slide":
        last = available - frames
        yield from (range(first, first + frames) for first in (*range(0, last, max(frames // 2, 1)), last))
        return
    stride = 1
    if rules.fps == "native":
        stride = max(min(1 + _draw(rules.max_frame_stride, rng), (available - 1) // max(frames - 1, 1)), 1)
    room = available - (frames - 1) * stride
    first = {"head": 0, "middle": (room - 1) // 2}.get(rules.frame_sampling)
    first = _draw(room, rng) if first is None else first
    yield range(first, first + frames * stride, stride)


def _chunks(available: int, frames: int, step: int) -> Iterator[range]:
    """One after another, without overlap; what is left at the end is one more where it is long enough for a video."""
    for first in range(0, available, frames):
        length = min(frames, (available - first - 1) // step * step + 1)
        if length >= min(frames, MIN_VIDEO_FRAMES):
            yield range(first, first + length)


def _draw(count: int, rng: random.Random) -> int:
    """Uniform over 0 .. count - 1, from `random()` alone: the one generator method that Python promises to keep."""
    return int(rng.random() * count)


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    keys = [rng.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]
