import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nano import pretrain, pretrain_transformer, pretrain_vae
from nano.pretrain_vae import Pieces
from tests.tiny import tiny_vae
from utils.common.errors import UserError
from utils.data.loading import Clip
from utils.encoding.conditioning import Encoders
from wan.checkpoints import load_text_encoder, load_transformer, load_vae, open_model
from wan.configs import FAMILIES


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Iterator[Path]:
    """The folder of a finished training, shortened to a few steps of a narrow VAE: model/ and states/."""
    folder = tmp_path_factory.mktemp("pretrained")
    vae = {"WIDTH": 4, "NUM_TESTED": 1, "NUM_FOLDED": 3}
    vae["LESSONS"] = (Pieces(1, 1, 32, 2), Pieces(1, 5, 32, 1), Pieces(1, 5, 64, 1))
    short = replace(pretrain_transformer.FIRST, image_steps=1, clip_steps=1, num_clips=8)
    transformer = {"FIRST": short, "IMAGE_BATCH": 2, "CLIP_BATCH": 2, "NUM_TESTED": 1}
    with pytest.MonkeyPatch.context() as patch:
        for module, values in ((pretrain_vae, vae), (pretrain_transformer, transformer)):
            for name, value in values.items():
                patch.setattr(module, name, value)
        pretrain.main(command(folder))
        yield folder


def command(folder: Path) -> list[str]:
    return ["--model", str(folder / "model"), "--work", str(folder / "states")]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_writes_a_model_that_loads_and_resumes_with_the_same_result(pretrained):
    first = files(pretrained / "model")
    written = open_model(pretrained / "model")
    assert written.family.task == "t2v"
    vae, model = load_vae(written), load_transformer(written.transformer, torch.float32)
    encoder = load_text_encoder(written, torch.float32, "cpu")
    (rows,) = encoder.encode(["a red circle moves left"])
    velocity = model(torch.randn(1, vae.z_dim, 2, 4, 4), torch.tensor([500.0]), rows[None])
    assert velocity.isfinite().all() and velocity.abs().max() > 0

    (pretrained / "states" / "transformer.pt").unlink()
    pretrain.main(command(pretrained))
    assert files(pretrained / "model").keys() == first.keys()
    assert all(data == first[name] for name, data in files(pretrained / "model").items() if name.endswith(".pth"))
    again = load_transformer(open_model(pretrained / "model").transformer, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_the_state_of_another_training_is_refused(pretrained):
    with pytest.raises(UserError, match="vae.pt is damaged, or belongs to another training"):
        pretrain.main([*command(pretrained), "--seed", "1"])


def test_encoded_clips_are_cached_and_a_damaged_cache_is_refused(tmp_path):
    vae, clips = tiny_vae(), pretrain_transformer.training_clips(2)
    encode = partial(pretrain_transformer.encode_clips, tmp_path, vae, clips, FAMILIES["wan2.1-t2v-1.3B"])
    encoded = encode().latents
    (path,) = tmp_path.glob("latents-*.safetensors")
    assert torch.equal(load_file(path)["latents"], encoded) and encode().channels is None
    save_file({"latents": encoded + 1}, path)
    assert torch.equal(encode().latents, encoded + 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"latents-.*\.safetensors is damaged"):
        encode()


def test_a_fifth_of_the_clips_is_in_arbitrary_colours():
    clips = pretrain_transformer.training_clips(3840)
    assert [clip.recoloured for clip in clips] == [False] * 3072 + [True] * 768


def test_a_model_that_is_given_frames_is_shown_them_as_the_trainer_does(tmp_path, monkeypatch):
    monkeypatch.setattr("nano.training.training_dtype", lambda device: torch.float32)  # some CPUs compute in bf16
    family = FAMILIES["wan2.2-i2v-A14B"]
    vae, clips = tiny_vae(), pretrain_transformer.training_clips(2, from_middle=True)
    samples = pretrain_transformer.encode_clips(tmp_path, vae, clips, family)
    pixels = torch.stack([clip.render(random.Random(f"clip {n}")) for n, clip in enumerate(clips)])
    for number, clip in enumerate(pixels):
        text = torch.zeros(1, 4)
        encoded = Encoders(family, vae).encode(Clip(clip, ""), text)
        torch.testing.assert_close(samples.latents[number], encoded.latents, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(samples.channels[number], encoded.cond.channels, rtol=1e-2, atol=1e-2)


def test_small_pieces_are_cropped_around_an_edge():
    rng = random.Random(0)
    for _ in range(10):
        clips = pretrain_vae.draw(Pieces(1, 17, 32, 4), rng)
        assert clips.shape == (4, 3, 17, 32, 32) and clips.min() >= -1 and clips.max() <= 1
        across = clips.diff(dim=-1).abs().amax(dim=(1, 2, 3, 4))
        assert (across > 2 * pretrain_vae.MIN_EDGE / 255 / 1.01).float().mean() >= 0.5
