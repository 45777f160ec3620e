import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import wan.modules.vae
from tests.manifests import load_manifest
from tests.tiny import tiny_vae
from utils.training.counting import count_forward
from wan.modules.vae import Past, RMSNorm, WanVAE, in_chunks

SIZES = [(16, 16), (24, 40)]
DIFFUSERS_NAMES = [
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"coder\.head\.0\.", "coder.norm_out."),
    (r"coder\.head\.2\.", "coder.conv_out."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
]


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return tiny_vae()


@pytest.fixture(params=["frame by frame", "at once"])
def cut(request, monkeypatch) -> str:
    """Large videos go through one latent frame at a time, small ones at once: here the small ones both ways."""
    if request.param == "frame by frame":
        monkeypatch.setattr(wan.modules.vae, "MAX_PIXELS_AT_ONCE", 1)
    return request.param


@pytest.fixture(scope="module")
def reference(vae: WanVAE):
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(base_dim=8)
    model.load_state_dict({diffusers_name(name): tensor for name, tensor in vae.state_dict().items()})
    return model.eval().requires_grad_(False)


def diffusers_name(name: str) -> str:
    """The name in AutoencoderKLWan of a parameter of WanVAE."""
    if upsample := re.match(r"decoder\.upsamples\.(\d+)\.", name):
        stage, part = divmod(int(upsample[1]), 4)
        place = "upsamplers.0" if part == 3 else f"resnets.{part}"
        name = f"decoder.up_blocks.{stage}.{place}.{name[upsample.end() :]}"
    for pattern, replacement in DIFFUSERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def random_video(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_latents(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def statistics(reference) -> tuple[Tensor, Tensor]:
    config = reference.config
    return tuple(torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encode_equals_diffusers(cut, vae, reference, frames, batch, size):
    video = random_video(batch, 3, frames, *size)
    mean, std = statistics(reference)
    expected = (reference.encode(video).latent_dist.mode() - mean) / std
    latents = vae.encode(video)
    assert latents.shape == (batch, 16, (frames - 1) // 4 + 1, size[0] // 8, size[1] // 8)
    assert relative_error(latents, expected) <= 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_decode_equals_diffusers(cut, vae, reference, frames, batch, size):
    latents = random_latents(batch, 16, (frames - 1) // 4 + 1, size[0] // 8, size[1] // 8)
    mean, std = statistics(reference)
    expected = reference.decode(latents * std + mean).sample
    video = vae.decode(latents)
    assert video.shape == (batch, 3, frames, *size)
    assert relative_error(video, expected) <= 1e-5


def test_the_released_vae_has_exactly_the_names_and_shapes_of_its_checkpoint():
    with torch.device("meta"):
        vae = WanVAE()
    assert {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()} == load_manifest("wan2.1_vae")
    assert vae.stride == (4, 8, 8)


@pytest.mark.parametrize("latent_frames", [1, 2, 3])
def test_latents_do_not_depend_on_later_frames(vae, latent_frames, monkeypatch):
    monkeypatch.setattr(wan.modules.vae, "MAX_PIXELS_AT_ONCE", 1)
    video = random_video(1, 3, 13, 16, 24)
    beginning = vae.encode(video[:, :, : 4 * latent_frames - 3])
    assert torch.equal(vae.encode(video)[:, :, :latent_frames], beginning)


def test_a_lone_image_encodes_like_the_first_frame_of_any_video(vae):
    video = random_video(1, 3, 5, 16, 24)
    assert torch.equal(vae.encode(video[:, :, :1]), vae.encode(video)[:, :, :1])


@pytest.mark.parametrize("latent_frames", [1, 2, 3])
def test_frames_do_not_depend_on_later_latents(vae, latent_frames, monkeypatch):
    monkeypatch.setattr(wan.modules.vae, "MAX_PIXELS_AT_ONCE", 1)
    latents = random_latents(1, 16, 4, 2, 3)
    beginning = vae.decode(latents[:, :, :latent_frames])
    assert torch.equal(vae.decode(latents)[:, :, : 4 * latent_frames - 3], beginning)


def test_every_frame_changes_the_latents_from_its_own_on(vae, monkeypatch):
    monkeypatch.setattr(wan.modules.vae, "MAX_PIXELS_AT_ONCE", 1)
    video = random_video(1, 3, 9, 16, 16)
    latents = vae.encode(video)
    for frame in range(9):
        changed = video.clone()
        changed[:, :, frame] = 0
        differs = (vae.encode(changed) != latents).any(dim=(0, 1, 3, 4)).tolist()
        first = (frame + 3) // 4
        assert differs == [index >= first for index in range(3)]


@pytest.mark.parametrize(("pixels", "expected"), [(64 * 64, 97), (8 * 64 * 64, 12), (832 * 480, 1), (1280 * 720, 1)])
def test_no_more_goes_through_at_once_than_one_latent_frame_of_480p(vae, pixels, expected):
    assert vae.latent_frames_at_once(pixels) == expected


def test_passes_over_two_videos_may_interleave(vae):
    video, other = random_video(1, 3, 9, 16, 16), random_video(1, 3, 5, 24, 16, seed=3)

    def interrupted_chunks():
        for chunk in video.split([1, 4, 4], dim=2):
            vae.encode(other)
            yield chunk

    assert torch.equal(in_chunks(vae.encoder, interrupted_chunks()), in_chunks(vae.encoder, video.split([1, 4, 4], 2)))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_what_is_carried_from_chunk_to_chunk_does_not_grow(vae, part):
    chunks = {
        "encoder": random_video(1, 3, 17, 16, 16).split([1, 4, 4, 4, 4], dim=2),
        "decoder": random_latents(1, 16, 5, 2, 2).split(1, dim=2),
    }[part]
    layer, carried = getattr(vae, part), []

    def measured(chunk: Tensor, past: Past) -> Tensor:
        output = layer(chunk, past)
        carried.append(sum(frames.untyped_storage().nbytes() for frames in past.frames.values()))
        assert all(frames.untyped_storage().nbytes() == frames.nbytes for frames in past.frames.values())
        return output

    in_chunks(measured, chunks)
    assert len(set(carried[1:])) == 1


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((1, 3, 80, 16, 16), "80 frames"),
        ((1, 3, 0, 16, 16), "0 frames"),
        ((1, 3, 5, 20, 16), "20x16"),
        ((1, 3, 5, 16, 20), "16x20"),
    ],
)
def test_encode_refuses_frame_counts_and_sizes_that_do_not_fit_and_says_which(vae, shape, numbers):
    with pytest.raises(ValueError, match=numbers):
        vae.encode(torch.zeros(shape))


def test_another_number_of_latent_channels_is_refused():
    with pytest.raises(ValueError, match="z_dim 16, not 48"):
        WanVAE(z_dim=48)


def test_a_vae_built_on_the_meta_device_works_after_its_weights_are_assigned(vae):
    with torch.device("meta"):
        loaded = WanVAE(dim=8)
    loaded.load_state_dict(vae.state_dict(), assign=True)
    loaded.to("cpu")
    video, latents = random_video(1, 3, 1, 16, 16), random_latents(1, 16, 1, 2, 2)
    assert torch.equal(loaded.encode(video), vae.encode(video))
    assert torch.equal(loaded.decode(latents), vae.decode(latents))


def test_decode_clamps_to_the_range_of_pixels(vae):
    video = vae.decode(random_latents(1, 16, 2, 2, 2) * 100)
    assert video.abs().max() == 1


def test_the_gradient_of_decode_is_its_slope():
    vae = tiny_vae().double()
    latents = random_latents(1, 16, 3, 2, 2).double().requires_grad_()
    direction = random_latents(1, 16, 3, 2, 2, seed=4).double()
    (gradient,) = torch.autograd.grad(vae.decode(latents).square().sum(), latents)
    ahead, behind = (vae.decode(latents.detach() + step * direction).square().sum() for step in (1e-6, -1e-6))
    assert gradient.abs().amax(dim=(0, 1, 3, 4)).min() > 0
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-6, atol=0)


def official_norm(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=1) * norm.scale * norm.gamma


def test_the_norm_in_bf16_is_more_exact_than_the_official_one():
    norm = RMSNorm(96, num_axes=2).bfloat16()
    norm.gamma.data = random_video(96, 1, 1).bfloat16()
    x = random_video(2, 96, 32, 32).bfloat16()
    exact = x.double() / x.double().norm(dim=1, keepdim=True) * 96**0.5 * norm.gamma.double()
    ours, theirs = (relative_error(result.double(), exact) for result in (norm(x), official_norm(norm, x)))
    assert ours < 3 * 2**-9 and ours < theirs
    assert norm(torch.zeros_like(x)).eq(0).all()


@pytest.mark.parametrize("decoding", [False, True])
def test_in_bf16_no_more_bytes_are_moved_than_by_the_official_code(monkeypatch, decoding):
    """Counted. Of 25 frames of 832x480 the official encoder moves 253 GB in bf16, and keeps 2.81 GB alive."""
    with torch.device("meta"):
        vae = WanVAE().requires_grad_(False).to("meta", torch.bfloat16)
        video, latents = (torch.empty(1, *size, dtype=torch.bfloat16) for size in ((3, 25, 480, 832), (16, 7, 60, 104)))
        run = (lambda: vae.decode(latents)) if decoding else (lambda: vae.encode(video))
        ours = count_forward(run)
        monkeypatch.setattr(RMSNorm, "forward", official_norm)
        theirs = count_forward(run)
    assert ours.elementwise_bytes < theirs.elementwise_bytes and ours.peak_bytes <= theirs.peak_bytes
    if not decoding:
        assert ours.elementwise_bytes < 253e9 and ours.peak_bytes < 2.82e9


def test_a_bf16_vae_stays_near_the_fp32_one_and_its_statistics_stay_fp32(vae):
    half = tiny_vae()
    for parameter in half.parameters():  # as when they are loaded
        parameter.data = parameter.data.bfloat16()
    video, latents = random_video(1, 3, 5, 16, 16), random_latents(1, 16, 2, 2, 2)
    encoded, decoded = half.encode(video.bfloat16()), half.decode(latents)
    assert encoded.dtype == torch.float32 and decoded.dtype == torch.bfloat16
    assert relative_error(encoded, vae.encode(video)) < 0.05
    assert relative_error(decoded.float(), vae.decode(latents)) < 0.05
