"""The VAE of Wan 2.2 equals that of diffusers, whichever way a video is cut into chunks."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import wan.modules.vae
from tests.manifests import load_manifest
from tests.peers import diffusers_vae22
from tests.tiny import tiny_vae22
from tests.wan.modules.test_vae import random_latents, random_video, relative_error
from wan.configs import FAMILIES
from wan.modules.vae import Past, in_chunks
from wan.modules.vae2_2 import Wan22VAE, patchify, unpatchify

FAMILY = FAMILIES["wan2.2-ti2v-5B"]
STATISTICS = json.loads((Path(__file__).parents[2] / "data" / "vae_latent_stats.json").read_text())["wan2.2"]
SIZE = (32, 48)


@pytest.fixture(scope="module")
def vae() -> Wan22VAE:
    return tiny_vae22(dim=8, decoder_dim=12)


@pytest.fixture(scope="module")
def reference(vae: Wan22VAE):
    return diffusers_vae22(vae)


def cut_small(monkeypatch) -> None:
    """Large videos go through one latent frame at a time: here the small ones too."""
    monkeypatch.setattr(wan.modules.vae, "MAX_PIXELS_AT_ONCE", 1)


@pytest.fixture(params=["frame by frame", "at once"])
def cut(request, monkeypatch) -> None:
    if request.param == "frame by frame":
        cut_small(monkeypatch)


def column(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1)


MEAN, STD = column(STATISTICS["mean"]), column(STATISTICS["std"])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encode_equals_diffusers(cut, vae, reference, frames, batch):
    video = random_video(batch, 3, frames, *SIZE)
    latents = vae.encode(video)
    assert latents.shape == (batch, *vae.latent_shape(frames, *SIZE))
    assert relative_error(latents, (reference.encode(video).latent_dist.mode() - MEAN) / STD) <= 1e-5


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_decode_equals_diffusers(cut, vae, reference, frames, batch):
    latents = random_latents(batch, *vae.latent_shape(frames, *SIZE))
    video = vae.decode(latents)
    assert video.shape == (batch, 3, frames, *SIZE)
    assert relative_error(video, reference.decode(latents * STD + MEAN).sample) <= 1e-5


def test_the_released_vae_has_exactly_the_names_and_shapes_of_its_checkpoint():
    with torch.device("meta"):
        vae = Wan22VAE()
    assert {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()} == load_manifest("wan2.2_vae")
    assert vae.latent_mean.flatten().tolist() == MEAN.flatten().tolist()
    assert vae.latent_std.flatten().tolist() == STD.flatten().tolist()


def test_it_is_the_vae_of_the_5b_model(vae):
    assert (vae.stride, vae.z_dim) == (FAMILY.stride, FAMILY.out_dim) == ((4, 16, 16), 48)
    assert vae.latent_shape(FAMILY.frames, *FAMILY.size[::-1]) == (48, 31, 44, 80)


def test_pixels_are_folded_with_the_rows_fastest_and_unfolded_again():
    video = torch.arange(24).view(1, 3, 1, 2, 4)  # each row of pixels: 0..3 and 4..7, then the same plus 8 per colour
    folded = patchify(video)
    assert folded[0, :, 0, 0, 0].tolist() == [0, 4, 1, 5, 8, 12, 9, 13, 16, 20, 17, 21]
    assert torch.equal(unpatchify(folded), video)


@pytest.mark.parametrize("latent_frames", [1, 2, 3])
def test_neither_latents_nor_frames_depend_on_later_ones(vae, latent_frames, monkeypatch):
    cut_small(monkeypatch)
    frames = 4 * latent_frames - 3
    video, latents = random_video(1, 3, 13, 32, 48), random_latents(1, 48, 4, 2, 3)
    assert torch.equal(vae.encode(video)[:, :, :latent_frames], vae.encode(video[:, :, :frames]))
    assert torch.equal(vae.decode(latents)[:, :, :frames], vae.decode(latents[:, :, :latent_frames]))


def test_every_frame_changes_the_latents_from_its_own_on(vae, monkeypatch):
    cut_small(monkeypatch)
    video = random_video(1, 3, 9, 32, 32)
    latents = vae.encode(video)
    for frame in range(9):
        changed = video.clone()
        changed[:, :, frame] = 0
        differs = (vae.encode(changed) != latents).any(dim=(0, 1, 3, 4)).tolist()
        assert differs == [index >= (frame + 3) // 4 for index in range(3)]


def test_a_video_in_chunks_gives_what_it_gives_at_once(vae, monkeypatch):
    video, latents = random_video(1, 3, 17, 32, 48), random_latents(1, 48, 5, 2, 3)
    whole = vae.encode(video), vae.decode(latents)
    cut_small(monkeypatch)
    for chunked, expected in zip((vae.encode(video), vae.decode(latents)), whole, strict=True):
        assert relative_error(chunked, expected) <= 1e-5


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_what_is_carried_from_chunk_to_chunk_does_not_grow(vae, part):
    chunks = {
        "encoder": patchify(random_video(1, 3, 13, 32, 32)).split([1, 4, 4, 4], dim=2),
        "decoder": random_latents(1, 48, 4, 2, 2).split(1, dim=2),
    }[part]
    layer, carried = getattr(vae, part), []

    def measured(chunk: Tensor, past: Past) -> Tensor:
        output = layer(chunk, past)
        assert all(frames.untyped_storage().nbytes() == frames.nbytes for frames in past.frames.values())
        carried.append(sum(frames.nbytes for frames in past.frames.values()))
        return output

    in_chunks(measured, chunks)
    assert len(set(carried[1:])) == 1


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((1, 3, 4, 32, 32), "4 frames"),
        ((1, 3, 5, 40, 32), "multiples of 16, not 5 frames of 40x32"),
        ((1, 3, 5, 32, 24), "32x24"),
    ],
)
def test_encode_refuses_frame_counts_and_sizes_that_do_not_fit_and_says_which(vae, shape, numbers):
    with pytest.raises(ValueError, match=numbers):
        vae.encode(torch.zeros(shape))


def test_another_number_of_latent_channels_is_refused():
    with pytest.raises(ValueError, match="Wan 2.2 VAE has latent statistics for z_dim 48, not 16"):
        Wan22VAE(z_dim=16)


def test_the_gradient_of_decode_is_its_slope():
    vae = tiny_vae22().double()
    latents = random_latents(1, 48, 3, 2, 2).double().requires_grad_()
    direction = random_latents(1, 48, 3, 2, 2, seed=4).double()
    (gradient,) = torch.autograd.grad(vae.decode(latents).square().sum(), latents)
    ahead, behind = (vae.decode(latents.detach() + step * direction).square().sum() for step in (1e-6, -1e-6))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-6, atol=0)


def test_a_bf16_vae_stays_near_the_fp32_one(vae):
    half = tiny_vae22(dim=8, decoder_dim=12).bfloat16()
    video, latents = random_video(1, 3, 5, 32, 32), random_latents(1, 48, 2, 2, 2)
    assert half.encode(video.bfloat16()).dtype == half.decode(latents.bfloat16()).dtype == torch.bfloat16
    assert relative_error(half.encode(video.bfloat16()).float(), vae.encode(video)) < 0.05
    assert relative_error(half.decode(latents.bfloat16()).float(), vae.decode(latents)) < 0.05


def test_the_small_vae_of_the_tests_has_latents_and_frames_of_scale_about_1():
    vae = tiny_vae22()
    assert 0.5 < vae.encode(random_video(1, 3, 13, 64, 64)).std() < 2
    assert 0.3 < vae.decode(random_latents(1, 48, 4, 4, 4)).std() < 2
