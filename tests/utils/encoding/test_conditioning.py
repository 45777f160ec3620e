"""Clips become latents and conditions, conditions become batches, and batches reach the transformer whole."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.encoders import encoders_of
from tests.tiny import TINY_SHAPE, tiny_shape, tiny_transformer, tiny_vae
from utils.adapters.lora import widen_patch_embedding
from utils.data.loading import Clip
from utils.encoding.conditioning import (
    Batch,
    Cond,
    Encoded,
    collate,
    encode_video,
    inject_noise,
    make_predict,
    replace_text,
    to_pixels,
    to_unit_range,
)
from utils.media.controls import tile
from wan.configs import FAMILIES
from wan.modules.vae import WanVAE

WIDTH = TINY_SHAPE.text_dim


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return tiny_vae()


def make_pixels(seed: int = 0, frames: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, frames, 16, 32), dtype=torch.uint8, generator=generator)


def make_clip(control: Tensor | None = None) -> Clip:
    return Clip(make_pixels(), "a red car", control)


def make_encoded(seed: int, tokens: int, control: bool = False) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    latents, channels = torch.randn(2, 16, 2, 4, 6, generator=generator)
    return Encoded(latents, Cond(torch.randn(tokens, WIDTH, generator=generator), channels if control else None))


def test_every_pixel_value_survives_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8).view(1, 2, 8, 16).expand(3, -1, -1, -1)
    video = to_unit_range(values)
    assert video.dtype == torch.float32 and video.min() == -1 and video.max() == 1
    assert torch.equal(to_pixels(video), values.transpose(0, 1))


def test_pixels_are_clamped_and_the_video_is_left_alone():
    video = torch.tensor([-1.5, 1.5, 0.0]).view(3, 1, 1, 1)
    before = video.clone()
    assert to_pixels(video).flatten().tolist() == [0, 255, 128]
    assert torch.equal(video, before)


def test_a_clip_becomes_its_latents_and_its_text(vae):
    text = torch.randn(4, WIDTH)
    encoded = encoders_of(vae).encode(make_clip(), text)
    expected = vae.encode(make_pixels().float()[None] / 127.5 - 1)[0]
    torch.testing.assert_close(encoded.latents, expected)
    assert encoded.latents.shape == (16, 2, 2, 4) and not encoded.latents.requires_grad
    assert torch.equal(encoded.cond.text, text) and encoded.cond.channels is None and encoded.mask is None


def test_with_a_control_type_the_control_is_made_from_the_pixels(vae):
    encoded = encoders_of(vae, "tile").encode(make_clip(), torch.randn(4, WIDTH))
    expected = vae.encode(tile(to_unit_range(make_pixels()))[None])[0]
    assert torch.equal(encoded.cond.channels, expected)
    assert not torch.allclose(encoded.cond.channels, encoded.latents)


def test_a_control_file_takes_the_place_of_the_made_control(vae):
    encoded = encoders_of(vae, "tile").encode(make_clip(make_pixels(seed=1)), torch.randn(4, WIDTH))
    assert torch.equal(encoded.cond.channels, encode_video(to_unit_range(make_pixels(seed=1)), vae))
    assert torch.equal(encoded.latents, encode_video(to_unit_range(make_pixels()), vae))


def test_without_a_control_type_a_control_file_is_not_encoded(vae):
    assert encoders_of(vae).encode(make_clip(make_pixels(seed=1)), torch.randn(4, WIDTH)).cond.channels is None


def test_latents_are_fp32_even_from_a_half_precision_vae():
    vae = tiny_vae().to(torch.bfloat16)
    assert encode_video(to_unit_range(make_pixels(frames=1)), vae).dtype == torch.float32


def test_shorter_texts_are_padded_with_zero_rows():
    samples = [make_encoded(0, tokens=3), make_encoded(1, tokens=7)]
    batch = collate(samples)
    assert batch.latents.shape == (2, 16, 2, 4, 6) and batch.cond.text.shape == (2, 7, WIDTH)
    for i, sample in enumerate(samples):
        assert torch.equal(batch.latents[i], sample.latents)
        assert torch.equal(batch.cond.text[i, : len(sample.cond.text)], sample.cond.text)
    assert batch.cond.text[0, 3:].eq(0).all() and batch.cond.channels is None


def test_padding_a_text_in_a_batch_does_not_change_its_velocity():
    samples = [make_encoded(0, tokens=3), make_encoded(1, tokens=7)]
    predict, timestep = make_predict(tiny_transformer()), torch.tensor([500.0])
    together = predict(collate(samples).latents, timestep.expand(2), collate(samples).cond)
    for i, sample in enumerate(samples):
        alone = predict(collate([sample]).latents, timestep, collate([sample]).cond)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_control_channels_are_stacked_in_order():
    samples = [make_encoded(0, 3, control=True), make_encoded(1, 3, control=True)]
    channels = collate(samples).cond.channels
    assert all(torch.equal(channels[i], sample.cond.channels) for i, sample in enumerate(samples))


def test_samples_without_a_mask_count_everywhere_beside_one_with_a_mask():
    mask = torch.rand(2, 4, 6)
    masked = collate([replace(make_encoded(0, 3), mask=mask), make_encoded(1, 3)]).mask
    assert torch.equal(masked[0], mask) and masked[1].eq(1).all()
    assert collate([make_encoded(0, 3), make_encoded(1, 3)]).mask is None


@pytest.mark.parametrize("first", [True, False])
def test_a_condition_that_only_some_samples_have_is_never_dropped(first):
    with pytest.raises(ValueError, match="only some of the values have channels"):
        collate([make_encoded(0, 3, control=first), make_encoded(1, 3, control=not first)])


@pytest.mark.parametrize(("control", "masked"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_sample_is_made_again_of_its_parts_and_its_text(control, masked):
    sample = replace(make_encoded(0, 3, control), mask=torch.rand(2, 4, 6) if masked else None)
    parts = sample.parts()
    assert parts.keys() == {"latents", *(["channels"] if control else []), *(["mask"] if masked else [])}
    again = Encoded.from_parts(parts, sample.cond.text)
    assert again.latents is sample.latents and again.mask is sample.mask
    assert vars(again.cond) == vars(sample.cond)


def test_a_batch_counts_the_tokens_that_the_transformer_sees():
    batch, seen = collate([make_encoded(0, 3), make_encoded(1, 3)]), []
    model = tiny_transformer()
    model.blocks[0].register_forward_hook(lambda block, args, output: seen.append(output.shape[0] * output.shape[1]))
    make_predict(model)(batch.latents, torch.tensor([1.0, 2.0]), batch.cond)
    assert seen == [batch.tokens((1, 2, 2))] == [2 * 2 * 2 * 3]


def test_a_batch_moves_with_all_it_holds():
    for control in (False, True):
        moved = collate([make_encoded(0, 3, control)]).to(torch.device("meta"))
        tensors = [moved.latents, moved.cond.text, *([moved.cond.channels] if control else [])]
        assert isinstance(moved, Batch) and {tensor.device.type for tensor in tensors} == {"meta"}


def test_injected_noise_is_off_at_0_and_without_control():
    cond = collate([make_encoded(0, 3, control=True)]).cond
    assert inject_noise(cond, 0.0, 16) is cond
    plain = collate([make_encoded(0, 3)]).cond
    assert inject_noise(plain, 0.5, 16) is plain


def test_injected_noise_has_another_amount_for_each_sample_up_to_the_strength():
    torch.manual_seed(0)
    cond = Cond(torch.zeros(64, 1, WIDTH), torch.zeros(64, 16, 2, 8, 8))
    amounts = inject_noise(cond, 0.5, 16).channels.flatten(1).std(dim=1)
    assert amounts.max() < 0.52 and amounts.max() > 0.4
    assert amounts.min() < 0.1 and amounts.mean().item() == pytest.approx(0.25, abs=0.06)


def test_injected_noise_is_added_to_a_copy_of_the_control_alone():
    cond = collate([make_encoded(0, 3, control=True)]).cond
    before = cond.channels.clone()
    noisy = inject_noise(cond, 0.5, 16)
    assert torch.equal(cond.channels, before) and not torch.equal(noisy.channels, before)
    assert noisy.text is cond.text


def test_another_text_stands_for_every_sample_and_the_rest_stays():
    cond = collate([make_encoded(0, 3, control=True), make_encoded(1, 5, control=True)]).cond
    text = torch.randn(4, WIDTH)
    negative = replace_text(cond, text)
    assert all(torch.equal(row, text) for row in negative.text) and len(negative.text) == 2
    assert negative.channels is cond.channels


def test_a_model_without_extra_channels_sees_the_latents_as_they_are():
    model, batch = tiny_transformer(), collate([make_encoded(0, 3)])
    timestep = torch.tensor([500.0])
    expected = model(batch.latents, timestep, batch.cond.text)
    assert torch.equal(make_predict(model)(batch.latents, timestep, batch.cond), expected)


def test_control_channels_follow_the_latents_and_absent_ones_are_zeros():
    model = tiny_transformer()
    widen_patch_embedding(model, 32)
    model.patch_embedding.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    predict, timestep = make_predict(model), torch.tensor([500.0])
    batch = collate([make_encoded(0, 3, control=True)])
    controlled = predict(batch.latents, timestep, batch.cond)
    joined = torch.cat([batch.latents, batch.cond.channels], dim=1)
    assert torch.equal(controlled, model(joined, timestep, batch.cond.text))

    zeros = Cond(batch.cond.text, torch.zeros_like(batch.latents))
    absent = predict(batch.latents, timestep, Cond(batch.cond.text))
    assert torch.equal(absent, predict(batch.latents, timestep, zeros))
    assert not torch.allclose(absent, controlled)


def test_a_control_is_left_out_where_a_model_reads_none():
    predict, timestep = make_predict(tiny_transformer()), torch.tensor([500.0])
    batch = collate([make_encoded(0, 3, control=True)])
    without = predict(batch.latents, timestep, Cond(batch.cond.text))
    assert torch.equal(predict(batch.latents, timestep, batch.cond), without)


@pytest.mark.parametrize("channels", [None, torch.zeros(1, 4, 2, 4, 6), torch.zeros(1, 16, 2, 4, 6)])
def test_given_frames_that_are_lost_on_their_way_are_an_error_and_never_zeros(channels):
    i2v = FAMILIES["wan2.2-i2v-A14B"]
    predict, batch = make_predict(tiny_transformer(tiny_shape(i2v))), collate([make_encoded(0, 3)])
    with pytest.raises(ValueError, match="the model reads 36 input channels, and is given"):
        predict(batch.latents, torch.tensor([500.0]), replace(batch.cond, channels=channels))
