"""Both scripts on models in every layout train the LoRA and sample the video of the official folder, to the bit."""

import re
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import test_wan_control_lora
import train_wan_lora
from tests.checkout import copy_prompts
from tests.families import lora_files, picture_flags, turns
from tests.layouts import KINDS, Model, read_model, write_diffusers, write_parts, write_transformers
from tests.media import image, video
from tests.tiny import TINY_SHAPE, write_model
from utils.common.tensor_files import read_tensors
from wan.checkpoints import TRANSFORMER
from wan.configs import FAMILIES, Family

BASE = replace(TINY_SHAPE, dim=128, ffn_dim=192, num_heads=1, text_len=512)  # what is taken without a config.json
FLAGS = (
    "--base_res 64 --token_limit 40 --num_workers 0 --max_train_steps 2 --learning_rate 1e-3 --lora_rank 2 "
    "--lora_target all-linear --val_samples 1"
).split()
SIZES = "--prompt fox --width 64 --height 64 --frames 5 --steps 2".split()


@dataclass(frozen=True)
class Layout:
    """How a model is given: its transformers as single files of a kind, and whether there is a folder beside them."""

    row: str
    kind: str = ""  # none: a folder as diffusers writes it, and no single file
    folder: bool = False


LAYOUTS = {
    "diffusers": Layout("wan2.1-i2v-14B-480P"),
    "single files": Layout("wan2.1-t2v-1.3B", "bf16"),
    "scaled beside a folder": Layout("wan2.2-ti2v-5B", "fp8-scaled-old", folder=True),
    "two experts": Layout("wan2.2-i2v-A14B", "fp8-scaled-new"),
}


@dataclass(frozen=True)
class Story:
    """A model and how it is given on the command line, and the official folder with the same values."""

    folder: Path
    family: Family
    given: list[str]
    official: Path

    def train(self, name: str, *model: str) -> Path:
        """The folder of a run."""
        places = ["--dataset", str(self.folder / "clips"), "--output_dir", str(self.folder / name)]
        train_wan_lora.main([*FLAGS, *turns(self.family, 1), *places, *model])
        (run,) = (self.folder / name).iterdir()
        return run

    def loras(self, run: Path) -> list[Path]:
        return lora_files(run, self.family, 2 * len(self.family.experts))


def flags_of(places: dict[str, Path]) -> list[str]:
    return [word for name, place in places.items() for word in (f"--{name}", str(place))]


def write_official(folder: Path, model: Model, kind: str) -> Path:
    """The official folder of the values that single files of this kind hold."""
    shutil.copytree(model.folder, folder)
    for expert in model.family.experts:
        state = model.transformers[expert.name]
        values = {name: KINDS[kind].store(name, tensor).values(torch.float32) for name, tensor in state.items()}
        save_file(values, folder / expert.folder / TRANSFORMER)
    return folder


def tell(folder: Path, layout: Layout) -> Story:
    family = FAMILIES[layout.row]
    model = read_model(write_model(folder / "model", family, base=BASE), family)
    if not layout.kind:
        place = write_diffusers(folder / "diffusers", model, shards=2)
        return Story(folder, family, ["--pretrained_model_name_or_path", str(place)], model.folder)
    official = write_official(folder / "official", model, layout.kind)
    places, _ = write_transformers(folder / "single", model, KINDS[layout.kind])
    if layout.folder:
        given = ["--pretrained_model_name_or_path", str(model.folder), *flags_of(places)]
        return Story(folder, family, given, official)
    torch.save({name: tensor.bfloat16() for name, tensor in model.vae.items()}, official / family.vae)
    return Story(folder, family, flags_of(places | write_parts(folder / "single", model)), official)


SLOW = "scaled beside a folder", "two experts"


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.families] * (name in SLOW)) for name in LAYOUTS])
def story(request, tmp_path, monkeypatch) -> Story:
    monkeypatch.chdir(tmp_path)  # where there is no models/
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", copy_prompts(tmp_path / "embeddings"))
    for index, name in enumerate(("train/a", "train/b", "val/c")):
        video(tmp_path / "clips" / f"{name}.mp4", 5 + 4 * index, (64, 64), f"clip {index}")
    image(tmp_path / "picture.png", caption=None, size=(64, 64))
    return tell(tmp_path, LAYOUTS[request.param])


def sampled(patch: pytest.MonkeyPatch, *arguments: object) -> Tensor:
    """The video that the test script would write."""
    written: list[dict[str, Tensor]] = []
    patch.setattr(test_wan_control_lora, "write", lambda folder, name, videos, *_: written.append(videos))
    test_wan_control_lora.main([*map(str, arguments), *SIZES])
    (videos,) = written
    return videos["with the LoRA"]


def test_a_model_trains_and_samples_as_its_official_folder_does(story, capsys, monkeypatch):
    official = ["--pretrained_model_name_or_path", str(story.official)]
    wanted = story.loras(story.train("wanted", *official))
    capsys.readouterr()
    found = story.loras(story.train("found", *story.given))
    said = capsys.readouterr().out
    for ours, theirs in zip(found, wanted, strict=True):
        tensors, others = read_tensors(ours)[0], read_tensors(theirs)[0]
        assert tensors.keys() == others.keys()
        assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)

    # With the command that the run ended with, whose first flag is --lora_path.
    advice = re.search(r"look at it: python test_wan_control_lora.py (.+) --prompt \.\.\.", said)
    command = shlex.split(advice[1].replace(" ...", f" {story.folder / 'picture.png'}"))
    pictures = [story.folder / "picture.png"] * 2
    needed = picture_flags(story.family, *pictures) if story.family.given_as == "channels" else []
    expected = sampled(monkeypatch, "--lora_path", *wanted, *official, *needed)
    assert torch.equal(sampled(monkeypatch, *command), expected)
