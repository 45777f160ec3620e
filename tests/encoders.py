"""Encoders of small models."""

from functools import cache

from tests.tiny import FAMILY, IMAGE_DIM, tiny_clip, tiny_vae, tiny_vae22
from utils.encoding.conditioning import Encoders
from utils.media.controls import ControlSignal
from wan.configs import Family
from wan.modules.clip import VisionEncoder, vision_shape
from wan.modules.vae import WanVAE


def encoders_of(
    vae: WanVAE, control: str | None = None, family: Family = FAMILY, vision: VisionEncoder | None = None
) -> Encoders:
    """The encoders of a family, with the signal of a control LoRA where a control is named."""
    return Encoders(family, vae, vision, ControlSignal(control) if control else None)


def family_encoders(family: Family, control: ControlSignal | None = None) -> Encoders:
    """Small encoders of a family: its kind of VAE, and a vision encoder where it has one."""
    return Encoders(family, family_vae(family.vae), tiny_vision() if family.clip else None, control)


@cache
def family_vae(file: str) -> WanVAE:
    """A small VAE of the kind that a released file holds."""
    return tiny_vae() if file == FAMILY.vae else tiny_vae22()


@cache
def tiny_vision() -> VisionEncoder:
    """A small vision encoder, frozen."""
    weights = tiny_clip(IMAGE_DIM)
    encoder = VisionEncoder(vision_shape({name: tensor.shape for name, tensor in weights.items()}))
    encoder.load_official(weights)
    return encoder.eval().requires_grad_(False)
