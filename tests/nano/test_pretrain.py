import random
from pathlib import Path

import pytest
import torch

from nano import pretrain, pretrain_transformer, pretrain_vae
from nano.pretrain_vae import Pieces
from utils.common.errors import UserError
from wan.checkpoints import load_text_encoder, load_transformer, load_vae, open_model


@pytest.fixture
def brief(tmp_path, monkeypatch) -> Path:
    """A folder where the whole of pretraining takes a few steps."""
    monkeypatch.setattr(pretrain_vae, "LESSONS", (Pieces(1, 1, 32, 2), Pieces(1, 5, 32, 1), Pieces(1, 5, 64, 1)))
    for name, value in {"NUM_TESTED": 1, "NUM_FOLDED": 3}.items():
        monkeypatch.setattr(pretrain_vae, name, value)
    brief = {"PICTURE_STEPS": 1, "CLIP_STEPS": 1, "PICTURE_BATCH": 2, "CLIP_BATCH": 2, "NUM_TESTED": 1}
    for name, value in (brief | {"CLIPS": 6, "RECOLOURED_CLIPS": 2}).items():
        monkeypatch.setattr(pretrain_transformer, name, value)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_command_writes_a_model_that_loads_and_goes_on_where_it_was(brief):
    arguments = ["--model", str(brief / "model"), "--work", str(brief / "states")]
    pretrain.main(arguments)
    first = files(brief / "model")
    written = open_model(brief / "model")
    assert written.family.task == "t2v"
    vae, model = load_vae(written), load_transformer(written.transformer, torch.float32)
    encoder = load_text_encoder(written, torch.float32, "cpu")
    (rows,) = encoder.encode(["a red circle moves left"])
    velocity = model(torch.randn(1, vae.z_dim, 2, 4, 4), torch.tensor([500.0]), rows[None])
    assert velocity.isfinite().all() and velocity.abs().max() > 0

    (brief / "states" / "transformer.pt").unlink()
    pretrain.main(arguments)
    assert files(brief / "model").keys() == first.keys()
    assert all(data == first[name] for name, data in files(brief / "model").items() if name.endswith(".pth"))
    again = load_transformer(open_model(brief / "model").transformer, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_states_of_another_training_are_refused(brief):
    pretrain_vae.train_vae(brief, torch.device("cpu"), seed=0, compiled=False)
    with pytest.raises(UserError, match="vae.pt is damaged, or of another plan"):
        pretrain_vae.train_vae(brief, torch.device("cpu"), seed=1, compiled=False)


def test_small_pieces_are_cut_out_around_an_edge():
    rng = random.Random(0)
    for _ in range(10):
        clips = pretrain_vae.draw(Pieces(1, 17, 32, 4), rng)
        assert clips.shape == (4, 3, 17, 32, 32) and clips.min() >= -1 and clips.max() <= 1
        across = clips.diff(dim=-1).abs().amax(dim=(1, 2, 3, 4))
        assert (across > 2 * pretrain_vae.MIN_EDGE / 255 / 1.01).float().mean() >= 0.5
