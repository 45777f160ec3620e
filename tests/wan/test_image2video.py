"""Given frames reach a Wan as they do in the official code and in diffusers."""

import json
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from torch import Tensor

from tests.encoders import family_vae
from tests.peers import diffusers_transformer, diffusers_vae22, to_diffusers
from tests.tiny import DATA, tiny_shape, tiny_transformer
from tests.wan.modules.test_vae import diffusers_name
from utils.encoding.conditioning import Cond, make_predict
from utils.encoding.sampling import denoise
from wan.configs import FAMILIES, Family
from wan.image2video import frame_channels, frame_mask, hold_first, timestep_rows
from wan.modules.vae import WanVAE
from wan.text2video import Sampler
from wan.utils.fm_solvers import SOLVERS, make_solver, sigma_grid

I2V, FLF2V = FAMILIES["wan2.1-i2v-14B-480P"], FAMILIES["wan2.1-flf2v-14B-720P"]
TI2V = FAMILIES["wan2.2-ti2v-5B"]
STATISTICS = json.loads((DATA / "vae_latent_stats.json").read_text())
FRAMES, HEIGHT, WIDTH = 9, 32, 48
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return family_vae(I2V.vae)


def pictures_of(family: Family, height: int = HEIGHT, width: int = WIDTH) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {place: torch.rand(3, 1, height, width, generator=generator) * 2 - 1 for place in family.given}


def official_mask(frames: int, h: int, w: int, last: bool) -> Tensor:
    """The lines of image2video.py and first_last_frame2video.py, for any number of frames."""
    msk = torch.ones(1, frames, h, w)
    msk[:, 1 : -1 if last else None] = 0
    msk = torch.concat([torch.repeat_interleave(msk[:, 0:1], repeats=4, dim=1), msk[:, 1:]], dim=1)
    return msk.view(1, msk.shape[1] // 4, 4, h, w).transpose(1, 2)[0]


# ------------------------------------------------------------------------------------------------------ extra channels


@pytest.mark.parametrize("frames", [1, 5, 9, 81])
@pytest.mark.parametrize("last", [False, True])
def test_the_mask_marks_the_frames_that_the_official_code_marks(frames, last):
    mask = frame_mask((0, -1) if last else (0,), frames, 4)
    assert torch.equal(mask, official_mask(frames, 1, 1, last)[:, :, 0, 0])
    assert mask.shape == (4, (frames - 1) // 4 + 1)
    if frames > 1:
        assert mask.sum() == 4 + last and mask[:, -1].tolist() == [0, 0, 0, float(last)]


@pytest.mark.parametrize("family", [I2V, FLF2V], ids=lambda family: family.task)
def test_the_channels_are_the_official_mask_and_then_the_latents_of_a_gray_clip(vae, family):
    pictures, last = pictures_of(family), family is FLF2V
    gray = torch.zeros(3, FRAMES - 1 - last, HEIGHT, WIDTH)
    latents = vae.encode(torch.concat([pictures[0], gray, *([pictures[-1]] if last else [])], dim=1)[None])[0]
    expected = torch.concat([official_mask(FRAMES, HEIGHT // 8, WIDTH // 8, last), latents])
    channels = frame_channels(pictures, FRAMES, vae)
    assert channels.shape == (family.in_dim - family.out_dim, 3, HEIGHT // 8, WIDTH // 8)
    assert torch.equal(channels, expected)


@pytest.mark.parametrize("family", [I2V, FLF2V], ids=lambda family: family.task)
def test_the_channels_are_those_of_diffusers(vae, family):
    theirs = AutoencoderKLWan(base_dim=8)
    theirs.load_state_dict({diffusers_name(name): tensor for name, tensor in vae.state_dict().items()})
    pictures, noise = pictures_of(family), torch.zeros(1, *vae.latent_shape(FRAMES, HEIGHT, WIDTH))
    images = [pictures[place].transpose(0, 1) for place in family.given]
    _, expected = pipeline(theirs.eval()).prepare_latents(
        images[0], 1, 16, HEIGHT, WIDTH, FRAMES, torch.float32, CPU, None, noise, *images[1:]
    )
    torch.testing.assert_close(frame_channels(pictures, FRAMES, vae)[None], expected, rtol=1e-5, atol=1e-5)


def test_the_latents_are_fp32_from_a_vae_of_another_precision(vae):
    half = family_vae.__wrapped__(I2V.vae).to(torch.bfloat16)
    channels = frame_channels(pictures_of(I2V), FRAMES, half)
    assert channels.dtype == torch.float32
    torch.testing.assert_close(channels, frame_channels(pictures_of(I2V), FRAMES, vae), rtol=0.1, atol=0.3)


# -------------------------------------------------------------------------------------------------- a clean first frame


def draw(seed: int, frames: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, 48, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def test_a_first_frame_is_held_in_the_samples_that_are_given_one():
    latents, first = draw(0), draw(1, frames=1)
    everywhere = hold_first(latents, first)
    assert torch.equal(everywhere[:, :, :1], first) and torch.equal(everywhere[:, :, 1:], latents[:, :, 1:])
    some = hold_first(latents, first, torch.tensor([False, True]))
    assert torch.equal(some[0], latents[0]) and torch.equal(some[1], everywhere[1])
    assert torch.equal(latents, draw(0)) and hold_first(latents.half(), first).dtype == torch.float16


def test_the_timestep_of_a_held_frame_is_zero_and_that_of_the_others_the_samples_own():
    timestep = torch.tensor([300.0, 700.0])
    assert timestep_rows(timestep).tolist() == [[0, 300], [0, 700]]
    assert timestep_rows(timestep, torch.tensor([False, True])).tolist() == [[300, 300], [0, 700]]


class Wavy:
    """A velocity that mixes neighbouring frames, differs with the text, and remembers what it was shown."""

    def __init__(self, first: Tensor) -> None:
        self.first = first
        self.shown: list[Tensor] = []

    def official(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """What the model answers to latents whose first frame is clean."""
        self.shown.append(latents)
        mixed = latents + latents.roll(1, dims=2)
        return torch.tanh(mixed) + text.mean() * latents * timestep.view(-1, 1, 1, 1, 1) / 1000

    def __call__(self, latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        assert cond.first is not None
        return self.official(hold_first(latents, cond.first), timestep, cond.text)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_held_frame_gives_what_the_official_loop_gives_that_replaces_it_after_every_step(solver):
    first, text, negative = draw(1, frames=1), torch.full((2, 3, 8), 0.7), torch.full((3, 8), -0.2)
    model, steps = Wavy(first), make_solver(solver, 8, 5.0, CPU)

    # textimage2video.py: latent = (1 - mask) * z + mask * latent, before the loop and after each of its steps.
    mask = torch.ones_like(draw(0))
    mask[:, :, 0] = 0
    latents = (1 - mask) * first + mask * draw(0)
    for t in steps.timesteps:
        timestep = t.expand(2)
        without = model.official(latents, timestep, negative)
        velocity = without + 5.0 * (model.official(latents, timestep, text) - without)
        latents = steps.step(velocity, t, latents, return_dict=False)[0]
        latents = (1 - mask) * first + mask * latents

    sampler, theirs = Sampler(solver, 8, (5.0,), 5.0), model.shown
    model.shown = []
    found = denoise(sampler, model, draw(0), Cond(text, first=first), negative)
    torch.testing.assert_close(found, latents, rtol=0, atol=1e-6)
    assert torch.equal(found[:, :, :1], first) and len(model.shown) == len(theirs) == 16
    assert all(torch.equal(shown[:, :, :1], first) for shown in model.shown)


class OfficialGrid(UniPCMultistepScheduler):
    """diffusers' solver on the noise levels of the official code."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(sigmas=sigma_grid(num_inference_steps, TI2V.shift), device=device)


def pipeline(vae: AutoencoderKLWan, **parts: Any) -> WanImageToVideoPipeline:
    scheduler = OfficialGrid(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    return WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, **parts)


@torch.no_grad()
def test_image_to_video_with_the_5b_equals_the_pipeline_of_diffusers():
    vae, model = family_vae(TI2V.vae), tiny_transformer(tiny_shape(TI2V))
    reference, transformer = diffusers_vae22(vae), diffusers_transformer(model.shape)
    statistics = STATISTICS["wan2.2"]
    reference.register_to_config(latents_mean=statistics["mean"], latents_std=statistics["std"])
    transformer.load_state_dict({to_diffusers(name): tensor for name, tensor in model.state_dict().items()})
    picture = pictures_of(TI2V, 64, 96)[0]
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(1, *vae.latent_shape(FRAMES, 64, 96), generator=generator)
    text, negative = torch.randn(2, 1, model.shape.text_len, model.shape.text_dim, generator=generator)

    theirs = pipeline(reference, transformer=transformer, expand_timesteps=True)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        image=picture.transpose(0, 1) / 2 + 0.5, prompt_embeds=text, negative_prompt_embeds=negative,
        height=64, width=96, num_frames=FRAMES, num_inference_steps=4, guidance_scale=3.0, latents=noise,
        output_type="latent",
    ).frames  # fmt: skip
    cond = Cond(text, first=vae.encode(picture[None]))
    found = denoise(Sampler("unipc", 4, (3.0,), TI2V.shift), make_predict(model), noise, cond, negative[0])
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5 and torch.equal(found[:, :, :1], cond.first)
