"""How the weights of the VAE's encoder lie in memory: the faster of two layouts, measured on the GPU of the run.

Convolutions return what they compute in the layout of their weights, and most of what is between them keeps it. Which
one cuDNN is faster with depends on the GPU, the dtype and the size of the frames.
"""

import statistics
import time
from itertools import chain

import torch
from torch import Tensor

from utils.common.console import say
from wan.modules.vae import WanVAE

PLAIN, CHANNELS_LAST = "contiguous", "channels_last"
FORMATS = {
    PLAIN: {4: torch.contiguous_format, 5: torch.contiguous_format},
    CHANNELS_LAST: {4: torch.channels_last, 5: torch.channels_last_3d},  # by the number of axes
}
WARMUPS, REPEATS = 1, 4
WORTH = 0.9  # of the time of the plain layout: what is hardly faster changes nothing
MOST_ERROR = 0.02  # relative, of the latents, to those of the plain layout


def use_layout(vae: WanVAE, name: str) -> None:
    """Lays out the weights of the encoder as one of FORMATS."""
    for parameter in chain(vae.encoder.parameters(), vae.conv1.parameters()):
        if parameter.dim() in FORMATS[name]:
            parameter.data = parameter.data.contiguous(memory_format=FORMATS[name][parameter.dim()])


def faster_layout(vae: WanVAE, size: tuple[int, int, int]) -> str:
    """The one of FORMATS in which clips of this size (width, height, frames) are encoded faster. Says the times.

    The plain one where the other one does not run, or returns other latents, or where memory is too little to try. The
    encoder has either layout then.
    """
    try:
        return _choose(vae, size)
    except RuntimeError as error:  # of memory, too, and of a layout that cuDNN has no kernel for
        reason = str(error).splitlines()[0]
    if vae.device.type == "cuda":
        torch.cuda.synchronize(vae.device)  # raises again what no kernel survives
        torch.cuda.empty_cache()
    return _stay(reason)


def _choose(vae: WanVAE, size: tuple[int, int, int]) -> str:
    width, height, frames = size
    # The first frame, which is encoded alone, and two chunks of the others, as of a longer clip.
    frames = min(frames, 1 + 2 * vae.stride[0] * vae.latent_frames_at_once(width * height))
    drawn = torch.randn(1, 3, frames, height, width, generator=torch.Generator().manual_seed(0))
    video = drawn.clamp(-1, 1).to(vae.device, vae.dtype)
    latents: dict[str, Tensor] = {}
    times: dict[str, list[float]] = {name: [] for name in FORMATS}
    for _ in range(WARMUPS + REPEATS):
        for name, taken in times.items():  # in turns: a GPU becomes faster while it warms up, and then slower
            use_layout(vae, name)
            started = _now(vae.device)
            latents[name] = vae.encode(video)
            taken.append(_now(vae.device) - started)
    error = (latents[CHANNELS_LAST].float() - latents[PLAIN].float()).norm() / latents[PLAIN].float().norm()
    if not error <= MOST_ERROR:
        return _stay(f"in the other one latents differ by {error:.1e}")
    seconds = {name: statistics.median(taken[WARMUPS:]) for name, taken in times.items()}
    chosen = CHANNELS_LAST if seconds[CHANNELS_LAST] < WORTH * seconds[PLAIN] else PLAIN
    listed = ", ".join(f"{name} {1e3 * each:.0f} ms" for name, each in seconds.items())
    say(f"layout of the VAE: {chosen}; {frames} frames of {width}x{height} take {listed}")
    return chosen


def _stay(reason: str) -> str:
    say(f"layout of the VAE: {PLAIN}; {reason}")
    return PLAIN


def _now(device: torch.device) -> float:
    """The time at which the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
