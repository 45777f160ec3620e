"""Which setting a run has so that it fits into a GPU: the options, and the forecast that they are chosen by."""

import math
from dataclasses import dataclass, replace
from functools import cache

import psutil
import torch
from torch import nn

from utils.common.errors import UserError
from utils.common.formatting import readable_size
from utils.common.options import option
from utils.training.cards import CARDS, Card, card_like, find_card
from utils.training.choice import Limits
from utils.training.counting import Counts, count_forward, peak_bytes
from utils.training.forecast import CONTEXT
from wan.configs import Family
from wan.modules.clip import VisionEncoder, VisionShape
from wan.modules.vae import WanVAE
from wan.modules.vae2_2 import Wan22VAE

MARGIN = 0.05  # of a GPU's memory: lost between tensors of different sizes, and to the screen
HOST_MARGIN = 0.25  # of what is free of main memory, which other programs use too
ASSUMED_HOST = 64e9  # bytes of main memory that are free beside a GPU of another machine
GIB = 1 << 30
PRESETS = {"8gb": 8, "12gb": 12, "16gb": 16, "24gb": 24, "48gb": 48}


@dataclass(frozen=True)
class PlanOptions:
    """plan"""

    vram: str = option(
        "auto",
        "GiB of GPU memory that the run may use; auto: what is free. Chooses --weight_dtype, --blocks_to_swap and "
        "--idle_expert, where they are not given, so that the largest batch fits; off: chooses nothing",
        affects_training=False,
    )
    preset: str | None = option(
        None, "as --vram, by the size of a card", choices=tuple(PRESETS), affects_training=False
    )
    oom: str = option(
        "stop",
        "where GPU memory is full, stop and say which options would fit, or retry with them",
        choices=("stop", "retry"),
        affects_training=False,
    )
    plan: bool = option(
        False, "say what would fit into the GPU and how long a step would take, by forecast, and stop",
        affects_training=False,
    )  # fmt: skip
    benchmark: bool = option(
        False, "train ten steps on the largest batch, print a table of time and memory, and stop",
        affects_training=False,
    )  # fmt: skip
    gpu: str | None = option(
        None, "GPU to plan for (default: that of this machine)", choices=tuple(CARDS), requires="plan",
        affects_training=False,
    )  # fmt: skip

    def plans_for(self, device: torch.device) -> bool:
        """Whether a run on this device is to have a setting that fits. On the CPU it has the defaults."""
        return device.type == "cuda" and (self.preset is not None or self.vram != "off")

    @property
    def cap(self) -> float | None:
        """The bytes of GPU memory to use; None: no fewer than there are."""
        if self.preset is not None:
            return PRESETS[self.preset] * GIB
        return None if self.vram in ("auto", "off") else float(self.vram) * GIB

    def check_plan(self) -> None:
        """Raises UserError for a --vram that is none, and for options that contradict each other."""
        if self.vram not in ("auto", "off"):
            try:
                enough = 1 <= float(self.vram) < math.inf
            except ValueError:
                enough = False
            if not enough:
                raise UserError(f"--vram must be auto, off, or at least 1 GiB, not {self.vram!r}")
        if self.preset is not None and self.vram != "auto":
            raise UserError("--vram and --preset say the same: give one of them")
        if self.plan and self.benchmark:
            raise UserError("--plan and --benchmark both end the run: give one of them")
        if self.vram == "off" and (self.plan or self.oom == "retry"):
            option = "--plan" if self.plan else "--oom retry"
            raise UserError(f"{option} chooses a setting, and --vram off chooses none: give one of them")

    def limit_memory(self, device: torch.device) -> None:
        """Keeps the process within --vram. Raises UserError where there is no GPU with so much memory."""
        if self.cap is None:
            return
        if device.type != "cuda":
            raise UserError(f"{self._given} needs a GPU, and there is none; --plan --gpu 3060 {self._given} forecasts")
        total = torch.cuda.get_device_properties(device).total_memory
        self.check_cap(total)
        # The CUDA context is not in what the allocator counts.
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, self.cap - CONTEXT) / total))

    def check_cap(self, total: float) -> None:
        """Raises UserError where --vram is more than a GPU has. Cards have a little less than their names say."""
        if self.cap is not None and self.cap > total * (1 + MARGIN):
            raise UserError(f"{self._given}: the GPU has {total / GIB:.1f} GiB")

    @property
    def _given(self) -> str:
        return f"--vram {self.vram}" if self.preset is None else f"--preset {self.preset}"


@dataclass(frozen=True)
class Budget:
    """A GPU, and the memory of it and of its machine that a training step may take."""

    card: Card
    limits: Limits
    is_here: bool  # whether it is that of this machine
    encoders: float = 0.0  # bytes that encoders take during a step, beside the limits


@dataclass(frozen=True)
class OnGpu:
    """What the encoders do while the transformer is on the GPU: the sizes (width, height, frames), None for nothing."""

    encoded: tuple[int, int, int] | None  # the largest sample, where latents are not cached
    decoded: tuple[int, int, int] | None  # previews
    vae_dtype: torch.dtype = torch.float32
    overlaps: bool = False  # whether samples are encoded while a step computes
    videos: int = 1  # of its size that a sample is made of, as pixels

    @property
    def is_nothing(self) -> bool:
        return self.encoded is None and self.decoded is None


def budget(opts: PlanOptions, family: Family, on_gpu: OnGpu) -> Budget:
    """That of `--gpu`, or of this machine.

    Raises UserError where this machine has no GPU, and for one that has too little memory left for the encoders.
    """
    encoders = 0.0 if on_gpu.is_nothing else encoder_bytes(family, on_gpu.vae_dtype)
    if on_gpu.overlaps:
        encoders += encoding_bytes(family, replace(on_gpu, decoded=None))
        on_gpu = replace(on_gpu, encoded=None)
    card, others = (CARDS[opts.gpu], 0.0) if opts.gpu else (this_card(), taken_by_others())
    opts.check_cap(card.memory)
    memory = card.memory - others
    usable = (1 - MARGIN) * (memory if opts.cap is None else min(memory, opts.cap)) - encoders
    if usable <= 0:
        raise UserError(f"{readable_size(int(usable + encoders))} of GPU memory are too little for the encoders alone")
    host = ASSUMED_HOST if opts.gpu else psutil.virtual_memory().available * (1 - HOST_MARGIN)
    return Budget(card, Limits(usable, host, encoding_bytes(family, on_gpu)), not opts.gpu, encoders)


def this_card() -> Card:
    """The GPU of this machine; one that is not known has the rates of the known one with the most similar memory.

    Raises UserError where there is none.
    """
    if not torch.cuda.is_available():
        raise UserError(f"--plan: this machine has no GPU; name one: --gpu {', '.join(CARDS)}")
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory
    # Some cards come with different memory under one name.
    return replace(find_card(name) or card_like(name, memory), memory=memory)


def taken_by_others() -> float:
    """The bytes of the GPU's memory that other programs have taken, such as a desktop."""
    free, total = torch.cuda.mem_get_info()
    return max(0.0, total - free - CONTEXT)


def encoder_bytes(family: Family, vae_dtype: torch.dtype) -> int:
    """What the VAE of a family takes, and its vision encoder in fp32."""
    with torch.device("meta"):
        modules: list[nn.Module] = [_empty_vae(family, vae_dtype)]
        if family.clip:
            modules.append(VisionEncoder(VisionShape()))
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


@cache
def encoding_bytes(family: Family, on_gpu: OnGpu) -> float:
    """The activations at the peak of the VAE, counted on the real code; the workspace of convolutions is not seen."""
    peaks = [0.0]
    if on_gpu.encoded is not None:
        width, height, frames = on_gpu.encoded
        cast = 0 if on_gpu.vae_dtype == torch.float32 else on_gpu.vae_dtype.itemsize  # of the one that is encoded
        video = 3 * frames * height * width * (on_gpu.videos * torch.float32.itemsize + cast)
        peaks.append(video + _encoding(family, on_gpu.encoded, on_gpu.vae_dtype).peak_bytes)
    if on_gpu.decoded is not None:
        width, height, frames = on_gpu.decoded
        with torch.device("meta"):
            vae = _empty_vae(family, on_gpu.vae_dtype)
            latents = torch.empty(1, *vae.latent_shape(frames, height, width), dtype=vae.dtype)
            peaks.append(peak_bytes(lambda: vae.decode(latents)))
    return max(peaks)


def encoding_seconds(family: Family, size: tuple[int, int, int], vae_dtype: torch.dtype, card: Card) -> float:
    """What the VAE takes to encode a sample of this size (width, height, frames), by the rates of the card.

    Convolutions in fp32 run in TF32, at half the rate of bf16.
    """
    counts = _encoding(family, size, vae_dtype)
    rate = card.products if vae_dtype == torch.bfloat16 else card.products / 2
    return counts.product_flops / rate + counts.elementwise_bytes / card.bandwidth


@cache
def _encoding(family: Family, size: tuple[int, int, int], dtype: torch.dtype) -> Counts:
    """What it takes to encode a sample."""
    width, height, frames = size
    with torch.device("meta"):
        vae = _empty_vae(family, dtype)
        video = torch.empty(1, 3, frames, height, width, dtype=dtype)
        return count_forward(lambda: vae.encode(video))


def _empty_vae(family: Family, dtype: torch.dtype) -> WanVAE:
    return (Wan22VAE() if family.vae == "Wan2.2_VAE.pth" else WanVAE()).requires_grad_(False).to("meta", dtype)
