"""Each training mode has its effect on the small Wan, measured by the probe. Each test takes minutes."""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import train_wan_lora
from nano import demo
from nano.demo import MODEL, newest_lora
from nano.probe import adherence
from nano.sampling import SAMPLER, generate, load, noise_of
from nano.world import caption, render, split, write_dataset
from tests.checkout import copy_prompts
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_file import LoraFile
from utils.adapters.lora_reader import read_lora
from utils.common.device import pick_device
from utils.encoding.conditioning import encode_video, to_unit_range
from utils.encoding.text import EMBEDDINGS, read_prompt
from utils.media.controls import tile
from wan.checkpoints import find_family

pytestmark = pytest.mark.nano
TESTED = split()[1][:100]
UNGUIDED = replace(SAMPLER, guidance=(1.0,))
RANK = "--lora_rank 16"


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A working folder with a copy of the negative prompts, beside which their embeddings are written."""
    monkeypatch.chdir(tmp_path)
    prompts = copy_prompts(tmp_path / "embeddings")
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", prompts)
    return tmp_path


def trained(work: Path, flags: str) -> LoraFile:
    """A LoRA trained with the command line on 64 clips in the world's colours."""
    write_dataset(work / "clips", 64, seed=1)
    common = "--dataset clips --output_dir runs --base_res 64 --batch_size 4 --cache_latents --lr_scheduler linear"
    arguments = ["--pretrained_model_name_or_path", str(MODEL), *common.split(), "--val_samples", "0", *flags.split()]
    train_wan_lora.main(arguments)
    return read_lora(newest_lora(work / "runs"))


def test_the_demo_teaches_its_style_and_does_not_affect_other_prompts(tmp_path, capsys):
    demo.main(["--output_dir", str(tmp_path), "--samples", "100"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    print(f"\ndemo: {figures}")
    assert figures["concept_before"] <= 0.05 and figures["concept_after"] >= 0.80
    assert figures["adherence_before"] - figures["adherence_after"] < 0.10


def test_a_control_lora_follows_its_control_video(work):
    # Captions describe everything that the control shows. Most are dropped, so that the LoRA learns from the control.
    lora = trained(work, f"--control_lora --caption_dropout 0.8 --max_train_steps 500 --learning_rate 2e-3 {RANK}")
    rng = random.Random("control")
    model, vae, encoder = load(MODEL, pick_device())
    controls = [encode_video(tile(to_unit_range(render(scene, rng))), vae) for scene in TESTED]
    show = partial(generate, model, vae, encoder.encode([""]) * len(TESTED), noise_of(vae, range(len(TESTED))))
    free = adherence(show(sampler=UNGUIDED), TESTED)
    fuse_lora(model, lora)
    followed = adherence(show(sampler=UNGUIDED, channels=controls), TESTED)
    print(f"\ncontrol (tile), no prompt, free:     {free}\ncontrol (tile), no prompt, followed: {followed}")
    assert free["all"] <= 0.05
    assert followed["colour"] >= 0.9 and followed["background"] >= 0.9 and followed["motion"] >= 0.8


def test_distilled_guidance_moves_the_unguided_model_toward_the_guided_one(work):
    lora = trained(work, f"--distill_cfg {SAMPLER.guidance[0] - 1} --max_train_steps 400 --learning_rate 2e-3 {RANK}")
    rng = random.Random("distilled")
    model, vae, encoder = load(MODEL, pick_device())
    texts = encoder.encode([caption(scene, rng) for scene in TESTED])
    negative = read_prompt(EMBEDDINGS / find_family(MODEL).negative_prompt)  # the trainer's default
    show = partial(generate, model, vae, texts, noise_of(vae, range(len(TESTED))))
    videos = {"guided": show(encoder.encode([negative])[0]), "unguided": show(sampler=UNGUIDED)}
    fuse_lora(model, lora)
    videos["distilled"] = show(sampler=UNGUIDED)
    figures = {name: adherence(some, TESTED)["all"] for name, some in videos.items()}

    def distance(name: str) -> float:
        pairs = zip(videos[name], videos["guided"], strict=True)
        return sum((one.float() - other.float()).square().mean().item() for one, other in pairs) / len(TESTED)

    before, after = distance("unguided"), distance("distilled")
    print(f"\nadherence: {figures}; squared distance to guided: {before:.0f} -> {after:.0f}")
    assert after < 0.8 * before
    assert figures["distilled"] > 0.9
