"""How the weights of the VAE's encoder lie in memory: the faster of two layouts, measured on the GPU of the run.

Convolutions return what they compute in the layout of their weights, and the layers between them keep it. Which one
cuDNN is faster with depends on the GPU, the dtype and the size of the frames.
"""

import statistics
import time
from itertools import chain

import torch
from torch import nn

from utils.common.console import say
from wan.modules.vae import WanVAE

PLAIN, CHANNELS_LAST = "contiguous", "channels_last"
FORMATS = {
    PLAIN: {4: torch.contiguous_format, 5: torch.contiguous_format},
    CHANNELS_LAST: {4: torch.channels_last, 5: torch.channels_last_3d},  # by the number of axes
}
WARMUPS, REPEATS = 1, 3
WORTH = 0.97  # of the time of the plain layout: what is hardly faster changes nothing


def use_layout(vae: WanVAE, name: str) -> None:
    """Lays out the weights of the encoder as one of FORMATS."""
    layers: chain[nn.Parameter] = chain(vae.encoder.parameters(), vae.conv1.parameters())
    for parameter in layers:
        if parameter.dim() in FORMATS[name]:
            parameter.data = parameter.data.contiguous(memory_format=FORMATS[name][parameter.dim()])


def faster_layout(vae: WanVAE, width: int, height: int) -> str:
    """The one of FORMATS in which frames of this size are encoded faster. Says the times; the encoder has either then.

    The plain one where the other one does not run, or where memory is too little to try.
    """
    try:
        times = {name: _measure(vae, name, width, height) for name in FORMATS}
    except RuntimeError as error:  # of memory, too, and of a layout that cuDNN has no kernel for
        say(f"the VAE's layout stays {PLAIN}: {str(error).splitlines()[0]}")
        return PLAIN
    chosen = CHANNELS_LAST if times[CHANNELS_LAST] < WORTH * times[PLAIN] else PLAIN
    listed = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in times.items())
    say(f"layout of the VAE: {chosen}; {_frames(vae)} frames of {width}x{height} take {listed}")
    return chosen


def _measure(vae: WanVAE, name: str, width: int, height: int) -> float:
    """The median seconds in which a short video is encoded."""
    use_layout(vae, name)
    video = torch.zeros(1, 3, _frames(vae), height, width, dtype=vae.dtype, device=vae.device)
    durations = []
    for _ in range(WARMUPS + REPEATS):
        _wait(vae.device)
        started = time.perf_counter()
        with torch.no_grad():
            vae.encode(video)
        _wait(vae.device)
        durations.append(time.perf_counter() - started)
    return statistics.median(durations[WARMUPS:])


def _frames(vae: WanVAE) -> int:
    """The first frame, which is encoded alone, and two chunks of the others, as of a longer video."""
    return 1 + 2 * vae.stride[0]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
