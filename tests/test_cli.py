"""The scripts as a user types them: clips in, a LoRA, a video and a ComfyUI file out.

The real clips are used where they lie beside the repository, and made ones elsewhere.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import convert_lora_to_comfy
import test_wan_control_lora
import train_wan_lora
from tests.checkout import ROOT, run, write_checkout
from tests.peers import diffusers_transformer
from tests.tiny import TINY_SHAPE, write_clips, write_model
from utils.adapters.initial import load_lora
from utils.adapters.lora import add_lora, extract_lora, select_modules
from utils.adapters.lora_file import delta
from utils.adapters.lora_reader import read_lora
from utils.common.options import parse_options
from utils.media.probing import probe
from wan.checkpoints import load_transformer, open_model
from wan.names import diffusers_name

REAL_CLIPS = ROOT.parent / "shared" / "real_clips"
SMALL = "--base_res 96 --token_limit 120 --num_workers 1".split()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A checkout as a user has it: the program, the model under models/, the clips beside it."""
    folder = write_checkout(tmp_path_factory.mktemp("work"))
    write_model(folder / "models" / "Small" / "Wan")
    if REAL_CLIPS.is_dir():
        shutil.copytree(REAL_CLIPS, folder / "clips", copy_function=shutil.copyfile)
        (folder / "clips").chmod(0o755)
    else:
        write_clips(folder / "clips")
    return folder


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (train_wan_lora.Options, "--pretrained_model_name_or_path ~/a --resume_from_checkpoint ~/b"),
        (train_wan_lora.Options, "--sample_prompts x --sample_images ~/a --also_lora ~/b:0.5"),
        (test_wan_control_lora.Options, "--lora x --pretrained_model_name_or_path ~/a --also_lora ~/b"),
    ],
)
def test_texts_that_are_paths_may_begin_with_the_home_folder(options, flags, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, "place")
    assert parse_options(options, flags.split()) == parse_options(options, flags.replace("~", "place").split())


@pytest.fixture(scope="module")
def trained(work) -> Path:
    """The run folder of the main story: cached, trained, validated, written at steps 4 and 6."""
    base = ["--dataset", "clips", "--pretrained_model_name_or_path", "Small/Wan"]
    first = run("train_wan_lora.py", *base, "--cache_embeddings", cwd=work).stdout
    assert re.search(r"text: \d+ to encode", first)
    steps = "--max_train_steps 6 --val_steps 3 --val_samples 1 --checkpointing_steps 4".split()
    choices = "--gradient_accumulation 2 --learning_rate 1e-3".split()
    choices += "--lora_rank 4 --lora_alpha 8 --lora_target all-linear".split()
    result = run("train_wan_lora.py", *base, *SMALL, *steps, *choices, cwd=work)
    assert "text: 0 to encode, 6 cached" in result.stdout
    assert "5 clips in" in result.stdout
    assert result.stderr.count("validation loss") + result.stdout.count("validation loss") == 3
    return next((work / "outputs").glob("*-*-*_*"))


@pytest.fixture(scope="module")
def lora(trained) -> Path:
    return trained / "checkpoints" / "wan-lora-00000006.safetensors"


def test_a_run_leaves_its_options_its_events_and_its_checkpoints(trained):
    assert json.loads((trained / "command_args.json").read_text())["lora_rank"] == 4
    names = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert names == [f"{kind}-0000000{step}.safetensors" for kind in ("state", "wan-lora") for step in (4, 6)]
    assert list(trained.glob("events.out.tfevents.*"))


def test_tensorboard_shows_every_step_and_every_noise_level(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/loss_smooth", "train/grad_norm", "train/learning_rate", "val/loss"} <= tags
    assert {"speed/seconds_per_step", "speed/tokens_per_second", "memory/host_gb"} <= tags
    assert {f"val/loss_sigma_{sigma}" for sigma in (0.1, 0.3, 0.5, 0.7, 0.9)} <= tags
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("val/loss")] == [0, 3, 6]


def test_the_lora_file_has_comfyui_names_explicit_alphas_and_metadata(lora):
    with safe_open(lora, framework="pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    modules = {key.removesuffix(".alpha") for key in keys if key.endswith(".alpha")}
    inner = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k"]
    inner += ["cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2"]
    assert modules == {f"diffusion_model.blocks.{block}.{name}" for block in (0, 1) for name in inner}
    suffixes = (".alpha", ".lora_A.weight", ".lora_B.weight")
    assert keys == {module + suffix for module in modules for suffix in suffixes}
    assert metadata["base_model"] == "Small/Wan"
    assert (metadata["rank"], metadata["alpha"], metadata["steps"], metadata["shift"]) == ("4", "8", "6", "3")
    assert metadata["targets"] == "all-linear" and "options" not in metadata
    assert load_file(lora)["diffusion_model.blocks.0.ffn.0.alpha"].item() == 8


def comfy_delta(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """ComfyUI's rule: alpha / rank where there is an alpha, up @ down, in fp32."""
    down, up = (tensors[f"{module}.lora_{side}.weight"].float() for side in "AB")
    alpha = tensors.get(f"{module}.alpha")
    return (up @ down) * (1.0 if alpha is None else alpha.item() / down.shape[0])


@pytest.fixture(scope="module")
def converted(work, lora) -> Path:
    run("convert_lora_to_comfy.py", "--input_lora", lora, "--output_lora", "comfy.safetensors", cwd=work)
    return work / "comfy.safetensors"


def test_comfyui_applies_the_converted_file_as_it_was_trained(work, lora, converted):
    tensors = load_file(converted)
    model = load_transformer(open_model(work / "models" / "Small" / "Wan").transformer, torch.float32)
    add_lora(model, select_modules(model, ["all-linear"]), rank=4, alpha=8)
    load_lora(model, read_lora(lora))
    for name in select_modules(model, ["all-linear"]):
        layer = model.get_submodule(name)
        ours = layer.get_delta_weight("default")
        theirs = comfy_delta(tensors, "diffusion_model." + name)
        assert ours.abs().max() > 0
        assert (ours - theirs).abs().max() <= 1e-6 * ours.abs().max()
    assert set(extract_lora(model, {}).pairs) == set(read_lora(converted).pairs)


def test_diffusers_applies_the_converted_file_as_it_was_trained(lora, converted):
    transformer = diffusers_transformer(TINY_SHAPE)
    for parameter in transformer.parameters():
        torch.nn.init.zeros_(parameter)  # what is there afterwards is the LoRA alone, without a rounded sum
    pipeline = WanPipeline(**dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler")), transformer=transformer)
    pipeline.load_lora_weights(str(converted))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after, pairs = transformer.state_dict(), read_lora(lora).pairs
    assert len(pairs) == 20
    for name, pair in pairs.items():
        key, change = f"{diffusers_name(name)}.weight", delta(pair)
        assert change.abs().max() > 0
        assert (after.pop(key) - change).abs().max() <= 1e-6 * change.abs().max()
    assert not any(weight.any() for weight in after.values())


def test_generating_writes_an_mp4_at_the_models_rate_and_a_contact_sheet(work, lora):
    sizes = "--width 96 --height 64 --frames 5 --steps 2 --solver lcm".split()
    result = run("test_wan_control_lora.py", "--lora_path", lora, "--prompt", "a cat", "--compare", *sizes, cwd=work)
    assert "without the LoRA | with the LoRA" in result.stdout and "2 steps of lcm" in result.stdout
    video = work / "outputs" / "samples" / "wan-lora-00000006_seed42.mp4"
    info = probe(video)
    assert (info.width, info.height, info.frames, info.fps) == (2 * 96, 64, 5, 16)
    assert video.with_suffix(".png").exists()


def test_a_control_lora_is_trained_converted_and_followed(work, tmp_path, monkeypatch, capsys):
    """In this process: that the scripts run by themselves is tested above."""
    monkeypatch.chdir(work)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", work / "embeddings")
    base = ["--dataset", "clips", "--pretrained_model_name_or_path", str(work / "models/Small/Wan")]
    control = "--control_lora --control_inject_noise 0.5 --max_train_steps 2 --val_samples 1 --distill_cfg 1.0".split()
    control += ["--gradient_checkpointing", "--output_dir", str(tmp_path)]
    train_wan_lora.main([*base, *SMALL, *control])
    assert "guidance 2 distilled" in capsys.readouterr().out
    lora = next(tmp_path.glob("*/checkpoints/wan-lora-*.safetensors"))
    convert_lora_to_comfy.main(["--input_lora", str(lora), "--dtype", "bf16"])
    converted = load_file(lora.with_name(f"{lora.stem}_comfy.safetensors"))
    shape = converted["diffusion_model.patch_embedding.reshape_weight"]
    assert shape.dtype == torch.int64
    assert shape.tolist() == [48, 32, 1, 2, 2]
    assert converted["diffusion_model.patch_embedding.lora_A.weight"].dtype == torch.bfloat16

    sizes = "--width 96 --height 64 --frames 5 --steps 2 --guidance 1 --compare".split()
    clip = next((work / "clips" / "val").glob("*.mp4"))
    follow = ["--lora_path", lora, "--input_video", clip, "--output_dir", tmp_path / "samples"]
    test_wan_control_lora.main([*map(str, follow), *sizes])
    assert "control | without the LoRA | with the LoRA" in capsys.readouterr().out
    assert probe(next((tmp_path / "samples").glob("*.mp4"))).width == 3 * 96
