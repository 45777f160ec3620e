"""--plan says what would fit a GPU, by the command line, with a model and with a release that is not there."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import train_wan_lora
from tests.manifests import load_manifest
from tests.tiny import TINY_SHAPE, write_model
from utils.common.errors import UserError
from utils.common.options import parse_options, run_script
from utils.media.frames import write_video
from utils.training import planning
from utils.training.calibration import Workload
from utils.training.cards import CARDS
from utils.training.choice import Given, Limits
from utils.training.forecast import DeviceBytes, Forecast, HostBytes, Seconds, Setting
from utils.training.planning import (
    ASSUMED_HOST,
    HOST_MARGIN,
    MARGIN,
    encoder_bytes,
    flags_of,
    given_of,
    say_plan,
    this_card,
)
from wan.configs import FAMILIES

I2V = FAMILIES["wan2.1-i2v-14B-480P"]
RUN = "--plan --dataset clips --base_res 64 --cache_latents 1"
MODEL = "--pretrained_model_name_or_path model"
GPU = SimpleNamespace(
    is_available=lambda: True,
    get_device_name=lambda: "NVIDIA L40S",
    get_device_properties=lambda: SimpleNamespace(total_memory=40e9),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two clips, and a model."""
    folder = tmp_path_factory.mktemp("work")
    write_model(folder / "model")
    (folder / "clips").mkdir()
    for seed, name in enumerate(("fox", "owl")):
        video = torch.randint(0, 255, (3, 9, 64, 64), generator=torch.Generator().manual_seed(seed))
        write_video(folder / "clips" / f"{name}.mp4", video.permute(1, 0, 2, 3).to(torch.uint8), 16)
        (folder / "clips" / f"{name}.txt").write_text("a small animal", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def work(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)


def outcome(setting: Setting) -> Forecast:
    """A forecast of nothing in particular."""
    sizes = DeviceBytes(1e9, 0, 2e9, 3e9, 4e9, 5e9), HostBytes(0, 0, 0), Seconds(1, 2, 3)
    return Forecast(Workload(TINY_SHAPE, 100), setting, CARDS["4090"], *sizes)


@pytest.fixture
def asked(monkeypatch) -> list[Any]:
    """What `choose` is asked; it answers that 7 blocks are streamed."""
    asked: list[Any] = []

    def choose(*args: Any) -> Forecast:
        asked[:] = args[:4]
        return outcome(Setting("int8", 7))

    monkeypatch.setattr(planning, "choose", choose)
    return asked


# ------------------------------------------------------------------------------------------------- the command line


def test_a_model_that_is_there_is_forecast_without_being_loaded(monkeypatch, capsys):
    monkeypatch.setattr(train_wan_lora, "open_session", None)
    before = sorted(Path().rglob("*"))
    train_wan_lora.main(f"{RUN} {MODEL} --gpu 4090".split())
    said = capsys.readouterr().out
    assert "bf16 weights, none; 48 tokens on RTX 4090" in said and "time: a step" in said
    assert "\noptions: --weight_dtype bf16\n" in said
    assert "64 GB of main memory are assumed; nothing of this is measured" in said
    assert "outputs" not in {path.name for path in Path().iterdir()} and before == sorted(Path().rglob("*"))


def test_what_is_trained_is_what_is_forecast(asked):
    flags = "--gpu 3090 --batch_size 2 --lora_rank 6 --lora_target all-linear"
    train_wan_lora.main(f"{RUN} {MODEL} {flags}".split())
    work, card, limits, given = asked
    # 3 latent frames of 4 x 4 patches
    assert work == Workload(TINY_SHAPE, 48, 2, 6, ("all-linear",))
    assert card is CARDS["3090"] and given == Given()
    assert limits == Limits(CARDS["3090"].memory * (1 - MARGIN), ASSUMED_HOST)


@pytest.mark.parametrize(
    ("release", "family", "experts"),
    [
        ("Wan-AI/Wan2.1-T2V-14B", "wan2.1-t2v-14B", 1),
        ("Wan-AI/Wan2.2-T2V-A14B", "wan2.2-t2v-A14B", 2),
    ],
)
def test_a_release_that_is_not_there_has_the_shape_of_its_family(release, family, experts, asked, capsys):
    train_wan_lora.main(f"{RUN} --pretrained_model_name_or_path {release} --gpu 4090".split())
    assert (asked[0].shape, asked[0].experts) == (FAMILIES[family].shape, experts)
    assert "options: --weight_dtype int8 --blocks_to_swap 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        ("", Given()),
        ("--weight_dtype nf4", Given(weights="nf4")),
        ("--blocks_to_swap 2", Given(streamed=2)),
        ("--layer_offload_fraction 0.3", Given(streamed=1)),
        ("--gradient_checkpointing full", Given(checkpointing="full")),
        ("--compile on", Given(compile=True)),
        ("--compile off", Given()),
    ],
)
def test_what_is_given_is_kept(flags, given, asked):
    train_wan_lora.main(f"{RUN} {MODEL} --gpu 4090 {flags}".split())
    assert asked[3] == given
    opts = parse_options(train_wan_lora.Options, flags.split())
    assert given_of(opts, opts, TINY_SHAPE.num_layers) == given


def test_what_is_given_is_in_the_options_that_are_said(capsys):
    train_wan_lora.main(f"{RUN} {MODEL} --gpu 4090 --weight_dtype int8 --blocks_to_swap 1".split())
    said = capsys.readouterr().out
    assert "int8 weights, 1 of 2 blocks streamed, none" in said
    assert "\noptions: --weight_dtype int8 --blocks_to_swap 1\n" in said


def test_what_does_not_fit_and_more_blocks_than_there_are_are_errors_of_the_user(monkeypatch, capsys):
    def run(flags: str) -> int:
        return run_script(partial(train_wan_lora.main, f"{RUN} {MODEL} --gpu 4090 {flags}".split()))

    assert run("--blocks_to_swap 3") == 2
    assert "--blocks_to_swap 3: the model has 2 blocks" in capsys.readouterr().err
    monkeypatch.setitem(CARDS, "4090", replace(CARDS["4090"], memory=1e8))
    assert run("--weight_dtype bf16 --gradient_checkpointing full") == 2
    assert "48 tokens do not fit into" in capsys.readouterr().err


def test_a_gpu_without_a_plan_and_one_that_is_not_known_are_refused():
    for flags in ("--gpu 4090", "--plan --gpu 9090"):
        with pytest.raises(UserError, match="gpu"):
            parse_options(train_wan_lora.Options, flags.split())


# ----------------------------------------------------------------------------------------------------- which GPU


def test_without_a_gpu_one_must_be_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_script(partial(train_wan_lora.main, f"{RUN} {MODEL}".split())) == 2
    assert "--plan: this machine has no GPU; name one: --gpu 3060, 3090, " in capsys.readouterr().err


def test_the_gpu_of_this_machine_is_planned_for_by_its_name(monkeypatch, asked, capsys):
    monkeypatch.setattr(planning.torch, "cuda", GPU)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))
    train_wan_lora.main(f"{RUN} {MODEL}".split())
    assert asked[1] == replace(CARDS["l40s"], memory=40e9)  # the rates of its name, and its own memory
    assert asked[2] == Limits(40e9 * (1 - MARGIN), 8e9 * (1 - HOST_MARGIN))
    assert "are assumed" not in capsys.readouterr().out


def test_a_gpu_whose_rates_are_not_known_is_said(monkeypatch):
    monkeypatch.setattr(planning.torch, "cuda", replace_name(GPU, "NVIDIA GeForce RTX 4090 Laptop GPU"))
    with pytest.raises(UserError, match="no rates are known for NVIDIA GeForce RTX 4090 Laptop GPU; name one that is"):
        this_card()


def replace_name(gpu: SimpleNamespace, name: str) -> SimpleNamespace:
    return SimpleNamespace(**vars(gpu) | {"get_device_name": lambda: name})


# --------------------------------------------------------------------------------------- what is said, and counted


@pytest.mark.parametrize(
    ("setting", "flags"),
    [
        (Setting("bf16"), "--weight_dtype bf16"),
        (Setting("nf4", 12, ("none", "full")), "--weight_dtype nf4 --blocks_to_swap 12"),
        (Setting("int8", 0, compile=True), "--weight_dtype int8 --compile on"),
    ],
)
def test_the_options_of_a_setting_leave_what_blocks_keep_to_the_run(setting, flags):
    assert flags_of(outcome(setting)) == flags
    parse_options(train_wan_lora.Options, flags.split())


def size(manifest: str, part: str = "", unread: tuple[str, ...] = ()) -> int:
    """Bytes in fp32 of a part of a released file, without what is not read."""
    shapes = {name: shape for name, shape in load_manifest(manifest).items() if name.startswith(part)}
    return 4 * sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith(unread))


VISION = size("clip_xlm_roberta_vit_h_14", "visual.", ("visual.transformer.31.", "visual.post_norm", "visual.head"))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("wan2.1-t2v-1.3B", size("wan2.1_vae")),
        ("wan2.1-i2v-14B-480P", size("wan2.1_vae") + VISION),
        ("wan2.2-ti2v-5B", size("wan2.2_vae")),
    ],
)
def test_the_encoders_take_what_the_released_ones_do_in_fp32(family, expected):
    assert encoder_bytes(FAMILIES[family]) == expected > 4e8


@pytest.mark.parametrize("keeps_encoders", [True, False])
def test_encoders_that_stay_on_the_gpu_take_their_share_of_it_and_that_is_said(asked, capsys, keeps_encoders):
    opts = parse_options(train_wan_lora.Options, "--plan --gpu 4090".split())
    say_plan(opts, Given(), I2V, Workload(TINY_SHAPE, 100), keeps_encoders)
    taken = encoder_bytes(I2V) if keeps_encoders else 0
    assert asked[2].device == CARDS["4090"].memory * (1 - MARGIN) - taken
    said = capsys.readouterr().out
    assert (f"encoders take {encoder_bytes(I2V) / 1e9:.2f} GB beside that" in said) == keeps_encoders


@pytest.mark.parametrize(("flags", "keeps"), [("--cache_latents 0", True), ("--sample_prompts a", True), ("", False)])
def test_encoders_stay_where_latents_are_not_cached_or_previews_are_drawn(monkeypatch, flags, keeps):
    seen: list[bool] = []
    monkeypatch.setattr(train_wan_lora, "say_plan", lambda *_, keeps_encoders: seen.append(keeps_encoders))
    train_wan_lora.main(f"{RUN} {MODEL} --gpu 4090 {flags}".split())
    assert seen == [keeps]
