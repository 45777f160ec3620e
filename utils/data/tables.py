"""What a run prints about its dataset before a model is loaded: clips, buckets, problems, and the plan."""

from collections import Counter
from collections.abc import Sequence

from utils.common.formatting import counted, format_table
from utils.data.plan import Plan, Window
from utils.data.scan import Problem
from utils.media.frame_rate import SLOWER_THAN

CAPTION_WIDTH = 24  # characters of the caption column
NOTABLE_SPEED = 0.1  # a clip's playing speed is noted if it is off by more than this share


def format_clips(
    windows: Sequence[Window], held_out: Sequence[Window], problems: Sequence[Problem], model_fps: float
) -> str:
    """One row per clip and resolution: the file's properties, the largest window a sample takes of it, and remarks."""
    rows = [_clip_row(window, model_fps) for window in windows]
    rows += [_clip_row(window, model_fps, "held out, ") for window in held_out]
    bad_files = dict.fromkeys(problem.path for problem in problems)
    rows += [(path.name, "", "", "", "", 0, "", "cannot be used, see below") for path in bad_files]
    return format_table(("file", "size", "fps", "frames", "bucket", "tokens", "caption", "status"), rows)


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


def _clip_row(window: Window, model_fps: float, prefix: str = "") -> tuple[str | int, ...]:
    source, info = window.source, window.source.info
    caption, *others = source.captions
    short = caption if len(caption) <= CAPTION_WIDTH else f"{caption[: CAPTION_WIDTH - 3]}..."
    return (
        source.path.name,
        f"{info.width}x{info.height}",
        "image" if info.is_image else f"{info.fps or 0:.4g}",
        f"{info.frames}" if info.frames == window.frames else f"{info.frames} -> {window.frames}",
        f"{window.width}x{window.height}",
        window.tokens,
        f"{short} (+{len(others)})" if others else short,
        prefix + (", ".join(_remarks(window, model_fps)) or "ok"),
    )


def _remarks(window: Window, model_fps: float) -> list[str]:
    """What the user should know about a clip that can be used."""
    source, info = window.source, window.source.info
    remarks = list(info.notes)
    if not info.is_image and info.fps:
        rate = source.rules.rate(model_fps)
        if rate is None and abs(info.fps / model_fps - 1) > NOTABLE_SPEED:
            remedy = ", see --fps auto" if info.fps > model_fps else ""
            remarks.append(f"will play at {model_fps / info.fps:.2g}x its speed{remedy}")
        elif rate is not None and info.fps < SLOWER_THAN * rate:
            remarks.append(f"below {rate:g} fps: all its frames are used")
    paired = (other for other in (source.control, source.mask) if other and not other.info.is_image)
    common_frames = min((other.info.frames for other in paired), default=info.frames)
    if common_frames < info.frames:
        remarks.append(f"its control or mask ends after {common_frames} frames")
    if source.rules.max_duration and info.fps and info.frames - 1.5 > source.rules.max_duration * info.fps:
        remarks.append(f"used up to {source.rules.max_duration:g} s")
    if source.first:
        remarks.append(f"begins with {source.first.path.name}")
    scale = max(window.width / info.width, window.height / info.height)
    if scale > 1:
        remarks.append(f"enlarged {scale:.2g}x")
    return remarks
