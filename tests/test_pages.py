"""The commands of the pages in docs/ run, one after another, on small models of the families that they are about.

Flags that make a command short are appended. Where a page names files of a run, those of the last run are put there.
"""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from PIL import Image
from safetensors.torch import load_file, save_file

import convert_lora_to_comfy
import test_wan_control_lora
import train_wan_lora
from nano.text_encoder import write_tokenizer
from tests.checkout import copy_prompts
from tests.documents import ROOT, commands, read, toml_files
from tests.layouts import KINDS, read_model, stored, to_umt5, write_single
from tests.media import image as picture
from tests.media import video
from tests.tiny import TINY_SHAPE, WORDS, tiny_shape, tiny_transformer, write_clips, write_model
from utils.adapters.lora import add_lora, extract_lora, select_modules
from utils.adapters.lora_writer import write_lora
from utils.common.options import parse_options
from utils.media.frames import save_image
from utils.setup import download
from wan.checkpoints import LOCAL_MODELS, TOKENIZER
from wan.configs import FAMILIES, named_family

RUN = re.compile(r"outputs/2026-01-31_12-00-00/checkpoints/[\w-]+-(\d{8})\.safetensors")
SINGLE = re.compile(r"ComfyUI/models/[\w./-]+\.safetensors")
STORED = {"fp8_scaled": "fp8-scaled-old", "fp16": "fp16"}  # by a part of the file's name
SMALL = "--base_res 64 --token_limit 60 --num_workers 0 --val_samples 1 --lr_warmup_steps 0"
# The same by VideoX-Fun's names: a name that is given twice has its last value, two names of an option are an error.
SMALL_SIZES = (
    "--video_sample_size 64 --image_sample_size 64 --token_sample_size 64 --video_sample_n_frames 5 "
    "--dataloader_num_workers 0 --num_train_epochs 5 --val_samples 1"
)
SHORT = "--width 64 --height 64 --frames 5 --steps 1"
FAMILY_PAGES = ("wan21_t2v", "wan21_i2v", "wan21_flf2v", "wan22_ti2v_5b", "wan22_t2v_a14b", "wan22_i2v_a14b")
PAGES = (*FAMILY_PAGES, "models", "memory", "diffusion_pipe", "onetrainer", "videox_fun", "datasets")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch) -> None:
    """A folder with what the pages take for granted. A download writes a small model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", copy_prompts(tmp_path / "embeddings"))
    monkeypatch.setattr(download, "download_model", write_released)
    monkeypatch.setattr(download, "download_tokenizer", lambda: write_tokenizer(LOCAL_MODELS / TOKENIZER, WORDS))
    Path("nano").symlink_to(ROOT / "nano")
    for folder in ("my_clips", "datasets/videos", "fox_clips", "landscapes"):
        write_clips(Path(folder))
    picture(Path("datasets/images/fox.png"))
    for place in ("my_clips/train/a_first.png", "start.png", "end.png"):
        save_image(Path(place), Image.new("RGB", (160, 96), "olive"))
    video(Path("small.mp4"), caption=None)
    listed = [{"file_path": "train/1.mp4", "text": "a clip", "type": "video"}]
    clip = video(Path("datasets/internal_datasets/train/1.mp4"))
    (clip.parents[1] / "metadata.json").write_text(json.dumps(listed), encoding="utf-8")
    Path("prompts.txt").write_text("a red cat\na blue house\n", encoding="utf-8")

    write_foreign_lora(Path("epoch50/adapter_model.safetensors"))


def write_foreign_lora(path: Path) -> None:
    """A LoRA of diffusion-pipe for Wan 2.1 I2V: rank 32, all layers in the blocks, no alpha."""
    model = tiny_transformer(tiny_shape(FAMILIES["wan2.1-i2v-14B-480P"]))
    add_lora(model, select_modules(model, ["attn", "ffn.*"]), rank=32, alpha=32)
    path.parent.mkdir()
    write_lora(path, extract_lora(model, {}))
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.endswith(".alpha")}, path)


def write_single_files(page: str) -> None:
    """Puts small models where a page says that ComfyUI has its files, with what their names say that they hold."""
    places = {Path(match) for match in SINGLE.findall(page)}
    for family in (FAMILIES["wan2.1-t2v-1.3B"], FAMILIES["wan2.2-t2v-A14B"]) if places else ():
        model = read_model(write_model(Path(family.name), family), family)
        for path in places:
            kind = next((kind for word, kind in STORED.items() if word in path.name), "bf16")
            if path.name.startswith(family.name[:6]):
                name = next((name for name in model.transformers if name in path.name), "transformer")
                write_single(path, stored(model.transformers[name], KINDS[kind].store), scales=KINDS[kind].scales)
            elif path.parent.name == "vae":
                write_single(path, stored(model.vae, KINDS["bf16"].store))
            elif path.parent.name == "text_encoders":
                write_single(path, stored(model.text_encoder, KINDS["bf16"].store), name_of=to_umt5)
        shutil.rmtree(model.folder)


def write_released(name: str) -> None:
    """A small model in the place of a release."""
    family, folder = named_family(name), LOCAL_MODELS / name
    if family and not folder.exists():
        write_model(folder, family)


def shortened(arguments: list[str]) -> list[str]:
    """A command line of the trainer, made short; its model is there."""
    opts = parse_options(train_wan_lora.Options, arguments)
    write_released(opts.pretrained_model_name_or_path)
    if opts.video_sample_size:
        return [*arguments, *SMALL_SIZES.split()]
    steps = opts.gen_update_interval if opts.few_step else 2
    lengths = ["--epochs", "1"] if opts.epochs else ["--max_train_steps", str(steps)]
    lengths += ["--high_max_train_steps", "2"] if opts.high_max_train_steps else []
    lengths += ["--sample_steps", "1"] if opts.sample_prompts else []
    lengths += ["--blocks_to_swap", str(TINY_SHAPE.num_layers)] if opts.blocks_to_swap else []
    return [*arguments, *SMALL.split(), *lengths]


def put_results(page: str) -> None:
    """Puts the LoRAs of the newest run where the page says that those of a run are."""
    runs = sorted(Path("outputs").glob("*/checkpoints"), key=lambda folder: folder.stat().st_mtime_ns)
    for target, number in {(Path(match[0]).parent, match[1]) for match in RUN.finditer(page) if runs}:
        target.mkdir(parents=True, exist_ok=True)
        last = max(path.stem[-8:] for path in runs[-1].glob("state-*"))
        for path in runs[-1].glob(f"wan-lora-{last}*.safetensors"):
            shutil.copy(path, target / path.name.replace(last, number))


def run_page(name: str) -> None:
    """Runs every command of a page that is one of the scripts'."""
    path = ROOT / "docs" / f"{name}.md"
    write_single_files(read(path))
    for file, content in toml_files(path).items():
        Path(file).write_text(content, encoding="utf-8")
    for command in commands(path):
        program, script, *arguments = shlex.split(command)
        if script == "train_wan_lora.py":
            train_wan_lora.main(shortened(arguments))
            put_results(read(path))
        elif script == "test_wan_control_lora.py":
            test_wan_control_lora.main([*arguments, *SHORT.split()])
        elif script == "convert_lora_to_comfy.py":
            convert_lora_to_comfy.main(arguments)


def marked(name: str) -> ParameterSet:
    """One page is enough for `make test`."""
    return pytest.param(name, marks=() if name == "wan21_i2v" else pytest.mark.families)


@pytest.mark.parametrize("name", [marked(name) for name in PAGES])
def test_every_command_of_a_page_runs_on_small_models(desk, name):
    run_page(name)


@pytest.mark.parametrize("name", FAMILY_PAGES)
def test_a_page_calls_the_files_of_its_run_by_the_steps_of_all_experts(name):
    path = ROOT / "docs" / f"{name}.md"
    (table,) = map(tomllib.loads, toml_files(path).values())
    family = named_family(table["pretrained_model_name_or_path"])
    steps = table["max_train_steps"] * len(family.experts)
    assert set(RUN.findall(read(path))) == {f"{steps:08d}"}


def test_the_page_of_model_files_has_both_repositories_of_every_release():
    rows = re.findall(
        r"^\| Wan [^|]+ \| `(Wan-AI/[^`]+)` \| `(Wan-AI/[^`]+)` \|$", read(ROOT / "docs/models.md"), re.MULTILINE
    )
    assert all(diffusers.lower() == f"{official}-Diffusers".lower() for official, diffusers in rows)
    assert {official.lower() for official, _ in rows} == {
        f"wan-ai/{name.lower()}" for name in FAMILIES if "fun" not in name
    }
