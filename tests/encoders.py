"""Encoders of small models."""

from tests.tiny import FAMILY
from utils.encoding.conditioning import Encoders
from utils.media.controls import ControlSignal
from wan.configs import Family
from wan.modules.clip import VisionEncoder
from wan.modules.vae import WanVAE


def encoders_of(
    vae: WanVAE, control: str | None = None, family: Family = FAMILY, vision: VisionEncoder | None = None
) -> Encoders:
    """The encoders of a family, with the signal of a control LoRA where a control is named."""
    return Encoders(family, vae, vision, ControlSignal(control) if control else None)
