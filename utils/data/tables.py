"""What a run prints about its dataset before a model is loaded: clips, buckets, problems, and the plan."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from utils.common.formatting import counted, format_table, one_line, shorten
from utils.data.buckets import count_tokens, seen_share
from utils.data.caption_files import is_unicode
from utils.data.names import natural_order
from utils.data.plan import Plan, Window
from utils.data.scan import Problem, Source
from utils.media.description import Coverage
from utils.media.frame_rate import SLOWER_THAN
from utils.media.masks import BRIGHTNESS, COLOURS, EQUAL, LABELS, OPACITY

CAPTION_WIDTH = 24  # columns of the caption column
NOTABLE_SPEED = 0.1  # a clip's playing speed is noted if it is off by more than this share
NOTABLE_GAP = 1.5  # so is a gap between frames that is longer than this times the lower quartile
ROUNDING = 0.001  # seconds that a file may round to
NOTABLE_CROP = 0.6  # and a picture of which less is seen
MASK_RULES = {OPACITY: "by its opacity", LABELS: "labels", COLOURS: "colours"}  # for those not read by brightness


def format_clips(
    windows: Sequence[Window], held_out: Sequence[Window], problems: Sequence[Problem], model_fps: float
) -> str:
    """One row per clip and resolution: the file's properties, the largest window a sample takes of it, and remarks.

    Training clips come first, then those held out, then files that cannot be used; each in natural order.
    """
    bad_files = [_Place(problem.path, problem.folder) for problem in {each.path: each for each in problems}.values()]
    places = [*(_place(window) for window in (*windows, *held_out)), *bad_files]
    names, order = _tell_apart(places), _display_order(places)
    rows = []
    for part, prefix in ((windows, ""), (held_out, "held out, ")):
        for window in sorted(part, key=lambda window: order[_place(window)]):
            rows.append(_clip_row(window, names[window.source.path], model_fps, prefix))
    for place in sorted(bad_files, key=order.__getitem__):
        status = ", ".join(["cannot be used, see below", *_name_remarks(names[place.path])])
        rows.append((names[place.path], "", "", "", "", 0, "", status))
    return format_table(("file", "size", "fps", "frames", "bucket", "tokens", "caption", "status"), rows)


def format_prompts(windows: Sequence[Window]) -> str:
    """One row per resolution at which the lines of a list are trained: their number, and the video of each."""
    by_bucket: dict[tuple[int, int, int], list[Window]] = defaultdict(list)
    for window in windows:
        by_bucket[window.bucket].append(window)
    rows = []
    for at_bucket in by_bucket.values():
        first, prompts = at_bucket[0], [window.caption for window in at_bucket]
        repeated = len(prompts) - len(set(prompts))
        remarks = [f"{counted(repeated, 'line')} repeated"] * bool(repeated)
        rows.append(
            (
                one_line(first.source.path.name),
                len(prompts),
                _frames(first),
                f"{first.width}x{first.height}",
                first.tokens,
                _caption(prompts[0]),
                ", ".join([*remarks, *_length_remarks(first)]) or "ok",
            )
        )
    return format_table(("file", "prompts", "frames", "bucket", "tokens", "first prompt", "status"), rows)


def format_buckets(batches: Sequence[Sequence[Window]]) -> str:
    """The samples and batches of one epoch: a row per bucket, and the totals."""
    num_samples: Counter[tuple[int, int, int]] = Counter()
    num_batches: Counter[tuple[int, int, int]] = Counter()
    tokens = {}
    for batch in batches:
        bucket = batch[0].bucket
        num_samples[bucket] += len(batch)
        num_batches[bucket] += 1
        tokens[bucket] = batch[0].tokens
    rows = [
        ("x".join(map(str, bucket)), tokens[bucket], count, num_batches[bucket])
        for bucket, count in num_samples.most_common()
    ]
    table = format_table(("bucket", "tokens", "samples", "batches"), rows)
    total = f"{counted(num_samples.total(), 'sample')} in {counted(len(batches), 'batch', 'batches')}"
    return f"{table}\n\nan epoch has {total}"


def format_plan(plan: Plan, steps_per_epoch: int, steps: int) -> str:
    """One line: clips, buckets, steps per epoch, and steps and epochs of the whole run."""
    buckets = counted(len({batch[0].bucket for batch in plan.epoch(0)}), "bucket")
    return (
        f"{counted(len(plan.sources), 'clip')} in {buckets}, {counted(steps_per_epoch, 'step')} per epoch; "
        f"{counted(steps, 'step')} of training ({steps / steps_per_epoch:.1f} epochs)"
    )


@dataclass(frozen=True)
class _Place:
    """Where a file is: its path, and the part of a dataset that it was found in, if any."""

    path: Path
    folder: Path | None

    @property
    def below(self) -> Path:
        """The path from the part on; whole where it is elsewhere."""
        if self.folder and self.path.is_relative_to(self.folder):
            return self.path.relative_to(self.folder)
        return self.path


def _place(window: Window) -> _Place:
    return _Place(window.source.path, window.source.folder)


def _tell_apart(places: Iterable[_Place]) -> dict[Path, str]:
    """What each file is called: by its name, or where that repeats by its path, as much of it as tells them apart."""
    rest = {place.path: place for place in places}
    names: dict[Path, str] = {}
    for spelled in (_by_name, _below_folder, _with_folder):
        found = {path: spelled(place) for path, place in rest.items()}
        counts = Counter(found.values())
        names |= {path: name for path, name in found.items() if counts[name] == 1}
        rest = {path: place for path, place in rest.items() if path not in names}
    return names | {path: str(path) for path in rest}


def _by_name(place: _Place) -> str:
    return place.path.name


def _below_folder(place: _Place) -> str:
    return place.below.as_posix()


def _with_folder(place: _Place) -> str:
    return (place.folder.name / place.below).as_posix() if place.folder else str(place.path)


def _display_order(places: Iterable[_Place]) -> dict[_Place, tuple[object, ...]]:
    """A sort key of each file: folders in the order in which they come, and in each the natural order."""
    places = list(places)
    folders = {folder: number for number, folder in enumerate(dict.fromkeys(place.folder for place in places))}
    return {place: (folders[place.folder], natural_order(place.below)) for place in places}


def _clip_row(window: Window, name: str, model_fps: float, prefix: str) -> tuple[str | int, ...]:
    source, info = window.source, window.source.info
    caption, *others = source.captions
    short = _caption(caption)
    return (
        name,
        f"{info.width}x{info.height}",
        "image" if info.is_image else f"{info.fps or 0:.4g}",
        _frames(window),
        f"{window.width}x{window.height}",
        window.tokens,
        f"{short} (+{len(others)})" if others else short,
        prefix + (", ".join([*_name_remarks(name), *_remarks(window, model_fps)]) or "ok"),
    )


def _caption(text: str) -> str:
    return shorten(one_line(" ".join(text.split())), CAPTION_WIDTH)


def _frames(window: Window) -> str:
    """How many frames there are, and how many of them are used."""
    there, used = window.source.info.frames, window.frames
    return f"{there}" if there == used else f"{there} -> {used}"


def _name_remarks(name: str) -> list[str]:
    return [] if is_unicode(name) else ["its name is not UTF-8"]


def _remarks(window: Window, model_fps: float) -> list[str]:
    """What the user should know about a clip that can be used."""
    source, info = window.source, window.source.info
    remarks = [*info.notes, *_rate_remarks(source, model_fps), *(_length_remarks(window) if info.is_image else [])]
    paired = (other for other in (source.control, source.mask) if other and not other.info.is_image)
    common_frames = min((other.info.frames for other in paired), default=info.frames)
    if common_frames < info.frames:
        remarks.append(f"its control or mask ends after {common_frames} frames")
    if source.rules.max_duration and info.fps and info.frames - 1.5 > source.rules.max_duration * info.fps:
        remarks.append(f"used up to {source.rules.max_duration:g} s")
    if source.mask and source.mask.info.mask:
        remarks.append(_mask_remark(source.mask.info.mask))
    if source.first:
        remarks.append(f"begins with {source.first.path.name}")
    scale = max(window.width / info.width, window.height / info.height)
    if scale > 1:
        remarks.append(f"enlarged {scale:.2g}x")
    seen = seen_share(info.width, info.height, (window.width, window.height))
    if seen < NOTABLE_CROP:
        remarks.append(f"only {_percent(seen)} of the picture is seen")
    return remarks


def _length_remarks(window: Window) -> list[str]:
    """Where a video without pixels is shorter than it was meant to be: nothing else would say so."""
    meant = len(window.source.frame_indices)
    if window.frames == meant:
        return []
    needed = count_tokens(window.width, window.height, meant, window.grid)
    return [f"{meant} frames need --token_limit {needed}"]


def _rate_remarks(source: Source, model_fps: float) -> list[str]:
    """How fast a video plays, and where it has fewer frames than it should."""
    info, rate = source.info, source.rules.rate(model_fps)
    if info.is_image or not info.fps:
        return []
    shown = info.fps / (source.rules.frame_stride or 1)
    gap, speed = _uneven_gap(source), f"at {model_fps / shown:.2g}x its speed"
    if rate is not None:
        is_slow = info.fps < SLOWER_THAN * rate
        if gap:
            few = f"frames up to {gap:.2f} s apart, fewer than {rate:g} fps there"
            mean = f", on average {speed}" if is_slow else ""
            return [few + mean] if gap * SLOWER_THAN * rate > 1 else []
        return [f"below {rate:g} fps: all its frames are used, {speed}"] if is_slow else []
    remarks = []
    if abs(shown / model_fps - 1) > NOTABLE_SPEED:
        remedy = ", see --fps auto" if shown > model_fps and not gap else ""
        remarks.append(f"will play {speed}{remedy}")
    return [*remarks, f"uneven: frames up to {gap:.2f} s apart, see --fps auto"] if gap else remarks


def _uneven_gap(source: Source) -> float:
    """The longest time in seconds between two frames of the part that is used, if others are much shorter; else 0.

    They are compared with the lower quartile: where half of a video has few frames, its median is a long gap.
    """
    gaps = [after - before for before, after in pairwise(source.info.frame_times()[: source.frame_indices[-1] + 1])]
    if not gaps:
        return 0.0
    usual = sorted(gaps)[len(gaps) // 4]
    return max(gaps) if max(gaps) > NOTABLE_GAP * usual + ROUNDING else 0.0


def _mask_remark(mask: Coverage) -> str:
    """How much of the picture counts and by which rule; or that a mask has no effect, as all of it counts alike."""
    if mask.most - mask.least > EQUAL:
        rule = "" if mask.rule == BRIGHTNESS else f" ({MASK_RULES[mask.rule]})"
        return f"mask: {_percent(mask.share)} counts{rule}"
    value = round(255 * mask.share)
    partly = "" if value >= 255 - EQUAL else f" ({value} of 255)"
    return f"the whole picture counts alike{partly}, so the mask does nothing"


def _percent(share: float) -> str:
    """Rounded, but neither 0 nor 100 for what is not."""
    if 0 < share < 0.01:
        return "less than 1 %"
    return f"{min(round(100 * share), 99 if share < 1 else 100)} %"
