"""The dataset as a run sees it: everything about its files is told in one table, before a model is loaded."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from utils.common.digests import DIGESTS, LATENTS, Digests
from utils.common.errors import UserError
from utils.common.formatting import counted, format_table, readable_size
from utils.data.folders import Folder
from utils.data.plan import Limits, Plan, Window, fixed_windows, flatten_windows, full_length_windows
from utils.data.scan import Problem, Source, scan, split_folders
from utils.encoding.latent_cache import latent_bytes
from utils.media.frame_rate import SLOWER_THAN
from utils.media.probing import is_image

FAR_RATE = 0.1  # from the model's frame rate, as a share of it
CAPTION_SHOWN = 24
LONGEST_EMBEDDING = 512 * 4096 * 2  # bytes of a caption that fills all of UMT5-XXL, in bf16


@dataclass(frozen=True)
class Dataset:
    """The usable clips; `val` is empty where none are held out."""

    train: list[Source]
    val: list[Source]
    windows: list[Window]  # the most that is used of each training clip, at each resolution
    cache_folder: Path

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """For each training clip what makes its samples what they are, its content included."""
        digests = Digests(self.cache_folder / LATENTS / DIGESTS)
        facts: dict[str, list] = defaultdict(list)
        for source in tqdm(self.train, "looking for changes", unit="clip", delay=2, leave=False):
            files = [source.path, *(other.path for other in (source.control, source.mask) if other)]
            rules = replace(source.rules, control_folder=None, mask_folder=None)
            name = source.folder.resolve().name / source.path.relative_to(source.folder)
            facts[str(name)] += [[digests.of(file) for file in files], source.captions, list(source.shown), rules]
        digests.save()
        return {name: hashlib.sha256(repr(fact).encode()).hexdigest()[:16] for name, fact in facts.items()}

    @property
    def captions(self) -> list[str]:
        """Every text that a sample may come with."""
        texts = [caption for source in (*self.train, *self.val) for caption in source.captions]
        dropped = any(source.rules.caption_dropout for source in self.train)
        return [*texts, ""] if dropped else texts


def open_dataset(
    folders: Sequence[Folder],
    limits: Limits,
    model_fps: float,
    cache_folder: Path | None = None,
    skip_bad_files: bool = False,
) -> Dataset:
    """Finds the clips of the folders and prints a table of them. Caches are kept in the first folder, if nowhere else.

    Raises UserError that lists every file that cannot be used and why, unless they are to be skipped; then they are
    printed. Raises it too where nothing is left, or a resolution or token limit makes no sense.
    """
    train: list[Source] = []
    val: list[Source] = []
    problems: list[Problem] = []
    for folder in folders:
        train_path, held_out = split_folders(folder.path)
        for path, exclude, part in ((train_path, held_out, train), *((path, [], val) for path in held_out[:1])):
            sources, flawed = scan(Folder(path, folder.rules), model_fps, exclude, folder.path)
            part += sources
            problems += flawed
    problems = list(dict.fromkeys(problems))
    windows, held_out = full_length_windows(train, limits), full_length_windows(val, limits)
    if train:
        print(format_clips(windows, held_out, problems, model_fps))
        print(f"\n{format_buckets(Plan(train, limits, seed=0).epoch(0))}")
        if not val:
            print("\nno clips are held out in val/: validation is on training clips, which says less")
    if problems:
        _tell(problems, skip_bad_files)
    if not train:
        raise UserError(f"no usable clip is left in {' '.join(str(folder.path) for folder in folders)}")
    return Dataset(train, val, windows, cache_folder or folders[0].path / ".wan_cache")


def format_clips(
    windows: Sequence[Window], held_out: Sequence[Window], problems: Sequence[Problem], model_fps: float
) -> str:
    """What each clip has, what of it a sample uses at most, and what there is to say about it."""
    rows = []
    for window in (*windows, *held_out):
        info, caption = window.source.info, window.source.captions[0]
        shown = caption if len(caption) <= CAPTION_SHOWN else f"{caption[: CAPTION_SHOWN - 3]}..."
        rows.append(
            (
                window.source.path.name,
                f"{info.width}x{info.height}",
                "image" if info.fps is None else f"{info.fps:.4g}",
                f"{info.frames}" if info.frames == window.frames else f"{info.frames} -> {window.frames}",
                f"{window.width}x{window.height}",
                window.tokens,
                shown if len(window.source.captions) == 1 else f"{shown} (+{len(window.source.captions) - 1})",
                _status(window, model_fps),
            )
        )
    rows[len(windows) :] = [(*row[:-1], f"held out, {row[-1]}") for row in rows[len(windows) :]]
    rows += [(path.name, "", "", "", "", 0, "", "cannot be used, see below") for path in _bad(problems)]
    return format_table(("file", "size", "fps", "frames", "bucket", "tokens", "caption", "status"), rows)


def format_buckets(batches: Sequence[Sequence[Window]]) -> str:
    """How many samples of an epoch each bucket gets, in how many batches, and all together."""
    samples, parts, tokens = Counter(), Counter(), {}
    for batch in batches:
        bucket = batch[0].bucket
        samples[bucket] += len(batch)
        parts[bucket] += 1
        tokens[bucket] = batch[0].tokens
    rows = [
        ("x".join(map(str, bucket)), tokens[bucket], count, parts[bucket]) for bucket, count in samples.most_common()
    ]
    table = format_table(("bucket", "tokens", "samples", "batches"), rows)
    total = f"{counted(samples.total(), 'sample')} in {counted(len(batches), 'batch', 'batches')}"
    return f"{table}\n\nan epoch has {total}"


def format_cache_size(data: Dataset, limits: Limits, channels: int) -> str:
    """What the caches take: latents of so many channels, with all that is made for a control, and texts."""
    windows = flatten_windows(fixed_windows(data.train, limits, 1))
    latents, texts = readable_size(latent_bytes(windows, channels)), len(set(data.captions))
    longest = readable_size(LONGEST_EMBEDDING)
    return f"on disk: --cache_latents N takes N times {latents}, each of {counted(texts, 'text')} at most {longest}"


def format_plan(plan: Plan, steps_per_epoch: int, steps: int) -> str:
    """How many clips, how often."""
    buckets = counted(len({batch[0].bucket for batch in plan.epoch(0)}), "bucket")
    return (
        f"{counted(len(plan.sources), 'clip')} in {buckets}, {counted(steps_per_epoch, 'step')} per epoch; "
        f"{counted(steps, 'step')} of training ({steps / steps_per_epoch:.1f} epochs)"
    )


def _status(window: Window, model_fps: float) -> str:
    source, info = window.source, window.source.info
    notes = []
    if not is_image(source.path) and info.fps:
        rate = source.rules.rate(model_fps)
        if rate is None and abs(info.fps / model_fps - 1) > FAR_RATE:
            remedy = ", see --fps auto" if info.fps > model_fps else ""
            notes.append(f"will play at {model_fps / info.fps:.2g}x its speed{remedy}")
        elif rate is not None and info.fps < SLOWER_THAN * rate:
            notes.append(f"slower than {rate:g} fps: used as it is")
    companions = (other for other in (source.control, source.mask) if other and not is_image(other.path))
    ends = min((other.info.frames for other in companions), default=info.frames)
    if ends < info.frames:
        notes.append(f"its control or mask ends after {ends} frames")
    scale = max(window.width / info.width, window.height / info.height)
    if scale > 1:
        notes.append(f"enlarged {scale:.2g}x")
    return ", ".join(notes) or "ok"


def _bad(problems: Sequence[Problem]) -> list:
    return list(dict.fromkeys(problem.path for problem in problems))


def _tell(problems: Sequence[Problem], skip_bad_files: bool) -> None:
    bad = counted(len(_bad(problems)), "file")
    listed = "\n".join(f"  {problem.path}: {problem.reason}" for problem in problems)
    if not skip_bad_files:
        raise UserError(f"{bad} cannot be used:\n{listed}\nmend what is wrong, or pass --skip_bad_files")
    print(f"going on without {bad}:\n{listed}")
