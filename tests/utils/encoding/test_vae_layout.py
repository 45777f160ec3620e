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


@pytest.mark.parametrize(
    ("plain", "channels_last", "chosen"), [(0.02, 0.01, CHANNELS_LAST), (0.01, 0.02, PLAIN), (0.01, 0.0099, PLAIN)]
)
def test_the_faster_layout_is_chosen_and_said(vae, monkeypatch, capsys, plain, channels_last, chosen):
    times = {PLAIN: plain, CHANNELS_LAST: channels_last}
    monkeypatch.setattr(vae_layout, "_measure", lambda vae, name, width, height: times[name])
    assert faster_layout(vae, 832, 480) == chosen
    said = f"layout of the VAE: {chosen}; 9 frames of 832x480 take contiguous {1e3 * plain:.0f} ms, channels_last"
    assert capsys.readouterr().out.startswith(said)


def test_both_layouts_are_really_measured(vae, monkeypatch):
    seen, encode = [], vae.encode

    def watched(video):
        seen.append((tuple(video.shape), vae.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)))
        return encode(video)

    monkeypatch.setattr(vae, "encode", watched)
    assert faster_layout(vae, 64, 32) in FORMATS
    each = vae_layout.WARMUPS + vae_layout.REPEATS
    assert [shape for shape, _ in seen] == [(1, 3, 9, 32, 64)] * 2 * each
    strides = {name: vae.encoder.conv1.weight.stride() for name in FORMATS if use_layout(vae, name) is None}
    assert strides[PLAIN] != strides[CHANNELS_LAST]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("memory is full"), RuntimeError("no kernel\nat x")])
def test_where_a_layout_does_not_run_the_plain_one_stays(vae, monkeypatch, capsys, error):
    def measure(vae, name, width, height):
        if name == CHANNELS_LAST:
            raise error
        return 1.0

    monkeypatch.setattr(vae_layout, "_measure", measure)
    assert faster_layout(vae, 64, 32) == PLAIN
    assert capsys.readouterr().out == f"the VAE's layout stays {PLAIN}: {str(error).splitlines()[0]}\n"
