"""How often one training step waits for the device. Each wait keeps the host from preparing what comes next."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.checks.step import Contestant
from benchmarks.measure import FAILED, Clock, Row, Sizes, skipped
from benchmarks.models import Inputs, our_trainee, random_inputs
from benchmarks.weights import random_vae
from wan.modules.model import WanShape

MARK = "called a synchronizing"  # how torch's warning begins
WARMUPS = 2
CAPTION = "a caption"


def check(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """The step that is timed here, then the training script's, on latents and from pixels."""
    if device.type != "cuda":
        yield skipped("synchronisations", "no GPU")
        return
    contestant = Contestant("ours", our_trainee(WanShape(**sizes.shape), sizes, device))
    inputs = random_inputs(sizes, sizes.video, device)
    yield count("the timed step", lambda: contestant.step(inputs), device, limit=0)
    with tempfile.TemporaryDirectory() as folder:
        from_latents, from_pixels = script_steps(sizes, contestant, inputs, Path(folder))
        yield count("train_wan_lora.py, latents given", from_latents, device, limit=0)
        yield count("train_wan_lora.py, from pixels", from_pixels, device, limit=0)


def script_steps(
    sizes: Sizes, contestant: Contestant, inputs: Inputs, folder: Path
) -> tuple[Callable[[], None], Callable[[], None]]:
    """One step as the training script takes it, with its own functions: from latents, and from pixels and a caption.

    The caption's embedding is cached under `folder`. Raises ModuleNotFoundError where a package of the script's lacks.
    """
    import train_wan_lora as script
    from utils.data.loading import Clip
    from utils.encoding.conditioning import Batch, Cond, make_predict
    from utils.encoding.samples import FreshSamples
    from utils.encoding.text_cache import TextCache

    device = inputs.text.device
    opts, predict = script.Options(), make_predict(contestant.trainee.model)
    text = inputs.text[:, : sizes.text_tokens]
    texts = TextCache(folder, "random")
    texts.store([CAPTION], lambda captions: [text[0].cpu()])
    pixels = torch.randint(0, 256, (3, *sizes.clip), dtype=torch.uint8)
    clip = Clip(pixels, CAPTION)
    if device.type == "cuda":
        clip = clip.pin_memory()  # as the trainer's loader hands it over
    batch, samples = Batch(inputs.noisy.clean, Cond(text)), FreshSamples(random_vae(sizes.vae_dim, device), texts.load)

    def train_on(batch: Batch) -> None:
        script.training_loss(batch, opts, contestant.trainee.model, predict, None).backward()
        contestant.updater.step(opts.max_grad_norm)

    return lambda: train_on(batch), lambda: train_on(samples.batch([clip]))


def count(name: str, step: Callable[[], None], device: torch.device, limit: int | None = None) -> Row:
    """How often torch reports that a step waited, once it is warm, and the place of the first time."""
    for _ in range(WARMUPS):
        step()
    places = synchronisations(step, device)
    first = f"; first at {places[0]}" if places else ""
    if limit is None:
        return Row(name, len(places), "per step", f"no limit{first}")
    return Row(name, len(places), "per step", f"limit {limit}{first}", "ok" if len(places) <= limit else FAILED)


def synchronisations(step: Callable[[], None], device: torch.device) -> list[str]:
    """The places (file:line) from which torch reports a wait; torch does not see every kind."""
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
