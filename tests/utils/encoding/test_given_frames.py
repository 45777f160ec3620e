"""What families are given of a clip: in extra channels, through a vision encoder, or as a clean first latent frame."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import train_wan_lora
from tests.encoders import family_encoders
from tests.tiny import IMAGE_DIM, TINY_SHAPE, tiny_shape, tiny_transformer
from utils.adapters.lora import widen_patch_embedding
from utils.common.errors import UserError
from utils.common.options import parse_options
from utils.data.loading import Clip
from utils.encoding.conditioning import (
    Batch,
    Cond,
    Encoded,
    GivenFrames,
    collate,
    draw_held,
    encode_video,
    inject_noise,
    loss_weight,
    make_predict,
    to_unit_range,
)
from utils.media.controls import ControlSignal, tile
from wan.configs import FAMILIES
from wan.image2video import frame_channels

WIDTH = TINY_SHAPE.text_dim
T2V, I2V = FAMILIES["wan2.1-t2v-1.3B"], FAMILIES["wan2.1-i2v-14B-480P"]
FLF2V, TI2V = FAMILIES["wan2.1-flf2v-14B-720P"], FAMILIES["wan2.2-ti2v-5B"]
TILE = ControlSignal("tile")
TEXT = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9))


def family_clip(frames: int = 5, **others: Tensor) -> Clip:
    return Clip(make_pixels(0, frames), "a clip", **others)


def make_pixels(seed: int, frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, frames, 32, 64), dtype=torch.uint8, generator=generator)


def start_picture() -> Tensor:
    return make_pixels(seed=3, frames=1)


@pytest.mark.parametrize("family", [I2V, FLF2V], ids=lambda family: family.task)
def test_a_model_with_extra_channels_is_given_the_clips_own_frames_and_sees_them(family):
    encoders, clip = family_encoders(family), family_clip()
    video = to_unit_range(clip.pixels)
    own = {0: video[:, :1]} if family is I2V else {0: video[:, :1], -1: video[:, -1:]}
    cond = encoders.encode(clip, TEXT).cond
    assert torch.equal(cond.channels, frame_channels(own, 5, encoders.vae)) and cond.first is None
    seen = [encoders.vision.encode(picture.transpose(0, 1))[0] for picture in own.values()]
    assert cond.image.shape == (257 * len(own), IMAGE_DIM) and cond.image.dtype == torch.float32
    torch.testing.assert_close(cond.image, torch.cat(seen), rtol=1e-5, atol=1e-5)


def test_the_5b_is_given_the_latents_of_the_first_frame_alone_and_none_of_an_image():
    encoders, clip = family_encoders(TI2V), family_clip()
    encoded = encoders.encode(clip, TEXT)
    assert torch.equal(encoded.cond.first, encode_video(to_unit_range(clip.pixels[:, :1]), encoders.vae))
    assert encoded.cond.first.shape == (48, 1, 2, 4) and encoded.cond.channels is encoded.cond.image is None
    single = encoders.encode(family_clip(frames=1), TEXT)
    assert single.latents.shape == (48, 1, 2, 4) and single.cond.first is None


@pytest.mark.parametrize("family", [I2V, FLF2V, TI2V, T2V], ids=lambda family: family.task)
def test_a_start_picture_stands_for_the_first_frame_that_is_given_and_the_clip_stays(family):
    encoders, clip = family_encoders(family), family_clip()
    own, given = (encoders.encode(each, TEXT) for each in (clip, family_clip(first=start_picture())))
    assert torch.equal(own.latents, given.latents)
    pictures = {place: to_unit_range(clip.pixels)[:, place : place + 1 or None] for place in family.given}
    expected = encoders.condition(TEXT, pictures | ({0: to_unit_range(start_picture())} if pictures else {}), 5)
    for name, part in vars(expected).items():
        found, before = getattr(given.cond, name), getattr(own.cond, name)
        assert (part is found is before is None) or torch.equal(part, found)
        assert name in ("text", "held") or part is None or not torch.equal(before, found)


@pytest.mark.parametrize("family", [I2V, TI2V, T2V], ids=lambda family: family.task)
def test_a_control_is_the_last_channels_whatever_else_a_family_is_given(family):
    clip = family_clip()
    plain, cond = (family_encoders(family, control).encode(clip, TEXT).cond for control in (None, TILE))
    expected = encode_video(tile(to_unit_range(clip.pixels)), family_encoders(family).vae)
    assert len(cond.channels) == family.in_dim
    assert torch.equal(cond.channels[-family.out_dim :], expected)
    assert plain.channels is None or torch.equal(cond.channels[: -family.out_dim], plain.channels)


def test_the_first_frame_of_a_control_is_replaced_unless_it_is_the_only_one():
    encoders = family_encoders(T2V)
    first, control = torch.rand(3, 1, 32, 64), torch.rand(3, 5, 32, 64)
    found = encoders.add_control(Cond(TEXT), control, first).channels
    assert torch.equal(found, encode_video(torch.cat([first, control[:, 1:]], dim=1), encoders.vae))
    single = encoders.add_control(Cond(TEXT), control[:, :1], first).channels
    assert torch.equal(single, encode_video(control[:, :1], encoders.vae))


def test_with_control_i2v_the_control_starts_with_the_clips_own_frame_also_one_from_a_file():
    encoders, clip = family_encoders(T2V, ControlSignal("tile", keeps_first=True)), family_clip()
    video = to_unit_range(clip.pixels)
    for control, made in ((None, tile(video)), (start_picture().expand(-1, 5, -1, -1), to_unit_range(start_picture()))):
        expected = torch.cat([video[:, :1], made.expand(-1, 5, -1, -1)[:, 1:]], dim=1)
        found = encoders.encode(family_clip(control=control), TEXT).cond.channels
        assert torch.equal(found, encode_video(expected, encoders.vae))


@pytest.mark.parametrize("family", [I2V, FLF2V, TI2V], ids=lambda family: family.task)
def test_samples_of_every_family_are_made_again_of_their_parts_and_batched(family):
    sample = family_encoders(family, TILE).encode(family_clip(), TEXT)
    again = Encoded.from_parts(sample.parts(), sample.cond.text)
    assert vars(again.cond) == vars(sample.cond) and again.latents is sample.latents
    batch = collate([sample, again])
    parts = {name: part for name, part in vars(sample.cond).items() if part is not None}
    assert all(torch.equal(getattr(batch.cond, name)[1], part) for name, part in parts.items())


# --------------------------------------------------------------------------------------------------- held first frames


def held_batch(count: int = 2) -> Batch:
    latents, first = torch.randn(2, count, 48, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    text = TEXT.expand(count, -1, -1)
    return Batch(latents, Cond(text, first=first[:, :, :1]))


def test_whether_a_sample_is_given_its_first_frame_is_drawn_for_each():
    cond = held_batch(400).cond
    torch.manual_seed(0)
    held = draw_held(cond, 0.3).held
    torch.manual_seed(0)
    assert torch.equal(held, torch.rand(400) < 0.3)
    assert held.dtype == torch.bool and held.float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert not draw_held(cond, 0.0).held.any() and draw_held(cond, 1.0).held.all()


def test_nothing_is_drawn_where_no_first_frame_could_be_given():
    state = torch.get_rng_state()
    for cond in (Cond(TEXT[None]), Cond(TEXT[None], torch.zeros(1, 20, 2, 4, 6))):
        assert draw_held(cond, 0.5) is cond
    assert torch.equal(state, torch.get_rng_state())


def test_a_first_frame_that_is_given_does_not_count_in_the_loss():
    batch = held_batch()
    assert loss_weight(Batch(batch.latents, Cond(TEXT[None])), Cond(TEXT[None])) is None
    everywhere = loss_weight(batch, batch.cond)
    assert everywhere.shape == (2, 3, 4, 6) and everywhere[:, 0].eq(0).all() and everywhere[:, 1:].eq(1).all()
    mixed = loss_weight(batch, replace(batch.cond, held=torch.tensor([True, False])))
    assert mixed[0, 0].eq(0).all() and mixed[0, 1:].eq(1).all() and mixed[1].eq(1).all()


def test_a_mask_counts_beside_a_given_first_frame_and_is_left_as_it_was():
    mask = torch.zeros(2, 3, 4, 6)
    mask[..., 3:] = 1
    batch = replace(held_batch(), mask=mask)
    weight = loss_weight(batch, replace(batch.cond, held=torch.tensor([True, False])), mask_floor=0.1)
    floored = torch.where(mask.bool(), 1.0, 0.1)
    assert weight[0, 0].eq(0).all()
    torch.testing.assert_close(weight[0, 1:], floored[0, 1:])
    torch.testing.assert_close(weight[1], floored[1])
    assert mask.unique().tolist() == [0, 1]


@pytest.mark.parametrize(("probability", "expected"), [("1", 0.0), ("0", 3.0)])
def test_training_shows_a_given_first_frame_clean_and_does_not_count_it(monkeypatch, probability, expected):
    batch, shown = held_batch(), []

    def right_but_for_the_first_frame(latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        shown.append(cond.held)
        velocity = (latents - batch.latents) / (timestep / 1000).view(-1, 1, 1, 1, 1)
        velocity[:, :, 0] += 3
        return velocity

    monkeypatch.setattr(train_wan_lora, "make_predict", lambda model: right_but_for_the_first_frame)
    opts = parse_options(train_wan_lora.Options, ["--i2v_probability", probability])
    loss = train_wan_lora.training_loss(batch, opts, (0.0, 1.0), tiny_transformer(), None).value
    assert loss.item() == pytest.approx(expected, abs=1e-3)  # 3 squared, in one of three latent frames
    assert shown[0].tolist() == [probability == "1"] * 2


@torch.no_grad()
def test_a_held_sample_is_answered_from_its_clean_first_frame_at_timestep_zero_and_the_others_as_they_are():
    model, batch = tiny_transformer(tiny_shape(TI2V)), held_batch()
    predict, timestep = make_predict(model), torch.tensor([700.0, 300.0])
    found = predict(batch.latents, timestep, replace(batch.cond, held=torch.tensor([True, False])))
    clean = torch.cat([batch.cond.first, batch.latents[:, :, 1:]], dim=2)
    held = model(clean[:1], torch.tensor([[0.0, 700.0]]), batch.cond.text[:1])
    free = model(batch.latents[1:], timestep[1:], batch.cond.text[1:])
    torch.testing.assert_close(found, torch.cat([held, free]), rtol=1e-4, atol=1e-5)
    everywhere = predict(batch.latents, timestep, batch.cond)
    torch.testing.assert_close(everywhere[:1], held, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(everywhere[1:], free, atol=1e-2)


@torch.no_grad()
def test_a_models_input_is_noise_then_given_frames_then_control_and_it_sees_the_vision_tokens():
    model = tiny_transformer(tiny_shape(I2V))
    widen_patch_embedding(model, 52)
    model.patch_embedding.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    noise, given, control = torch.randn(1, 52, 2, 4, 6).split([16, 20, 16], dim=1)
    text, image, timestep = TEXT[None], torch.randn(1, 257, IMAGE_DIM), torch.tensor([500.0])
    found = make_predict(model)(noise, timestep, Cond(text, torch.cat([given, control], dim=1), image))
    assert torch.equal(found, model(torch.cat([noise, given, control], dim=1), timestep, text, image))
    absent = make_predict(model)(noise, timestep, Cond(text, given, image))
    zeros = torch.zeros_like(control)
    assert torch.equal(absent, model(torch.cat([noise, given, zeros], dim=1), timestep, text, image))


def test_injected_noise_reaches_the_controls_channels_alone():
    cond = Cond(TEXT[None], torch.zeros(1, 36, 2, 4, 6), image=torch.zeros(1, 257, IMAGE_DIM))
    torch.manual_seed(0)
    noisy = inject_noise(cond, 0.5, 16)
    assert noisy.channels.shape == cond.channels.shape and noisy.image is cond.image
    assert noisy.channels[:, :20].eq(0).all() and noisy.channels[:, 20:].ne(0).all()


# ------------------------------------------------------------------------------------------------------------- options


def test_half_of_the_samples_are_given_their_first_frame_unless_a_share_is_set():
    assert [GivenFrames(share).held_share for share in (None, 0.0, 0.25, 1.0)] == [0.5, 0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("share", "reads_first", "family", "message"),
    [
        (0.5, False, I2V, "--i2v_probability has no effect: this model is always given its frames"),
        (0.0, False, T2V, "--i2v_probability has no effect: this model is given no frames"),
        (None, True, T2V, "--load_first_frame has no effect: this model is given no frames"),
        (0.0, True, TI2V, "--load_first_frame has no effect with --i2v_probability 0"),
    ],
)
def test_an_option_of_given_frames_without_effect_is_refused(share, reads_first, family, message):
    with pytest.raises(UserError, match=message):
        GivenFrames(share).check_given(family, reads_first)


def test_prompts_alone_have_no_frames_to_give():
    with pytest.raises(UserError, match="--i2v_probability has no effect with --prompts: there are no frames to give"):
        GivenFrames(0.5).check_given(TI2V, reads_first=False, has_frames=False)
    GivenFrames().check_given(TI2V, reads_first=False, has_frames=False)


def test_an_option_of_given_frames_with_an_effect_is_taken():
    GivenFrames(0.5).check_given(TI2V, reads_first=True)
    GivenFrames(0.0).check_given(TI2V, reads_first=False)
    GivenFrames().check_given(FLF2V, reads_first=True)
    GivenFrames().check_given(T2V, reads_first=False)


@pytest.mark.parametrize(
    ("family", "share", "mode"),
    [(T2V, None, "normal"), (I2V, None, "i2v"), (FLF2V, None, "i2v"), (TI2V, None, "ti2v"), (TI2V, 1.0, "ti2v"),
     (TI2V, 0.0, "normal")],
)  # fmt: skip
def test_a_train_mode_must_be_that_of_the_model(family, share, mode):
    GivenFrames(share, train_mode=mode).check_given(family, reads_first=False)
    for other in {"normal", "i2v", "ti2v"} - {mode}:
        with pytest.raises(UserError, match=f"--train_mode {other} is for a model .*: give --train_mode {mode}"):
            GivenFrames(share, train_mode=other).check_given(family, reads_first=False)


def test_what_the_5b_model_is_trained_for_is_a_matter_of_its_share_of_given_frames():
    with pytest.raises(UserError, match="give --train_mode ti2v, or --i2v_probability 0$"):
        GivenFrames(train_mode="normal").check_given(TI2V, reads_first=False)
    with pytest.raises(UserError, match="give --train_mode normal, or leave out --i2v_probability 0$"):
        GivenFrames(0.0, train_mode="ti2v").check_given(TI2V, reads_first=False)
