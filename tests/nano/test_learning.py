"""Training teaches: each mode of the trainer, on the small Wan, by the probe's figures. Minutes each."""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import train_wan_lora
from nano import demo
from nano.demo import MODEL
from nano.probe import adherence
from nano.sampling import SAMPLER, generate, noise_of
from nano.world import FRAMES, SIDE, caption, render, split, write_dataset
from utils.conditioning import encode_video, to_unit_range
from utils.lora import fuse_lora
from utils.lora_files import LoraFile, read_lora
from utils.preprocess import tile
from wan.checkpoints import load_text_encoder, load_transformer, load_vae, text_length

pytestmark = pytest.mark.nano
WITHHELD = split()[1]
COMMON = f"--pretrained_model_name_or_path {MODEL} --base_res 64 --batch_size 4 --num_workers 1 --lr_scheduler linear"


def trained(folder: Path, flags: str) -> LoraFile:
    """A LoRA trained by the command line on 64 clips of the plain world."""
    write_dataset(folder / "clips", 64, seed=1)
    arguments = f"{COMMON} {flags} --val_samples 0 --dataset {folder / 'clips'} --output_dir {folder / 'runs'}"
    train_wan_lora.main(arguments.split())
    return read_lora(max(folder.glob("runs/*/checkpoints/*.safetensors")))


def test_the_demo_teaches_its_style_and_leaves_other_prompts_alone(tmp_path, capsys):
    demo.main(["--output_dir", str(tmp_path), "--samples", "100"])
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])
    print(f"\ndemo: {figures}")
    assert figures["concept_before"] <= 0.05 and figures["concept_after"] >= 0.80
    assert figures["adherence_before"] - figures["adherence_after"] < 0.10


def test_a_control_lora_follows_its_control_video(tmp_path):
    lora = trained(tmp_path, "--control_lora --max_train_steps 300 --learning_rate 1e-3 --lora_rank 16")
    scenes, rng = WITHHELD[:48], random.Random("control")
    model, vae = load_transformer(MODEL, torch.float32), load_vae(MODEL)
    encoder = load_text_encoder(MODEL, text_length(MODEL), torch.float32, "cpu")
    controls = torch.stack([encode_video(tile(to_unit_range(render(scene, rng))), vae) for scene in scenes])
    texts, noise = encoder.encode([""]) * len(scenes), noise_of(range(len(scenes)), FRAMES, SIDE)
    unguided = partial(generate, model, vae, texts, None, noise, sampler=replace(SAMPLER, guidance=1.0))
    free = adherence(unguided(), scenes)
    fuse_lora(model, lora)
    followed = adherence(unguided(channels=controls), scenes)
    print(f"\ncontrol (tile), no prompt, free:     {free}\ncontrol (tile), no prompt, followed: {followed}")
    assert free["all"] <= 0.05
    assert followed["colour"] >= 0.9 and followed["background"] >= 0.9 and followed["motion"] >= 0.8


def test_distilled_guidance_moves_the_unguided_model_toward_the_guided_one(tmp_path):
    weight = SAMPLER.guidance - 1
    (tmp_path / "nothing.txt").write_text(" ")
    lora = trained(tmp_path, f"--distill_cfg {weight} --max_train_steps 200 --learning_rate 1e-3 --lora_rank 16")
    scenes, rng = WITHHELD[:96], random.Random("distilled")
    model, vae = load_transformer(MODEL, torch.float32), load_vae(MODEL)
    encoder = load_text_encoder(MODEL, text_length(MODEL), torch.float32, "cpu")
    texts = encoder.encode([caption(scene, rng) for scene in scenes])
    noise = noise_of(range(len(scenes)), FRAMES, SIDE)
    show = partial(generate, model, vae, texts)
    unguided = replace(SAMPLER, guidance=1.0)
    guided_videos = show(encoder.encode([""])[0], noise)
    plain = show(None, noise, sampler=unguided)
    fuse_lora(model, lora)
    distilled = show(None, noise, sampler=unguided)
    named = {"guided": guided_videos, "unguided": plain, "distilled": distilled}
    figures = {name: adherence(videos, scenes)["all"] for name, videos in named.items()}

    def distance(videos: list[torch.Tensor]) -> float:
        pairs = zip(videos, guided_videos, strict=True)
        return sum((one.float() - other.float()).square().mean().item() for one, other in pairs) / len(videos)

    print(f"\nadherence: {figures}; squared distance to guided: {distance(plain):.0f} -> {distance(distilled):.0f}")
    assert distance(distilled) < 0.6 * distance(plain)
    assert figures["distilled"] > figures["unguided"]
