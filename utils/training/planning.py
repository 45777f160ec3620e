"""What a run would take on a GPU, and which options would make it fit: said without loading anything."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import psutil
import torch
from torch import nn
from tqdm import tqdm

from utils.common.console import say
from utils.common.errors import UserError
from utils.common.options import option
from utils.storage.weights import StorageOptions
from utils.training.calibration import Workload
from utils.training.cards import CARDS, Card, find_card
from utils.training.checkpoint_plan import AUTO
from utils.training.choice import Given, Limits, choose
from utils.training.forecast import Forecast, Setting
from utils.training.memory import MemoryOptions
from wan.configs import Family
from wan.modules.clip import VisionEncoder, VisionShape
from wan.modules.vae import WanVAE
from wan.modules.vae2_2 import Wan22VAE

MARGIN = 0.05  # of a GPU's memory: lost between tensors of different sizes, and to the screen
HOST_MARGIN = 0.25  # of what is free of main memory, which other programs use too
ASSUMED_HOST = 64e9  # bytes of main memory that are free beside a GPU of another machine


@dataclass(frozen=True)
class PlanOptions:
    """plan"""

    plan: bool = option(
        False, "say what would fit into the GPU and how long a step would take, by forecast, and stop",
        affects_training=False,
    )  # fmt: skip
    gpu: str | None = option(
        None, "GPU to plan for (default: that of this machine)", choices=tuple(CARDS), requires="plan",
        affects_training=False,
    )  # fmt: skip


def say_plan(opts: PlanOptions, given: Given, family: Family, work: Workload, keeps_encoders: bool) -> None:
    """Prints the forecast of the fastest setting that fits, and its options; what is given stays as it is.

    `keeps_encoders`: whether the VAE, and the vision encoder where there is one, are on the GPU while training. Raises
    UserError where nothing fits, and for a GPU that is not known.
    """
    card = CARDS[opts.gpu] if opts.gpu else this_card()
    encoders = encoder_bytes(family) if keeps_encoders else 0
    host = ASSUMED_HOST if opts.gpu else psutil.virtual_memory().available * (1 - HOST_MARGIN)
    found = choose(work, card, Limits(card.memory * (1 - MARGIN) - encoders, host), given, _progress)
    say(f"\n{found.describe()}")
    if encoders:
        say(f"encoders take {encoders / 1e9:.2f} GB beside that; --cache_latents keeps them off the GPU")
    say(f"options: {flags_of(found)}")
    assumed = f"{ASSUMED_HOST / 1e9:.0f} GB of main memory are assumed; " if opts.gpu else ""
    say(f"{assumed}nothing of this is measured: rates are nominal, and times optimistic by perhaps 20 to 30 %")


def _progress(settings: list[Setting]) -> Iterable[Setting]:
    return tqdm(settings, desc="forecasting", unit="setting", leave=False)


def given_of(storage: StorageOptions, memory: MemoryOptions, num_blocks: int) -> Given:
    """What the user has decided."""
    return Given(
        weights=None if storage.weight_dtype == "auto" else storage.weight_dtype,
        streamed=storage.count_streamed(num_blocks) or None,
        checkpointing=None if memory.gradient_checkpointing == AUTO else memory.gradient_checkpointing,
        compile=memory.compile == "on",
    )


def flags_of(found: Forecast) -> str:
    """The options of a setting. How much blocks keep is left to the run, which measures it."""
    setting = found.setting
    streamed = f" --blocks_to_swap {setting.streamed}" if setting.streamed else ""
    return f"--weight_dtype {setting.weights}{streamed}{' --compile on' if setting.compile else ''}"


def this_card() -> Card:
    """The GPU of this machine. Raises UserError where there is none, or none that is known."""
    if not torch.cuda.is_available():
        raise UserError(f"--plan: this machine has no GPU; name one: --gpu {', '.join(CARDS)}")
    name = torch.cuda.get_device_name()
    card = find_card(name)
    if card is None:
        raise UserError(f"--plan: no rates are known for {name}; name one that is like it: --gpu {', '.join(CARDS)}")
    # Some cards come with different memory under one name.
    return replace(card, memory=torch.cuda.get_device_properties().total_memory)


def encoder_bytes(family: Family) -> int:
    """What the VAE and the vision encoder of a family take in fp32."""
    with torch.device("meta"):
        modules: list[nn.Module] = [Wan22VAE() if family.vae == "Wan2.2_VAE.pth" else WanVAE()]
        if family.clip:
            modules.append(VisionEncoder(VisionShape()))
    return 4 * sum(math.prod(p.shape) for module in modules for p in module.parameters())
