"""From clips to what the transformer reads: latents, text rows, and extra input channels.

    Clip --encode_clip--> Encoded --collate--> Batch --predict--> velocity

How families differ in what their models read besides noisy latents and text is decided here.

Shape letters: B batch, C latent channels, K extra input channels, F H W latent frames, height and width,
T text tokens, E text width, V vision tokens, I vision width. Of one sample instead of a batch there is no B.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from utils.common.errors import UserError
from utils.common.options import option
from utils.common.tensors import map_tensors, stack_tensors
from utils.data.loading import Clip
from utils.diffusion.flow import Predict
from utils.media.controls import ControlSignal, make_control
from wan.configs import Family
from wan.image2video import frame_channels, hold_first, timestep_rows
from wan.modules.clip import VisionEncoder
from wan.modules.model import WanModel
from wan.modules.vae import WanVAE

NORMAL, I2V, TI2V = "normal", "i2v", "ti2v"
MODES = {
    NORMAL: "is given no frames",
    I2V: "is always given its frames",
    TI2V: "is given its first frame in some samples",
}


@dataclass(frozen=True)
class GivenFrames:
    """given frames"""

    i2v_probability: float | None = option(
        None,
        "share of samples that are given their first frame, for Wan 2.2 TI2V-5B (default: 0.5)",
        minimum=0,
        maximum=1,
    )

    train_mode: str | None = option(
        None,
        "what the model must be; normal: given no frames; i2v: always given its frames; ti2v: its first frame, in some "
        "samples (default: whatever it is)",
        choices=tuple(MODES),
        affects_training=False,
    )

    @property
    def held_share(self) -> float:
        """The share of samples whose first latent frame is held, of those where it can be."""
        return 0.5 if self.i2v_probability is None else self.i2v_probability

    def check_given(self, family: Family, reads_first: bool, has_frames: bool = True) -> None:
        """Raises UserError for a family where the option, or start pictures of clips, would have no effect.

        Prompts alone have no frames.
        """
        if self.i2v_probability is not None and not has_frames:
            raise UserError("--i2v_probability has no effect with --prompts: there are no frames to give")
        if self.i2v_probability is not None and family.given_as != "latents":
            always = "is always given its frames" if family.given else "is given no frames"
            raise UserError(f"--i2v_probability has no effect: this model {always}")
        self._check_mode(family, has_frames)
        if reads_first and not family.given:
            raise UserError("--load_first_frame has no effect: this model is given no frames")
        if reads_first and self.i2v_probability == 0:
            raise UserError("--load_first_frame has no effect with --i2v_probability 0: no sample is given its frame")

    def _check_mode(self, family: Family, has_frames: bool) -> None:
        """Raises UserError for a --train_mode that is not how this model is trained."""
        given, is_mixed = self.train_mode, family.given_as == "latents" and has_frames
        mode = TI2V if is_mixed and self.held_share else I2V if family.given_as == "channels" else NORMAL
        if given in (None, mode):
            return
        others = {(TI2V, NORMAL): ", or --i2v_probability 0", (NORMAL, TI2V): ", or leave out --i2v_probability 0"}
        other = others.get((mode, given), "") if is_mixed else ""
        is_for = f"--train_mode {given} is for a model that {MODES[given]}, but this one {MODES[mode]}"
        raise UserError(f"{is_for}: give --train_mode {mode}{other}")


@dataclass(frozen=True)
class Cond:
    """What the model is conditioned on besides the noisy latents. A new condition is a field here."""

    text: Tensor  # (B, T, E), zero rows where a caption is shorter
    channels: Tensor | None = None  # (B, K, F, H, W) after the noisy latents: those of given frames, then a control's
    image: Tensor | None = None  # (B, V, I) vision tokens of the given frames
    first: Tensor | None = None  # (B, C, 1, H, W) the first latent frame, where it is given clean
    held: Tensor | None = None  # (B,) bool: which samples are given `first`; all of them without


@dataclass(frozen=True)
class Encoded:
    """One sample, ready for training: fresh from the encoders, or from the cache."""

    latents: Tensor  # (C, F, H, W)
    cond: Cond
    mask: Tensor | None = None  # (F, H, W) in 0..1: how much each position counts in the loss; 1 everywhere without

    def to(self, device: torch.device) -> "Encoded":
        """On the device, without the host waiting for the copies."""
        return map_tensors(self, partial(_to_device, device=device))

    def pin_memory(self) -> "Encoded":
        """In page-locked memory, from where a GPU copies without the host waiting; the loader calls this."""
        return map_tensors(self, Tensor.pin_memory)

    def parts(self) -> dict[str, Tensor]:
        """What is kept in the latent cache: all tensors that encoders made but the text, by field name."""
        named = {"latents": self.latents, "mask": self.mask, **vars(self.cond)}
        return {name: part for name, part in named.items() if part is not None and name != "text"}

    @staticmethod
    def from_parts(parts: Mapping[str, Tensor], text: Tensor) -> "Encoded":
        """The sample with these `parts()` and this text (T, E)."""
        conditions = {spec.name for spec in fields(Cond)}
        cond = Cond(text, **{name: part for name, part in parts.items() if name in conditions})
        return Encoded(parts["latents"], cond, parts.get("mask"))


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket."""

    latents: Tensor  # (B, C, F, H, W)
    cond: Cond
    mask: Tensor | None = None  # (B, F, H, W) in 0..1

    def tokens(self, patch_size: tuple[int, int, int]) -> int:
        """How many tokens the transformer sees."""
        return self.latents[:, 0].numel() // math.prod(patch_size)

    def to(self, device: torch.device) -> "Batch":
        return map_tensors(self, lambda tensor: tensor.to(device))


def to_unit_range(pixels: Tensor) -> Tensor:
    """Pixels on the 0..255 scale -> fp32 in -1..1, the range the VAE was trained on. The pixels are not changed."""
    return pixels.to(torch.float32, copy=True, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_pixels(video: Tensor) -> Tensor:
    """A video (3, F, H, W) in -1..1 -> frames (F, 3, H, W) uint8 on the CPU."""
    return video.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).transpose(0, 1).cpu()


@dataclass(frozen=True)
class Encoders:
    """The encoders of a family, loaded, and what they make of its clips."""

    family: Family
    vae: WanVAE
    vision: VisionEncoder | None = None
    control: ControlSignal | None = None

    @torch.no_grad()
    def encode(self, clip: Clip, text: Tensor) -> Encoded:
        """Encodes a clip and what the model is conditioned on; `text` (T, E) is the clip's caption.

        The latents are zeros where only the frames that the model is given were read. Raises ValueError where a control
        would have to be made of the others.
        """
        if clip.length is not None:
            return self._encode_given(clip, text, clip.length)
        video, mask = self._load(clip.pixels), None
        latents = encode_video(video, self.vae)
        if self.family.given_as == "latents" and clip.first is None and video.shape[1] > 1:
            # The VAE is causal: this is its own first frame, encoded alone.
            cond = Cond(_to_device(text, self.vae.device), first=latents[:, :1].clone())
        else:
            cond = self.condition(text, self._given_of(clip, video), video.shape[1])
        if self.control is not None:
            control = make_control(video, self.control.kind) if clip.control is None else self._load(clip.control)
            cond = self.add_control(cond, control, video[:, :1] if self.control.keeps_first else None)
        if clip.mask is not None:
            mask = pool_mask(clip.mask.to(self.vae.device, non_blocking=True), self.vae.stride)
        return Encoded(latents, cond, mask)

    @torch.no_grad()
    def condition(self, text: Tensor, pictures: Mapping[int, Tensor], num_frames: int) -> Cond:
        """The conditions of a clip of so many frames: its text (T, E), and the frames that the model is given.

        `pictures` are (3, 1, H, W) in -1..1 by their place, one for each that the family is given, or none. A clip of
        one frame has no first latent frame that could be given.
        """
        text = _to_device(text, self.vae.device)
        if not pictures or (self.family.given_as == "latents" and num_frames == 1):
            return Cond(text)
        if self.family.given_as == "latents":
            return Cond(text, first=encode_video(pictures[0], self.vae))
        seen = torch.stack([picture[:, 0] for picture in pictures.values()])
        image = None if self.vision is None else rearrange(self.vision.encode(seen), "given V I -> (given V) I").float()
        return Cond(text, frame_channels(pictures, num_frames, self.vae), image)

    def _encode_given(self, clip: Clip, text: Tensor, num_frames: int) -> Encoded:
        if self.control is not None:
            raise ValueError("a control is made of every frame of a clip")
        shape = self.vae.latent_shape(num_frames, *clip.pixels.shape[2:])
        pictures = self._given_of(clip, self._load(clip.pixels))
        return Encoded(torch.zeros(shape, device=self.vae.device), self.condition(text, pictures, num_frames))

    def add_control(self, cond: Cond, control: Tensor, first: Tensor | None = None) -> Cond:
        """With the latents of a control video (3, F, H, W) as the last channels.

        `first` (3, 1, H, W) replaces the control's first frame, unless that is its only one.
        """
        if first is not None and control.shape[1] > 1:
            control = torch.cat([first, control[:, 1:]], dim=1)
        latents = encode_video(control, self.vae)
        channels = latents if cond.channels is None else torch.cat([cond.channels, latents])
        return replace(cond, channels=channels)

    def _given_of(self, clip: Clip, video: Tensor) -> dict[int, Tensor]:
        """The frames of a clip that the family is given: its own, or a start picture in place of the first."""
        own = {place: video[:, place : place + 1 or None] for place in self.family.given}
        return own if clip.first is None or not own else own | {0: self._load(clip.first)}

    def _load(self, pixels: Tensor) -> Tensor:
        return to_unit_range(pixels.to(self.vae.device, non_blocking=True))


def pool_mask(mask: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """The means (f, h, w) in 0..1 of a mask (F, H, W) uint8 over what each latent covers; the first frame is alone."""
    time, height, width = stride
    small = F.avg_pool2d(mask[:, None].float() / 255, (height, width))[:, 0]
    later = rearrange(small[1:], "(f time) h w -> f time h w", time=time).mean(dim=1)
    return torch.cat([small[:1], later])


def encode_video(video: Tensor, vae: WanVAE) -> Tensor:
    """Latents (C, F, H, W) fp32 of a video (3, F, H, W) in -1..1."""
    return vae.encode(video[None].to(vae.dtype))[0].float()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without the host waiting for the copy."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def collate(samples: Sequence[Encoded]) -> Batch:
    """Stacks samples of one bucket. Raises ValueError where only some of them have a condition.

    Shorter texts get zero rows, with which the model pads too. If some samples have a mask, the others get ones.
    """
    length = max(len(sample.cond.text) for sample in samples)
    masked = any(sample.mask is not None for sample in samples)
    stacked = stack_tensors([_even_out(sample, length, masked) for sample in samples])
    return Batch(stacked.latents, stacked.cond, stacked.mask)


def _even_out(sample: Encoded, length: int, masked: bool) -> Encoded:
    """The sample with a text of this length and, if `masked`, with a mask."""
    text = F.pad(sample.cond.text, (0, 0, 0, length - len(sample.cond.text)))
    mask = torch.ones_like(sample.latents[0]) if masked and sample.mask is None else sample.mask
    return replace(sample, cond=replace(sample.cond, text=text), mask=mask)


def inject_noise(cond: Cond, strength: float, num_channels: int) -> Cond:
    """Adds noise to the control's latents, up to `strength` per sample, so that the model does not rely on them alone.

    They are the last `num_channels` of the channels.
    """
    if cond.channels is None or strength == 0:
        return cond
    given, control = cond.channels[:, :-num_channels], cond.channels[:, -num_channels:]
    amount = torch.rand(len(control), 1, 1, 1, 1, device=control.device) * strength
    return replace(cond, channels=torch.cat([given, control + amount * torch.randn_like(control)], dim=1))


def draw_held(cond: Cond, probability: float) -> Cond:
    """Decides for each sample whether it is given its first latent frame. Drawn from torch's global random state.

    Nothing is drawn where there is no such frame.
    """
    if cond.first is None:
        return cond
    return replace(cond, held=torch.rand(len(cond.first), device=cond.first.device) < probability)


def loss_weight(batch: Batch, cond: Cond, mask_floor: float = 1.0) -> Tensor | None:
    """How much each position (B, F, H, W) counts in the loss; None: all alike.

    Black regions of a mask count `mask_floor`, a first latent frame that is given does not count at all.
    """
    weight = None if batch.mask is None else mask_floor + (1 - mask_floor) * batch.mask
    if cond.first is None:
        return weight
    counts = torch.ones_like(batch.latents[:, 0]) if weight is None else weight.clone()
    counts[:, 0] *= 0.0 if cond.held is None else (~cond.held).to(counts.dtype).view(-1, 1, 1)
    return counts


def replace_text(cond: Cond, text: Tensor) -> Cond:
    """The conditions of a batch with the text (T, E) for every sample: the negative side of guidance."""
    return replace(cond, text=text.expand(len(cond.text), -1, -1))


def make_predict(model: WanModel) -> Predict[Cond]:
    """`predict(latents, timestep, cond) -> velocity` of a transformer."""
    return partial(_predict, model)


def _predict(model: WanModel, latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """A control is zeros where a model that reads one is given none, and left out where a model reads none.

    Raises ValueError for any other number of channels than the base model reads, with or without a control.
    """
    own, control, reads = model.shape.in_dim, latents.shape[1], model.patch_embedding.weight.shape[1]
    if cond.first is not None:
        latents, timestep = hold_first(latents, cond.first, cond.held), timestep_rows(timestep, cond.held)
    if cond.channels is not None:
        latents = torch.cat([latents, cond.channels.to(latents.dtype)], dim=1)
    given = latents.shape[1]
    if given not in (own, own + control):
        raise ValueError(f"the model reads {own} input channels, and is given {given}")
    latents = F.pad(latents, (0, 0, 0, 0, 0, 0, 0, reads - given)) if reads > given else latents[:, :reads]
    return model(latents, timestep, cond.text, cond.image)
