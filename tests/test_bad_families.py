"""What a family of models cannot do ends in one message and exit code 2, and nothing is written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import test_wan_control_lora
import train_wan_lora
from tests.checkout import copy_prompts
from tests.media import image, video
from tests.tiny import TINY_SHAPE, write_model
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from utils.common.options import run_script
from wan.checkpoints import CheckpointError
from wan.configs import FAMILIES

MODELS = {
    "t2v": "wan2.1-t2v-1.3B",
    "i2v": "wan2.1-i2v-14B-480P",
    "flf2v": "wan2.1-flf2v-14B-720P",
    "experts": "wan2.2-t2v-A14B",
    "i2v-experts": "wan2.2-i2v-A14B",
    "5B": "wan2.2-ti2v-5B",
}
TRAIN = "--dataset clips --base_res 64 --max_train_steps 1 --num_workers 0"
PREVIEW = "--sample_prompts fox --sample_steps 1"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a small model of every kind, a dataset of one clip, and LoRAs."""
    folder = tmp_path_factory.mktemp("families")
    for name, row in MODELS.items():
        write_model(folder / name, FAMILIES[row])
    shutil.copytree(folder / "experts", folder / "half")
    shutil.rmtree(folder / "half" / "low_noise_model")
    shutil.copytree(folder / "5B", folder / "old-vae")
    shutil.copy(folder / "t2v" / "Wan2.1_VAE.pth", folder / "old-vae" / "Wan2.2_VAE.pth")
    shutil.copytree(folder / "old-vae", folder / "no-vae")
    (folder / "no-vae" / "Wan2.2_VAE.pth").rename(folder / "no-vae" / "Wan2.1_VAE.pth")
    shutil.copytree(folder / "i2v", folder / "blind")
    (folder / "blind" / FAMILIES[MODELS["i2v"]].clip).unlink()
    video(folder / "clips" / "fox.mp4")
    image(folder / "clips" / "fox_first.png", caption=None)
    image(folder / "fox.png", caption=None)
    (folder / "loras").mkdir()
    pair = LoraPair(torch.ones(2, TINY_SHAPE.dim), torch.ones(TINY_SHAPE.dim, 2), 2.0)
    for name in ("fox", "fox_high_noise", "fox_low_noise"):
        write_lora(folder / "loras" / f"{name}.safetensors", LoraFile({"blocks.0.self_attn.q": pair}))
    copy_prompts(folder / "embeddings")
    return folder


def ends(main: Callable, arguments: str, work: Path, capsys: pytest.CaptureFixture, monkeypatch) -> str:
    """Runs a script in this process; returns its one message. No file may be new, changed or gone afterwards.

    Only what was found in the clips is kept beside them.
    """
    monkeypatch.chdir(work)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", work / "embeddings")
    before = changes(work)
    code = run_script(lambda: main(arguments.split()), bad_input=(CheckpointError,))
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.startswith("error: ") and "Traceback" not in message
    assert changes(work) == before
    return message


def changes(folder: Path) -> dict[Path, int]:
    """When each file was changed, in nanoseconds."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".wan_cache" not in path.parts)
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("t2v", "--expert high", "--expert high: this model has no experts, leave it out"),
        ("5B", "--boundary_type low", "--expert low: this model has no experts"),
        ("experts", "--expert full", "a model without experts, but this one has two: high, low or both"),
        ("experts", "--high_learning_rate 1e-4 --expert low", "--high_learning_rate would be ignored"),
        ("t2v", "--low_lora_rank 4", "--low_lora_rank would be ignored"),
        ("experts", "--boundary_type high --expert low", "--boundary_type"),
        ("t2v", "--i2v_probability 1", "no effect: this model is given no frames"),
        ("i2v", "--i2v_probability 0", "no effect: this model is always given its frames"),
        ("i2v-experts", "--i2v_probability 0.5", "no effect: this model is always given its frames"),
        ("t2v", "--load_first_frame", "--load_first_frame has no effect: this model is given no frames"),
        ("experts", "--load_first_frame", "--load_first_frame has no effect"),
        ("t2v", f"{PREVIEW} --sample_images fox.png", "not given any frame"),
        ("i2v", f"{PREVIEW} --sample_images nowhere.png", "nowhere.png"),
        ("i2v", f"{PREVIEW} --sample_images fox.png fox.png", "2 entries for 1 prompt"),
        ("i2v", f"{PREVIEW} --sample_images fox.png,fox.png", "has 2 pictures, but this model is given the first"),
        ("flf2v", f"{PREVIEW} --sample_images fox.png", "has 1 picture, but this model is given the first frame and"),
        ("i2v", "--sample_images fox.png", "--sample_images requires --sample_prompts"),
        (
            "5B",
            f"{PREVIEW} --sample_images fox.png --max_frames 1",
            "no effect: in previews of one frame",
        ),
        ("experts", f"{PREVIEW} --sample_guidance 3 4 5", "--sample_guidance has 3 values"),
        ("t2v", "--expert_phase_steps 7", "--expert_phase_steps would be ignored"),
        ("i2v", "--control_lora --control_i2v", "--control_i2v is for models that are given no frames"),
        ("half", "", "low_noise_model"),
        ("no-vae", "", "Wan2.2_VAE.pth is missing"),
        ("old-vae", "", "Wan2.2_VAE.pth is the Wan 2.1 VAE, which has 16 latent channels; the model has 48"),
        ("blind", "", "models_clip_open-clip"),
        ("experts", "--name my_high_lora", "Try --name my_lora"),
        ("experts", "--name flower", "--name 'flower' holds 'low', but this model has two experts"),
        ("experts", "--name flower --check_dataset", "Try --name fl0wer"),
    ],
)
def test_what_a_model_cannot_be_trained_with_is_reported(work, capsys, monkeypatch, model, options, message):
    call = f"{TRAIN} --pretrained_model_name_or_path {model} {options}"
    assert message in ends(train_wan_lora.main, call, work, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("i2v", "--lora_path loras/fox.safetensors", "--image"),
        ("i2v-experts", "--lora_path loras/fox_high_noise.safetensors", "--image"),
        ("flf2v", "--lora_path loras/fox.safetensors --image fox.png", "--last_image"),
        ("i2v", "--lora_path loras/fox.safetensors --image fox.png --last_image fox.png", "--image"),
        ("t2v", "--lora_path loras/fox.safetensors --image fox.png", "this is a text-to-video model"),
        ("t2v", "--lora_path loras/fox.safetensors --last_image fox.png", "--last_image requires --image"),
        ("5B", "--lora_path loras/fox.safetensors --image nowhere.png", "nowhere.png"),
        ("5B", "--lora_path loras/fox.safetensors --width 48 --height 64", "multiples of 32"),
        (
            "experts",
            "--lora_path loras/fox_low_noise.safetensors loras/fox_low_noise.safetensors",
            "are both for the low_noise expert",
        ),
        ("experts", "--lora_path loras/fox.safetensors", "does not say which expert"),
        ("t2v", "--lora_path loras/fox_high_noise.safetensors loras/fox_low_noise.safetensors", "2 LoRAs are given"),
        ("t2v", "--lora_path loras/fox.safetensors --guidance 3 4", "--guidance has 2 values"),
        ("old-vae", "--lora_path loras/fox.safetensors", "Wan2.2_VAE.pth is the Wan 2.1 VAE"),
        ("half", "--lora_path loras/fox_high_noise.safetensors", "low_noise_model"),
    ],
)
def test_what_a_model_cannot_be_sampled_with_is_reported(work, capsys, monkeypatch, model, arguments, message):
    call = f"{arguments} --pretrained_model_name_or_path {model} --prompt fox"
    assert message in ends(test_wan_control_lora.main, call, work, capsys, monkeypatch)
