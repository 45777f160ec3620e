"""What a run needs before a transformer is loaded is opened in an order that finds faults early."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_wan_lora
from tests.checkout import copy_prompts
from tests.chosen import make_lora
from tests.tiny import write_clips, write_model
from utils.adapters.lora_writer import write_lora
from utils.common.decisions import Decisions
from utils.common.errors import UserError
from utils.common.options import parse_options
from utils.data.folders import Rules
from utils.data.plan import make_plan
from utils.runs import inputs as opening
from utils.runs.inputs import Inputs, load_texts, open_data, open_inputs, open_preview
from utils.training.cards import CARDS
from wan.checkpoints import open_model
from wan.configs import FAMILIES

CPU = torch.device("cpu")
COMMAND = "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 100 --cache_latents 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_model(folder / "model")
    write_clips(folder / "clips")
    return folder


@pytest.fixture(autouse=True)
def work(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", Path(copy_prompts(tmp_path / "embeddings")))


def opened(flags: str = "") -> tuple[train_wan_lora.Options, Inputs]:
    opts, files = parse_options(train_wan_lora.Options, f"{COMMAND} {flags}".split()), open_model("model")
    data = open_data(opts, opts.folders(Rules.of(opts), None), files.family)
    plan = make_plan(data.train, opts.limits(files.family.grid), opts.seed, opts.cache_latents)
    return opts, open_inputs(opts, files, CPU, data, plan, Decisions("the CPU"))


def test_samples_and_texts_are_ready():
    opts, inputs = opened("--val_samples 1")
    assert [role.name for role in inputs.roles] == ["transformer"]
    batch = inputs.samples.load_batch(inputs.plan.largest_batch)
    assert batch.latents.shape == (1, 16, 6, 6, 10) and torch.equal(
        inputs.load_batch(inputs.watched[0]).latents, inputs.samples.load_batch(inputs.watched).latents
    )
    assert inputs.texts.negative is None and not inputs.texts.previews
    preview = open_preview(*opened("--sample_prompts fox"), [], seed=3)
    (request,) = preview.requests
    assert request.prompt == "fox" and request.noise.shape == (1, 16, 6, 6, 10) and request.cond.channels is None


@pytest.mark.parametrize(("flags", "dtype"), [("", torch.float32), ("--vae_dtype bf16", torch.bfloat16)])
def test_what_encoding_adds_to_a_step_is_said_where_latents_are_not_cached(flags, dtype, capsys, monkeypatch):
    opts, inputs = opened(flags)
    asked = []
    monkeypatch.setattr(opening, "encoding_seconds", lambda *args: asked.append(args) or 0.25)
    opening.say_encoding(opts, inputs.files.family, inputs.plan, CARDS["4090"])
    assert not asked
    capsys.readouterr()
    opening.say_encoding(replace(opts, cache_latents=0), inputs.files.family, inputs.plan, CARDS["4090"])
    bucket = inputs.plan.largest_batch[0].bucket
    assert asked == [(inputs.files.family, bucket, dtype, CARDS["4090"])]
    said = "encoding its clips adds {} s to such a step: --cache_latents 1 encodes each clip once\n"
    assert capsys.readouterr().out == said.format(0.25)
    beside = replace(opts, cache_latents=0, overlap_encoding=True)
    opening.say_encoding(beside, inputs.files.family, inputs.plan, CARDS["4090"])
    assert capsys.readouterr().out == said.format("up to 0.25")
    both = replace(opts, cache_latents=0, control_lora=True)  # a clip, its given frames, and its control
    opening.say_encoding(both, FAMILIES["wan2.2-i2v-A14B"], inputs.plan, CARDS["4090"])
    assert capsys.readouterr().out == said.format(0.75)


@pytest.mark.parametrize(("flags", "size"), [("", 8.0), ("--optimizer adamw8bit", 2.1)])
def test_the_forecast_is_told_what_the_optimizer_keeps(flags, size):
    opts, inputs = opened(flags)
    assert opening.workload(opts, inputs.files.family, inputs.files.shape, inputs.plan).moment_bytes == size


@pytest.mark.parametrize(("flags", "count"), [("", 1), ("--val_samples 0", 0)])
def test_validation_on_training_clips_is_said_where_there_is_validation(flags, count, capsys):
    said = "no clips are held out in val/: validation is on training clips"
    opened(flags)
    assert said not in capsys.readouterr().out
    opened(f"{flags} --dataset clips/train")
    assert capsys.readouterr().out.count(said) == count


def test_what_does_not_fit_is_found_before_an_encoder_is_loaded(monkeypatch):
    monkeypatch.setattr(opening, "encode_texts", None)  # whoever calls it fails
    with pytest.raises(UserError, match="matches no layer"):
        opened("--lora_target self_attention.q")
    with pytest.raises(UserError, match="gone.safetensors"):
        opened("--sample_prompts fox --also_lora gone.safetensors")


def test_with_cache_only_the_caches_are_filled_and_no_transformer_is_loaded(monkeypatch):
    monkeypatch.setattr(train_wan_lora, "open_session", None)
    monkeypatch.setattr(train_wan_lora.Options, "plans_for", None)  # nor is anything planned
    train_wan_lora.main(f"{COMMAND} --cache_only".split())
    assert list(Path("clips/.wan_cache/latents").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("flags", "negative"),
    [
        ("", False),
        ("--distill_cfg 2", True),
        ("--sample_prompts fox", True),
        ("--sample_prompts fox --sample_guidance 1", False),
    ],
)
def test_a_negative_prompt_is_encoded_where_something_is_guided(flags, negative):
    opts, inputs = opened(flags)
    texts = load_texts(opts, inputs.files, CPU, inputs.data)
    assert (texts.negative is not None) == negative


def test_previews_take_the_steps_of_an_accelerator_beside_them_and_no_negative_prompt(tmp_path, capsys):
    facts = {"denoising_steps": "1000 700 300", "shift": "6"}
    write_lora(tmp_path / "fast.safetensors", replace(make_lora(0.01), metadata=facts))
    flags = f"--sample_prompts fox --also_lora {tmp_path}/fast.safetensors:0.5"
    opts, inputs = opened(flags)
    assert inputs.texts.negative is None
    sampler = open_preview(opts, inputs, [], seed=0).sampler
    assert (sampler.solver, sampler.timesteps, sampler.shift) == ("lcm", (1000, 700, 300), 6)
    said = "previews take 3 steps of lcm, guidance 1, shift 6: {}/fast.safetensors was distilled into 3 steps"
    assert said.format(tmp_path) in capsys.readouterr().out
    opts, inputs = opened(f"{flags} --sample_guidance 3")
    assert inputs.texts.negative is not None and open_preview(opts, inputs, [], seed=0).sampler.guidance == (3,)


def test_the_plan_counts_every_video_that_a_clip_is_encoded_from():
    opts, inputs = opened()
    for changes, family, videos in (
        ({}, "wan2.1-t2v-1.3B", 1),
        ({"control_lora": True}, "wan2.1-t2v-1.3B", 2),
        ({"control_lora": True, "control_i2v": True}, "wan2.1-t2v-1.3B", 3),
        ({"control_lora": True}, "wan2.2-i2v-A14B", 3),
    ):
        asked = opening.encoders_on_gpu(replace(opts, **changes), FAMILIES[family], inputs.plan)
        assert asked.videos == videos
