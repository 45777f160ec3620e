"""The layout of the VAE's weights: the same latents, and the faster one is chosen."""

import pytest
import torch

from tests.tiny import tiny_vae, tiny_vae22
from utils.encoding import vae_layout
from utils.encoding.vae_layout import CHANNELS_LAST, FORMATS, PLAIN, faster_layout, use_layout
from wan.modules.vae import CausalConv3d, WanVAE


@pytest.fixture(params=["2.1", "2.2"])
def vae(request) -> WanVAE:
    return tiny_vae() if request.param == "2.1" else tiny_vae22()


def test_latents_are_the_same_in_either_layout_and_exactly_those_from_before_when_it_is_put_back(vae):
    video = torch.rand(1, 3, 9, 64, 96) * 2 - 1
    before, decoder = vae.encode(video), [parameter.stride() for parameter in vae.decoder.parameters()]
    use_layout(vae, CHANNELS_LAST)
    assert torch.allclose(vae.encode(video), before, rtol=1e-4, atol=1e-4)
    assert [parameter.stride() for parameter in vae.decoder.parameters()] == decoder
    use_layout(vae, PLAIN)
    assert torch.equal(vae.encode(video), before)


def test_nearly_every_convolution_is_given_what_it_returns(vae):
    use_layout(vae, CHANNELS_LAST)
    seen: list[bool] = []

    def look(module, inputs, output) -> None:
        layout = FORMATS[CHANNELS_LAST][output.dim()]
        seen.append(inputs[0].is_contiguous(memory_format=layout) and output.is_contiguous(memory_format=layout))

    for module in vae.encoder.modules():
        if isinstance(module, CausalConv3d | torch.nn.Conv3d | torch.nn.Conv2d):
            module.register_forward_hook(look)
    vae.encode(torch.rand(1, 3, 9, 64, 96))
    assert sum(seen) / len(seen) > 0.7


@pytest.fixture
def clock(monkeypatch, vae) -> dict[str, float]:
    """How long encoding takes in each layout; what is encoded is in `seen`, by size and layout."""
    times, seen, encode = {PLAIN: 0.02, CHANNELS_LAST: 0.01}, [], vae.encode
    now = 0.0

    def watched(video):
        nonlocal now
        is_last = vae.encoder.conv1.weight.stride()[1] == 1
        now += times[CHANNELS_LAST if is_last else PLAIN]
        seen.append((tuple(video.shape), is_last))
        return encode(video)

    monkeypatch.setattr(vae, "encode", watched)
    monkeypatch.setattr(vae_layout, "_now", lambda device: now)
    times["seen"] = seen
    return times


@pytest.mark.parametrize(
    ("plain", "channels_last", "chosen"), [(0.02, 0.01, CHANNELS_LAST), (0.01, 0.02, PLAIN), (0.01, 0.0095, PLAIN)]
)
def test_the_faster_layout_is_chosen_and_said(vae, clock, capsys, plain, channels_last, chosen):
    clock |= {PLAIN: plain, CHANNELS_LAST: channels_last}
    assert faster_layout(vae, (64, 32, 5)) == chosen
    said = f"layout of the VAE: {chosen}; 5 frames of 64x32 take contiguous {1e3 * plain:.0f} ms, channels_last"
    assert capsys.readouterr().out.startswith(said)
    each = vae_layout.WARMUPS + vae_layout.REPEATS
    assert clock["seen"] == [((1, 3, 5, 32, 64), False), ((1, 3, 5, 32, 64), True)] * each, "in turns"


@pytest.mark.parametrize(("frames", "measured"), [(1, 1), (5, 5), (33, 25)])
def test_no_more_frames_are_measured_than_a_clip_has_nor_than_two_chunks(vae, clock, monkeypatch, frames, measured):
    monkeypatch.setattr(vae, "latent_frames_at_once", lambda pixels: 3 if pixels == 64 * 32 else 1)
    faster_layout(vae, (64, 32, frames))
    assert {shape[2] for shape, _ in clock["seen"]} == {measured}


def test_a_layout_with_other_latents_is_not_taken(vae, clock, monkeypatch, capsys):
    encode = vae.encode
    wrong = {False: 1.0, True: 1.1}
    monkeypatch.setattr(vae, "encode", lambda video: encode(video) * wrong[vae.encoder.conv1.weight.stride()[1] == 1])
    assert faster_layout(vae, (64, 32, 5)) == PLAIN
    assert capsys.readouterr().out == "layout of the VAE: contiguous; in the other one latents differ by 1.0e-01\n"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("memory is full"), RuntimeError("no kernel\nat x")])
def test_where_a_layout_does_not_run_the_plain_one_stays(vae, monkeypatch, capsys, error):
    def encode(video):
        if vae.encoder.conv1.weight.stride()[1] == 1:
            raise error
        return video

    monkeypatch.setattr(vae, "encode", encode)
    assert faster_layout(vae, (64, 32, 5)) == PLAIN
    assert capsys.readouterr().out == f"layout of the VAE: {PLAIN}; {str(error).splitlines()[0]}\n"
