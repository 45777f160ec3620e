"""How often a training step waits for the device. During a wait the host cannot prepare the next operations.

And what a step from pixels takes in a row of steps, where nothing waits, with and without encoding beside the step.
"""

import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.contest import Contestant
from benchmarks.measure import FAILED, Clock, Row, Sizes, seconds, skipped
from benchmarks.models import Inputs, Trainee, our_trainee, random_inputs
from benchmarks.weights import random_vae
from utils.encoding.side_stream import SideStream
from utils.training.optim import Updater
from wan.modules.model import WanModel

MARK = "called a synchronizing"  # part of torch's warning
WARMUPS, IN_A_ROW = 2, 8
CAPTION = "a caption"


def check(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """The step of the check `step`, then the training script's step, on given latents and from pixels."""
    if device.type != "cuda":
        yield skipped("synchronisations", "no GPU")
        return
    trainee = our_trainee(sizes.shape, sizes, device)
    contestant, inputs = Contestant("ours", trainee), random_inputs(sizes, sizes.video, device)
    yield count("the timed step", lambda: contestant.step(inputs), device, limit=0)
    with tempfile.TemporaryDirectory() as folder:
        from_latents, *others = script_steps(sizes, trainee, contestant.updater, inputs, Path(folder))
        yield count("train_wan_lora.py, latents given", from_latents, device, limit=0)
        for name, step in zip(("from pixels", "from pixels, encoded beside the step"), others, strict=True):
            yield count(f"train_wan_lora.py, {name}", step, device, limit=0)
            yield Row(f"a step {name}", in_a_row(step, device), "s", f"mean of {IN_A_ROW} steps in a row")


def in_a_row(step: Callable[[], None], device: torch.device) -> float:
    """The mean seconds of a step where several follow each other, and the host waits for the last one alone."""

    def take_all() -> None:
        for _ in range(IN_A_ROW):
            step()

    return seconds(take_all, device) / IN_A_ROW


def script_steps(
    sizes: Sizes, trainee: Trainee[WanModel], updater: Updater, inputs: Inputs, folder: Path
) -> list[Callable[[], None]]:
    """The training script's step, made of its own functions: from latents, and from pixels and a caption.

    On a GPU also from pixels that are encoded beside the step. The embedding of the caption is cached in `folder`.
    Raises ModuleNotFoundError if a package that the script needs is not installed.
    """
    import train_wan_lora as script
    from utils.data.loading import Clip
    from utils.encoding.conditioning import Batch, Cond, Encoders
    from utils.encoding.samples import FreshSamples
    from utils.encoding.text_cache import TextCache
    from wan.configs import FAMILIES

    device = inputs.text.device
    opts, model = script.Options(), trainee.model
    loss = partial(script.training_loss, opts=opts, sigmas=(0.0, 1.0), model=model, negative=None)
    text = inputs.text[:, : sizes.text_tokens]
    texts = TextCache(folder, "random")
    texts.store([CAPTION], lambda captions: [text[0].cpu()])
    pixels = torch.randint(0, 256, (3, *sizes.clip), dtype=torch.uint8)
    clip = Clip(pixels, CAPTION)
    if device.type == "cuda":
        clip = clip.pin_memory()  # like the clips that the trainer's loader returns
    encoders = Encoders(FAMILIES["wan2.1-t2v-1.3B"], random_vae(sizes.vae_dim, device))
    batch, samples = Batch(inputs.noisy.clean, Cond(text)), FreshSamples(encoders, texts.load)

    def train_on(batch: Batch) -> None:
        loss(batch).value.backward()
        updater.step(opts.max_grad_norm)

    steps = [lambda: train_on(batch), lambda: train_on(samples.batch([clip]))]
    if device.type == "cuda":
        encoded = SideStream(device).encoded(([clip] for _ in itertools.count()), samples.batch)
        steps.append(lambda: train_on(next(encoded)))
    return steps


def count(name: str, step: Callable[[], None], device: torch.device, limit: int | None = None) -> Row:
    """How often torch reports that a step waits after its warm-up, and where it waits first."""
    for _ in range(WARMUPS):
        step()
    places = synchronisations(step, device)
    first = f"; first at {places[0]}" if places else ""
    if limit is None:
        return Row(name, len(places), "per step", f"no limit{first}")
    return Row(name, len(places), "per step", f"limit {limit}{first}", "ok" if len(places) <= limit else FAILED)


def synchronisations(step: Callable[[], None], device: torch.device) -> list[str]:
    """The places (file:line) where torch reports that a step waits. torch does not detect every kind of wait."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if MARK in str(w.message)]
