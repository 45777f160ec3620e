"""The speed at which clips become samples.

    python benchmarks/data.py --clips FOLDER        a folder of clips, one of them 1280x720

Measures the decoding, cropping and resizing of one window, compared with decord and uint8 resizing alone on the same
core; the check of a dataset before a run; and samples per second from a warm latent cache. Prints a table for
benchmarks/RECORDS.md.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median

import torch
from torchvision.transforms.v2 import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.common.errors import UserError
from utils.common.formatting import format_table
from utils.common.options import option, parse_options, run_script
from utils.data.folders import Folder, Rules
from utils.data.loading import batches, load_clip
from utils.data.plan import Limits, Plan, Window, fixed_windows, flatten_windows
from utils.data.scan import Source, scan
from utils.encoding.conditioning import Encoders
from utils.encoding.latent_cache import LatentCache, Layout
from utils.encoding.samples import CachedSamples
from utils.encoding.text_cache import TextCache
from utils.media.description import MediaInfo
from utils.media.inspection import Inspector, count_processors
from utils.media.probing import is_image, is_video
from utils.media.video import open_video
from wan.configs import FAMILIES

WIDTH, HEIGHT, FRAMES = 832, 480, 25
GRID = FAMILIES["wan2.1-t2v-1.3B"].grid
TOKENS = (WIDTH // 16) * (HEIGHT // 16) * ((FRAMES - 1) // 4 + 1)
REPEATS, CHECKS = 7, 5
CACHED_CLIPS, SAMPLES = 64, 400
TableRow = tuple[str, float, str, str]  # what, value, unit, limit


@dataclass(frozen=True)
class Options:
    """Measure the speed at which clips become samples."""

    clips: Path | None = option(None, "folder with clips and captions, one of them 1280x720")


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    if opts.clips is None:
        raise UserError("--clips is missing: a folder with clips and captions, one of them 1280x720")
    rows = [*measure_window(opts.clips), *measure_check(opts.clips), *measure_cache()]
    print(format_table(("what", "value", "unit", "limit"), rows))


def measure_window(clips: Path) -> list[TableRow]:
    """One window of a 720p clip on one core: our loader and the minimum, in turns. Raises UserError without a clip."""
    torch.set_num_threads(1)
    sources, _ = scan(Folder(clips, Rules()), 16.0)
    source = next((s for s in sources if (s.info.width, s.info.height) == (1280, 720) and not s.info.is_image), None)
    if source is None:
        raise UserError(f"{clips} has no usable clip of 1280x720")
    window = Window(source, "", WIDTH, HEIGHT, tuple(range(FRAMES)), (0.5, 0.5), GRID)
    ours, least = median_seconds_in_turns(lambda: load_clip(window), lambda: decord_and_resize(source.path))
    torch.set_num_threads(os.cpu_count() or 1)
    return [
        ("window, ours", round(1000 * ours, 1), "ms", ""),
        ("window, decord and uint8 resizing alone", round(1000 * least, 1), "ms", ""),
        ("window, ratio", round(ours / least, 3), "x", "1.10"),
    ]


def decord_and_resize(path: Path) -> torch.Tensor:
    """The minimum: decodes the first frames and resizes them, without cropping or checks."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    frames = torch.from_numpy(reader.get_batch(range(FRAMES)).asnumpy()).permute(0, 3, 1, 2)
    interpolation = functional.InterpolationMode.BICUBIC
    return functional.resize(frames, [HEIGHT, WIDTH], interpolation, antialias=True)


def measure_check(clips: Path) -> list[TableRow]:
    """The check of a dataset before a run: the first one, compared with decoding the videos alone, and later ones."""
    paths = sorted(path for path in clips.rglob("*") if is_image(path) or is_video(path))
    videos, folder = [path for path in paths if is_video(path)], Folder(clips, Rules())
    cold, least, warm, fast = [], [], [], []
    for _ in range(CHECKS):
        with tempfile.TemporaryDirectory() as cache:
            least.append(seconds(partial(decode_alone, videos)))
            cold.append(seconds(partial(Inspector(Path(cache)).inspect, paths)))
            warm.append(seconds(partial(scan, folder, 16.0, inspector=Inspector(Path(cache)))))
        fast.append(seconds(partial(scan, folder, 16.0, inspector=Inspector(full=False))))
    ratio, count = median(cold) / median(least), len(paths)
    return [
        ("check, the first", round(median(cold), 2), "s", ""),
        ("decoding the same videos alone", round(median(least), 2), "s", ""),
        ("check, ratio", round(ratio, 2), "x", "1.3"),
        ("check, later", round(median(warm) / count, 4), "s per clip", "0.3"),
        ("check, fast", round(median(fast) / count, 3), "s per clip", "0.3"),
    ]


def decode_alone(videos: Sequence[Path]) -> None:
    """Decodes videos with all processors, in one process: with as many threads as there are files for, or more."""
    cores = count_processors()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(partial(decode, threads=max(1, cores // len(videos))), videos))


def decode(path: Path, threads: int) -> None:
    with open_video(path, threads) as video:
        for packet in chain(video.packets(), (None,)):
            video.decode(packet)


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure_cache() -> list[TableRow]:
    """Samples per second from a cache of random latents."""
    folder = Path(tempfile.mkdtemp(prefix="latents-"))
    try:
        limits = Limits(TOKENS, batch_size=4, grid=GRID)
        sources = [made_up_source(folder, number) for number in range(CACHED_CLIPS)]
        cache, texts = LatentCache(folder / "latents", "vae", Layout()), TextCache(folder / "text", "encoder")
        cache.check_disk_space(0)
        texts.store(["a clip"], lambda captions: [torch.randn(100, 4096) for _ in captions])
        fixed = fixed_windows(sources, limits, 1)
        for window in flatten_windows(fixed):
            cache.store(window, {"latents": torch.randn(16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)})
        samples = CachedSamples(cache, texts.load, torch.device("cpu"), no_encoders)
        plan = Plan(sources, limits, 0, fixed)
        return [
            (f"warm cache, {workers} workers", round(speed(samples, plan, workers)), "samples per second", "200")
            for workers in (0, 2)
        ]
    finally:
        shutil.rmtree(folder)


def made_up_source(folder: Path, number: int) -> Source:
    """A source with a small file of its own, so that its latents have their own cache entry."""
    path = folder / f"{number}.mp4"
    path.write_bytes(number.to_bytes(4, "big"))
    info = MediaInfo(WIDTH, HEIGHT, FRAMES, 16.0)
    return Source(path, ("a clip",), info, range(FRAMES), folder, Rules())


def no_encoders() -> Encoders:
    """A warm cache needs none."""
    raise AssertionError("the encoders were loaded")


def speed(samples: CachedSamples, plan: Plan, num_workers: int) -> float:
    """Samples per second, in batches of the plan, after one epoch."""
    stream = batches(plan, samples.load, num_workers=num_workers)
    for _ in range(CACHED_CLIPS // 4):  # the first epoch warms the disk cache
        samples.batch(next(stream))
    started, count = time.perf_counter(), 0
    while count < SAMPLES:
        count += len(samples.batch(next(stream)).latents)
    stream.close()
    return count / (time.perf_counter() - started)


def median_seconds_in_turns(*actions: Callable[[], object]) -> list[float]:
    """The median duration of each action; they take turns. The first round is a warm-up."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(REPEATS + 1):
        for action, taken in zip(actions, times, strict=True):
            started = time.perf_counter()
            action()
            taken.append(time.perf_counter() - started)
    return [median(taken[1:]) for taken in times]


if __name__ == "__main__":
    sys.exit(run_script(main))
