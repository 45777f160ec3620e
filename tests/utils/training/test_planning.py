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
from utils.training import fit, planning
from utils.training.calibration import Workload
from utils.training.cards import CARDS
from utils.training.choice import Given, Limits
from utils.training.counting import peak_bytes
from utils.training.fit import given_of
from utils.training.forecast import CONTEXT, DeviceBytes, Forecast, HostBytes, Seconds, Setting
from utils.training.planning import (
    ASSUMED_HOST,
    GIB,
    HOST_MARGIN,
    MARGIN,
    OnGpu,
    PlanOptions,
    budget,
    encoder_bytes,
    encoding_bytes,
    encoding_seconds,
    this_card,
)
from wan.configs import FAMILIES, Family
from wan.modules.vae import WanVAE
from wan.modules.vae2_2 import Wan22VAE

SINGLE, I2V = FAMILIES["wan2.1-t2v-1.3B"], FAMILIES["wan2.1-i2v-14B-480P"]
NOTHING = OnGpu(None, None)
RUN = "--plan --dataset clips --base_res 64 --cache_latents 1"
MODEL = "--pretrained_model_name_or_path model"
GPU = SimpleNamespace(
    is_available=lambda: True,
    get_device_name=lambda: "NVIDIA L40S",
    get_device_properties=lambda *_: SimpleNamespace(total_memory=40e9),
    mem_get_info=lambda: (40e9 - CONTEXT, 40e9),
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

    monkeypatch.setattr(fit, "choose", choose)
    return asked


# ------------------------------------------------------------------------------------------------- the command line


def test_a_model_that_is_there_is_forecast_without_being_loaded(monkeypatch, capsys):
    monkeypatch.setattr(train_wan_lora, "open_session", None)
    before = set(Path().rglob("*"))
    train_wan_lora.main(f"{RUN} {MODEL} --gpu 4090".split())
    said = capsys.readouterr().out
    assert "bf16 weights, checkpointing none; 48 tokens on RTX 4090" in said and "time: a step" in said
    assert "\noptions: --weight_dtype bf16\n" in said
    assert "64 GB of main memory are assumed; nothing of this is measured" in said
    # What was found in the clips is kept for the run that follows, and nothing else is written.
    assert "outputs" not in {path.name for path in Path().iterdir()}
    assert all(".wan_cache" in path.parts for path in set(Path().rglob("*")) - before)


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
        ("--blocks_to_swap 0", Given(streamed=0)),
        ("--layer_offload_fraction 0.3", Given(streamed=1)),
        ("--layer_offload_fraction 0", Given(streamed=0)),
        ("--gradient_checkpointing full", Given(checkpointing="full")),
        ("--compile on", Given(compile=True)),
        ("--compile off", Given()),
    ],
)
def test_what_is_given_is_kept(flags, given, asked):
    train_wan_lora.main(f"{RUN} {MODEL} --gpu 4090 {flags}".split())
    assert asked[3] == given
    opts = parse_options(train_wan_lora.Options, flags.split())
    assert given_of(opts, TINY_SHAPE.num_layers, opts.compile == "on") == given


def test_what_is_given_is_in_the_options_that_are_said(capsys):
    train_wan_lora.main(f"{RUN} {MODEL} --gpu 4090 --weight_dtype int8 --blocks_to_swap 1".split())
    said = capsys.readouterr().out
    assert "int8 weights, 1 of 2 blocks swapped, checkpointing none" in said
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


def test_a_gpu_whose_rates_are_not_known_has_those_of_one_with_similar_memory(monkeypatch):
    monkeypatch.setattr(planning.torch, "cuda", replace_name(GPU, "NVIDIA GeForce RTX 4090 Laptop GPU"))
    name = "NVIDIA GeForce RTX 4090 Laptop GPU, at the rates of an RTX 5090"
    assert this_card() == replace(CARDS["5090"], name=name, memory=40e9)


def test_what_other_programs_have_taken_of_the_gpu_is_left_to_them(monkeypatch):
    monkeypatch.setattr(planning.torch, "cuda", SimpleNamespace(**vars(GPU) | {"mem_get_info": lambda: (30e9, 40e9)}))
    found = budget(PlanOptions(), SINGLE, NOTHING)
    assert found.limits.device == (1 - MARGIN) * (30e9 + CONTEXT) and found.is_here


@pytest.mark.parametrize(("flags", "gib"), [("--vram 8", 8), ("--vram 11.5", 11.5), ("--preset 16gb", 16)])
def test_no_more_than_was_said_is_planned_for(flags, gib):
    opts = parse_options(train_wan_lora.Options, f"--plan --gpu 4090 {flags}".split())
    assert budget(opts, SINGLE, NOTHING).limits.device == (1 - MARGIN) * gib * GIB


def test_more_than_a_card_has_is_refused():
    opts = parse_options(train_wan_lora.Options, "--plan --gpu 4060ti --preset 24gb".split())
    with pytest.raises(UserError, match="--preset 24gb: the GPU has 16.0 GiB"):
        budget(opts, SINGLE, NOTHING)


@pytest.mark.parametrize("vram", ["8gb", "0", "0.5", "-1", "nan", "inf", "1e400", "on", ""])
def test_a_vram_that_is_none_is_refused(vram):
    with pytest.raises(UserError, match="--vram must be auto, off, or at least 1 GiB, not"):
        parse_options(train_wan_lora.Options, ["--vram", vram])


def test_vram_and_preset_are_not_both_given():
    with pytest.raises(UserError, match="--vram and --preset say the same: give one of them"):
        parse_options(train_wan_lora.Options, "--vram 8 --preset 8gb".split())


def test_without_a_gpu_there_is_nothing_to_limit():
    for flags in ("--vram 8", "--preset 8gb"):
        opts = parse_options(train_wan_lora.Options, flags.split())
        with pytest.raises(UserError, match=f"{flags} needs a GPU, and there is none; --plan --gpu 3060 {flags}"):
            opts.limit_memory(torch.device("cpu"))
    for flags in ("", "--vram off"):
        parse_options(train_wan_lora.Options, flags.split()).limit_memory(torch.device("cpu"))


def test_the_allocator_of_a_gpu_is_kept_within_the_limit(monkeypatch):
    shares: list[float] = []
    limited = SimpleNamespace(**vars(GPU) | {"set_per_process_memory_fraction": shares.append})
    monkeypatch.setattr(planning.torch, "cuda", limited)
    for flags in ("", "--vram 8", "--preset 24gb"):
        parse_options(train_wan_lora.Options, flags.split()).limit_memory(torch.device("cuda"))
    assert shares == pytest.approx([(8 * GIB - CONTEXT) / 40e9, (24 * GIB - CONTEXT) / 40e9])
    with pytest.raises(UserError, match="--preset 48gb: the GPU has 37.3 GiB"):
        parse_options(train_wan_lora.Options, ["--preset", "48gb"]).limit_memory(torch.device("cuda"))


def replace_name(gpu: SimpleNamespace, name: str) -> SimpleNamespace:
    return SimpleNamespace(**vars(gpu) | {"get_device_name": lambda: name})


# --------------------------------------------------------------------------------------- what is said, and counted


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
    assert encoder_bytes(FAMILIES[family], torch.float32) == expected > 4e8
    vision = VISION if FAMILIES[family].clip else 0
    assert encoder_bytes(FAMILIES[family], torch.bfloat16) - vision == (expected - vision) / 2


@pytest.mark.parametrize("on_gpu", [NOTHING, OnGpu((64, 64, 5), None)])
def test_encoders_that_stay_on_the_gpu_take_their_share_of_it_and_that_is_said(on_gpu):
    opts = parse_options(train_wan_lora.Options, "--plan --gpu 4090".split())
    found = budget(opts, I2V, on_gpu)
    taken = encoder_bytes(I2V, torch.float32) if on_gpu != NOTHING else 0
    assert found.limits.device == CARDS["4090"].memory * (1 - MARGIN) - taken
    assert found.encoders == taken and found.limits.host == ASSUMED_HOST and not found.is_here
    assert (found.limits.encoding > 0) == (on_gpu != NOTHING)


def test_what_is_encoded_beside_a_step_takes_its_share_all_the_time():
    opts = parse_options(train_wan_lora.Options, "--plan --gpu 4090".split())
    size = (64, 64, 5)
    plain, beside = (budget(opts, SINGLE, OnGpu(size, None, overlaps=overlaps)) for overlaps in (False, True))
    encoding = encoding_bytes(SINGLE, OnGpu(size, None))
    assert plain.limits.device - beside.limits.device == pytest.approx(encoding) and plain.limits.encoding == encoding
    assert beside.encoders - plain.encoders == pytest.approx(encoding) and beside.limits.encoding == 0
    previews = budget(opts, SINGLE, OnGpu(size, size, overlaps=True))
    assert previews.limits.encoding == encoding_bytes(SINGLE, OnGpu(None, size))


def test_a_gpu_that_is_too_small_for_the_encoders_is_refused():
    opts = parse_options(train_wan_lora.Options, "--plan --gpu 4090 --vram 2".split())
    with pytest.raises(UserError, match="2.04 GB of GPU memory are too little for the encoders alone"):
        budget(opts, I2V, OnGpu((64, 64, 5), None))


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3B", pytest.param("wan2.2-ti2v-5B", marks=pytest.mark.slow)])
def test_what_the_vae_takes_while_it_computes_is_that_of_a_real_one(name):
    """Counted with tensors on the CPU, where those of the forecast have no memory."""
    family, size = FAMILIES[name], (32, 32, 9)
    vae = Wan22VAE() if name == "wan2.2-ti2v-5B" else WanVAE()
    video = torch.zeros(1, 3, size[2], size[1], size[0])
    encoded = video.nbytes + peak_bytes(lambda: vae.encode(video))
    latents = torch.zeros(1, *vae.latent_shape(size[2], size[1], size[0]))
    decoded = peak_bytes(lambda: vae.decode(latents))
    assert encoding_bytes(family, OnGpu(size, None)) == encoded > 10 * video.nbytes
    assert encoding_bytes(family, OnGpu(None, size)) == decoded and encoding_bytes(family, NOTHING) == 0
    assert encoding_bytes(family, OnGpu(size, size)) == max(encoded, decoded)
    assert encoding_bytes(family, OnGpu(size, None, videos=3)) == encoded + 2 * video.nbytes
    half, cast = vae.bfloat16(), video.bfloat16()
    taken = video.nbytes + cast.nbytes + peak_bytes(lambda: half.encode(cast))
    assert encoding_bytes(family, OnGpu(size, None, torch.bfloat16)) == pytest.approx(taken, rel=0.02)


def test_the_time_of_encoding_is_that_of_the_products_and_of_what_moves():
    """Counted: 51 TFLOP for 25 frames of 832x480, and 340 GB in fp32."""
    family, card, size = FAMILIES["wan2.1-t2v-1.3B"], CARDS["4090"], (832, 480, 25)
    exact = encoding_seconds(family, size, torch.float32, card)
    assert exact == pytest.approx(51e12 / (card.products / 2) + 340e9 / card.bandwidth, rel=0.01)
    assert 0.45 * exact < encoding_seconds(family, size, torch.bfloat16, card) < 0.55 * exact
    assert encoding_seconds(family, size, torch.float32, CARDS["h200"]) < exact / 2


@pytest.mark.parametrize(
    ("flags", "encoded", "decoded"),
    [
        ("--cache_latents 0", True, False),
        ("--sample_prompts a", False, True),
        ("", False, False),
        ("--cache_latents 0 --vae_dtype bf16", True, False),
        ("--cache_latents 0 --overlap_encoding", True, False),
    ],
)
def test_encoders_stay_where_latents_are_not_cached_or_previews_are_drawn(monkeypatch, flags, encoded, decoded, asked):
    seen: list[OnGpu] = []

    def watched(opts: PlanOptions, family: Family, on_gpu: OnGpu) -> planning.Budget:
        seen.append(on_gpu)
        return budget(opts, family, on_gpu)

    monkeypatch.setattr(train_wan_lora, "budget", watched)
    train_wan_lora.main(f"{RUN} {MODEL} --gpu 4090 {flags}".split())
    size = (64, 64, 9)
    dtype = torch.bfloat16 if "bf16" in flags else torch.float32
    overlaps = "--overlap_encoding" in flags
    assert seen == [OnGpu(size if encoded else None, size if decoded else None, dtype, overlaps)]


# ------------------------------------------------------------------------------------------------- what is planned


@pytest.mark.parametrize(
    ("flags", "planned"), [("", True), ("--vram 8", True), ("--preset 8gb", True), ("--vram off", False)]
)
def test_a_run_on_a_gpu_is_planned_unless_that_is_off(flags, planned):
    opts = parse_options(train_wan_lora.Options, flags.split())
    assert opts.plans_for(torch.device("cuda")) == planned and not opts.plans_for(torch.device("cpu"))


@pytest.mark.parametrize(
    "flags",
    [
        "--plan --benchmark",
        "--plan --vram off",
        "--oom retry --vram off",
        "--benchmark --check_dataset",
        "--benchmark --cache_embeddings",
    ],
)
def test_options_that_contradict_each_other_are_refused(flags):
    with pytest.raises(UserError):
        parse_options(train_wan_lora.Options, flags.split())
