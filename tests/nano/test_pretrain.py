from pathlib import Path

import pytest
import torch

from nano import pretrain, pretrain_transformer, pretrain_vae
from nano.pretrain_vae import Course, Pieces
from utils.errors import UserError
from wan.checkpoints import load_config, load_text_encoder, load_transformer, load_vae
from wan.modules.vae import WanVAE


@pytest.fixture
def brief(tmp_path, monkeypatch) -> Path:
    """A folder where the whole of pretraining takes a few steps."""
    courses = (
        Course("vae-draft", (Pieces(1, 1, 32, 2), Pieces(1, 5, 32, 1)), 0.5, 0.5, 1e-3, 1e-3),
        Course("vae", (Pieces(1, 5, 32, 1),), 0.0, 0.0, 1e-3, 1e-3),
    )
    monkeypatch.setattr(pretrain_vae, "COURSES", courses)
    monkeypatch.setattr(pretrain_vae, "SHARPENING", Course("vae-decoder", (Pieces(1, 5, 32, 1),), 0.0, 0.0, 1e-3))
    for name, value in {"NUM_TESTED": 1, "NUM_FOLDED": 3}.items():
        monkeypatch.setattr(pretrain_vae, name, value)
    lessons = (
        pretrain_transformer.Course("transformer", 1, 1, 1e-3, 1.0),
        pretrain_transformer.Course("more", 0, 1, 1e-3, 1.0),
    )
    monkeypatch.setattr(pretrain_transformer, "COURSES", lessons)
    for name, value in {"PICTURE_BATCH": 2, "CLIP_BATCH": 2, "CLIPS": 8, "NUM_TESTED": 1}.items():
        monkeypatch.setattr(pretrain_transformer, name, value)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_command_writes_a_model_that_loads_and_goes_on_where_it_was(brief):
    arguments = ["--model", str(brief / "model"), "--work", str(brief / "states")]
    pretrain.main(arguments)
    first = files(brief / "model")
    assert load_config(brief / "model").task == "t2v"
    vae, model = load_vae(brief / "model"), load_transformer(brief / "model", torch.float32)
    encoder = load_text_encoder(brief / "model", model.shape.text_len, torch.float32, "cpu")
    (rows,) = encoder.encode(["a red circle moves left"])
    velocity = model(torch.randn(1, vae.z_dim, 2, 4, 4), torch.tensor([500.0]), rows[None])
    assert velocity.isfinite().all() and velocity.abs().max() > 0

    (brief / "states" / "more.pt").unlink()
    pretrain.main(arguments)
    assert files(brief / "model").keys() == first.keys()
    assert all(data == first[name] for name, data in files(brief / "model").items() if name.endswith(".pth"))
    again = load_transformer(brief / "model", torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_states_of_another_training_are_refused(brief):
    pretrain.main(["--model", str(brief / "model"), "--work", str(brief / "states")])
    with pytest.raises(UserError, match="vae-draft.pt is of another plan"):
        pretrain.main(["--model", str(brief / "model"), "--work", str(brief / "states"), "--seed", "1"])


def test_sharpening_trains_the_decoder_and_leaves_the_latents_alone(brief):
    torch.manual_seed(0)
    vae = pretrain_vae.start(WanVAE(16))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    after = pretrain_vae.sharpen(vae, 0, brief, compiled=False).state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"decoder", "conv2"}
