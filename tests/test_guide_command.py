"""The command of VideoX-Fun's guide, for one expert and the other: it trains, resumes, and its pair works elsewhere."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import test_wan_control_lora
import train_wan_lora
from tests.documents import ROOT, commands
from tests.loras import comfy_merge, metadata_of
from tests.tiny import tiny_shape, tiny_transformer, write_model
from utils.adapters.lora_file import delta
from utils.adapters.lora_reader import read_lora
from utils.common.tensor_files import read_tensors
from utils.media.frames import save_image, write_video
from wan.configs import FAMILIES

A14B = FAMILIES["wan2.2-i2v-A14B"]
MODEL = Path("models/Diffusion_Transformer/Wan2.2-I2V-A14B")
DATA = Path("datasets/internal_datasets")
SHORT = (
    "--video_sample_size 64 --image_sample_size 64 --token_sample_size 64 --video_sample_n_frames 9 "
    "--dataloader_num_workers 0 --num_train_epochs 3 --checkpointing_steps 4 --val_samples 0"
).split()
LAST = 12  # four clips in three epochs
SIDES = ("high", "low")


def moving(width: int, height: int, frames: int, seed: int) -> Tensor:
    """A video (F, 3, H, W) uint8 of soft shapes that drift over a background."""
    generator = torch.Generator().manual_seed(seed)
    x, y, time = torch.linspace(0, 1, width), torch.linspace(0, 1, height)[:, None], torch.arange(frames)
    shown = torch.rand(3, generator=generator).view(1, 3, 1, 1) * y.expand(frames, 3, height, width)
    for _ in range(4):
        left, top, across, down, size = torch.rand(5, generator=generator)
        distance = (x - left - across * time.view(-1, 1, 1) / 60) ** 2 + (
            y - top - down * time.view(-1, 1, 1) / 60
        ) ** 2
        colour = torch.rand(3, generator=generator).view(1, 3, 1, 1)
        shown = shown + colour * torch.exp(-distance / (0.01 + 0.05 * size))[:, None]
    return (255 * shown.clamp(0, 1)).to(torch.uint8)


def write_dataset() -> None:
    """Clips of several sizes and rates, with a list as the guide describes it."""
    rows = []
    for seed, (width, height, frames, fps) in enumerate([(160, 96, 40, 16), (96, 160, 60, 30), (128, 96, 48, 24)]):
        path = DATA / "train" / f"clip{seed}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, moving(width, height, frames, seed), fps)
        rows.append({"file_path": f"train/{path.name}", "text": f"soft shapes, number {seed}", "type": "video"})
    save_image(DATA / "train" / "still.png", Image.fromarray(moving(128, 128, 1, 9)[0].permute(1, 2, 0).numpy()))
    rows.append({"file_path": "train/still.png", "text": "soft shapes that stand still", "type": "image"})
    (DATA / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")


def guide(side: str) -> list[str]:
    """The arguments of the guide's command for one expert, made short: of a name given twice the last counts."""
    command = next(each for each in commands(ROOT / "docs" / "videox_fun.md") if "--boundary_type" in each)
    assert '--boundary_type="low"' in command
    _, script, *arguments = shlex.split(command.replace('--boundary_type="low"', f"--boundary_type={side}"))
    assert script == "train_wan_lora.py"
    return [*arguments, *SHORT]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """The checkpoints of both runs, by the side of their expert."""
    desk = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        write_model(MODEL, A14B)
        write_dataset()
        folders = {}
        for side in SIDES:
            train_wan_lora.main(guide(side))
            (folder,) = Path("output_dir_distill").glob("*/checkpoints")
            folders[side] = Path(shutil.move(folder.parent, desk / side)) / "checkpoints"
    return folders


def lora_of(trained: dict[str, Path], side: str) -> Path:
    return trained[side] / f"wan-lora-{LAST:08d}_{side}_noise.safetensors"


@pytest.mark.parametrize("side", SIDES)
def test_a_resumed_run_ends_as_an_unbroken_one(trained, tmp_path, monkeypatch, side):
    desk = trained[side].parents[1]
    monkeypatch.chdir(desk)
    again = Path("output_dir_distill") / trained[side].parent.name
    shutil.copytree(trained[side].parent, again)
    names = [path.name for path in (again / "checkpoints").glob(f"*-{LAST:08d}*")]
    for name in names:
        (again / "checkpoints" / name).unlink()
    train_wan_lora.main([*guide(side), "--resume_from_checkpoint=latest"])
    assert sorted(names) == [f"state-{LAST:08d}.safetensors", lora_of(trained, side).name]
    for name in names:
        (found, said), (expected, there) = (
            read_tensors(again / "checkpoints" / name),
            read_tensors(trained[side] / name),
        )
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found), name
        assert said == there or name.startswith("wan-lora"), name
    shutil.rmtree("output_dir_distill")


@pytest.mark.parametrize("number", [0, 1], ids=SIDES)
def test_comfyui_applies_every_key_at_half_strength_and_the_file_says_how_it_is_sampled(trained, number):
    path = lora_of(trained, SIDES[number])
    said = metadata_of(path)
    assert (said["denoising_steps"], said["shift"]) == ("1000 750 500 250", "5")
    assert (said["rank"], said["alpha"], said["expert"]) == ("64", "32", f"{SIDES[number]}_noise")
    tensors, lora = load_file(path), read_lora(path)
    layers = {name.split(".", 2)[2] for name in lora.pairs}
    assert layers == {f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkv"} | {"ffn.0", "ffn.2"}
    assert {tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")} == {32.0}
    assert all(pair.down.shape[0] == 64 and pair.up.abs().max() > 0 for pair in lora.pairs.values())
    before = tiny_transformer(tiny_shape(A14B), number).state_dict()
    after, left = comfy_merge(before, tensors, strength=1.0)
    assert not left
    for name, weight in after.items():
        pair = lora.pairs.get(name.removesuffix(".weight"))
        change = torch.zeros(()) if pair is None else 0.5 * pair.up.float() @ pair.down.float()
        assert torch.allclose(weight - before[name], change.expand_as(weight), atol=1e-6), name
        assert pair is None or torch.allclose(delta(pair), change, atol=1e-6)


def test_both_files_are_sampled_together_in_their_steps_without_flags(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    desk = trained["high"].parents[1]
    pair = [str(lora_of(trained, side)) for side in SIDES]
    model = ["--pretrained_model_name_or_path", str(desk / MODEL), "--image", str(desk / DATA / "train/still.png")]
    flags = "--prompt shapes --width 64 --height 64 --frames 5".split()
    test_wan_control_lora.main(["--lora_path", *pair, *model, *flags])
    said = capsys.readouterr().out
    assert "4 steps" in said and "lcm" in said and "shift 5" in said, said
