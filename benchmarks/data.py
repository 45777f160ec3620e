"""How fast clips become samples, against the least that it can take.

    python benchmarks/data.py --clips FOLDER        a folder of clips, one of them 1280x720

Three ratios: one window decoded, cut and resized, against decord and uint8 resizing alone on the same core; looking at
a dataset before a run; samples per second from a warm latent cache. A table for benchmarks/RECORDS.md goes to stdout.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from utils.encoding.latent_cache import LatentCache
from utils.encoding.samples import CachedSamples
from utils.encoding.text_cache import TextCache
from utils.media.probing import MediaInfo, is_image
from wan.configs import FAMILIES
from wan.modules.vae import WanVAE

WIDTH, HEIGHT, FRAMES = 832, 480, 25
GRID = FAMILIES["wan2.1-t2v-1.3B"].grid
TOKENS = (WIDTH // 16) * (HEIGHT // 16) * ((FRAMES - 1) // 4 + 1)
REPEATS = 7
CACHED_CLIPS, SAMPLES = 64, 400


@dataclass(frozen=True)
class Options:
    """Measure the way from clips to samples."""

    clips: Path | None = option(None, "folder with clips and captions, one of them 1280x720")


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    if opts.clips is None:
        raise UserError("--clips is missing: a folder with clips and captions, one of them 1280x720")
    rows = [*measure_window(opts.clips), measure_preflight(opts.clips), *measure_cache()]
    print(format_table(("what", "value", "unit", "limit"), rows))


def measure_window(clips: Path) -> list[tuple]:
    """One window of a 720p clip on one core, ours and the least there is, taking turns."""
    torch.set_num_threads(1)
    sources, _ = scan(Folder(clips, Rules()), 16.0)
    source = next((s for s in sources if (s.info.width, s.info.height) == (1280, 720) and not is_image(s.path)), None)
    if source is None:
        raise UserError(f"{clips} has no usable clip of 1280x720")
    window = Window(source, "", WIDTH, HEIGHT, tuple(range(FRAMES)), (0.5, 0.5), GRID)
    ours, least = taking_turns(lambda: load_clip(window), lambda: decord_and_resize(source.path))
    torch.set_num_threads(os.cpu_count() or 1)
    return [
        ("window, ours", round(1000 * ours, 1), "ms", ""),
        ("window, decord and uint8 resizing alone", round(1000 * least, 1), "ms", ""),
        ("window, ratio", round(ours / least, 3), "x", "1.10"),
    ]


def decord_and_resize(path: Path) -> torch.Tensor:
    """No cutting, no checks: the frames at their rate of decoding, made smaller as they are."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    frames = torch.from_numpy(reader.get_batch(range(FRAMES)).asnumpy()).permute(0, 3, 1, 2)
    interpolation = functional.InterpolationMode.BICUBIC
    return functional.resize(frames, [HEIGHT, WIDTH], interpolation, antialias=True)


def measure_preflight(clips: Path) -> tuple:
    """Everything before the table, by clip."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        sources, problems = scan(Folder(clips, Rules()), 16.0)
        times.append((time.perf_counter() - begun) / (len(sources) + len(problems)))
    return "preflight", round(median(times), 3), "s per clip", "0.3"


def measure_cache() -> list[tuple]:
    """Samples per second from cached latents of random content."""
    folder = Path(tempfile.mkdtemp(prefix="latents-"))
    try:
        limits = Limits(TOKENS, batch_size=4, grid=GRID)
        sources = [made_up_source(folder, number) for number in range(CACHED_CLIPS)]
        cache, texts = LatentCache(folder / "latents", "vae", None), TextCache(folder / "text", "encoder")
        cache.check_disk_space(0)
        texts.store(["a clip"], lambda captions: [torch.randn(100, 4096) for _ in captions])
        fixed = fixed_windows(sources, limits, 1)
        for window in flatten_windows(fixed):
            cache.store(window, {"latents": torch.randn(16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)})
        samples = CachedSamples(cache, texts.load, torch.device("cpu"), WanVAE)  # which nothing asks for
        plan = Plan(sources, limits, 0, fixed)
        return [
            (f"warm cache, {workers} workers", round(speed(samples, plan, workers)), "samples per second", "200")
            for workers in (0, 2)
        ]
    finally:
        shutil.rmtree(folder)


def made_up_source(folder: Path, number: int) -> Source:
    path = folder / f"{number}.mp4"
    path.write_bytes(number.to_bytes(4, "big"))
    info = MediaInfo(WIDTH, HEIGHT, FRAMES, 16.0)
    return Source(path, ("a clip",), info, range(FRAMES), folder, Rules())


def speed(samples: CachedSamples, plan: Plan, num_workers: int) -> float:
    stream = batches(plan, samples.load, num_workers=num_workers)
    for _ in range(CACHED_CLIPS // 4):  # the first epoch warms the cache of the disk
        samples.batch(next(stream))
    begun, count = time.perf_counter(), 0
    while count < SAMPLES:
        count += len(samples.batch(next(stream)).latents)
    stream.close()
    return count / (time.perf_counter() - begun)


def taking_turns(*sides: Callable[[], object]) -> list[float]:
    """The median seconds of each side."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(REPEATS + 1):
        for side, taken in zip(sides, times, strict=True):
            begun = time.perf_counter()
            side()
            taken.append(time.perf_counter() - begun)
    return [median(taken[1:]) for taken in times]


if __name__ == "__main__":
    sys.exit(run_script(main))
