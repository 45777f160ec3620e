"""Figures that the documents compute are those that the code and the lists of released tensors give."""

import math
import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _pytest.mark import ParameterSet

import train_wan_lora
from tests.documents import ROOT, read
from tests.manifests import load_manifest
from tests.tiny import tiny_shape, tiny_transformer
from utils.adapters.lora import add_lora, select_modules
from utils.common.errors import UserError
from utils.common.options import parse_options
from utils.data.buckets import bucket_size, count_tokens, max_frames
from utils.diffusion.flow import unshift_sigma
from utils.encoding.latent_cache import cached_bytes
from utils.encoding.text import HEADROOM
from utils.storage.streaming import SLOTS
from utils.storage.weights import QUANTISED, Storage, linear_layers
from utils.training import room
from utils.training.calibration import Workload
from utils.training.cards import CARDS, Card
from utils.training.choice import Given, Limits, choose
from utils.training.fit import Fit
from utils.training.forecast import Forecast
from utils.training.memory import Memory, prepare
from utils.training.phases import TrainingOptions
from utils.training.planning import ASSUMED_HOST, GIB, MARGIN, OnGpu, encoding_bytes
from wan.configs import FAMILIES, Family, named_family
from wan.modules.model import WanModel, WanShape, is_fp32
from wan.modules.t5 import UMT5Encoder
from wan.text2video import part_at
from wan.utils.fm_solvers import make_solver

README = ROOT / "README.md"
LISTS = {
    "wan2.1-t2v-1.3B": "wan2.1_t2v_1.3b",
    "wan2.1-t2v-14B": "wan2.1_t2v_14b",
    "wan2.1-i2v-14B-480P": "wan2.1_i2v_14b_480p",
    "wan2.1-flf2v-14B-720P": "wan2.1_flf2v_14b_720p",
    "wan2.2-ti2v-5B": "wan2.2_ti2v_5b",
    "wan2.2-t2v-A14B": "wan2.2_t2v_a14b_high_noise",
    "wan2.2-i2v-A14B": "wan2.2_i2v_a14b_high_noise",
}
PAGES = {
    "wan21_t2v": ("wan2.1-t2v-1.3B", "wan2.1-t2v-14B"),
    "wan21_i2v": ("wan2.1-i2v-14B-480P",),
    "wan21_flf2v": ("wan2.1-flf2v-14B-720P",),
    "wan22_ti2v_5b": ("wan2.2-ti2v-5B",),
    "wan22_t2v_a14b": ("wan2.2-t2v-A14B",),
    "wan22_i2v_a14b": ("wan2.2-i2v-A14B",),
}
COLUMNS = ("wan2.1-t2v-1.3B", "wan2.2-ti2v-5B", "wan2.1-t2v-14B", "wan2.1-i2v-14B-480P")  # of the README's tables
TOKENIZER = 21_458_111  # bytes, as the hub lists its files
PAGE_NAMES = pytest.mark.parametrize("page", PAGES)


def row(path: Path, beginning: str) -> list[str]:
    """The cells of the only row of a document's tables that begins so."""
    (line,) = (line for line in read(path).splitlines() if line.startswith(f"| {beginning}"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def in_gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count < 1e11 else f"{count / 1e9:.0f} GB"


@cache
def count(tensors: str) -> int:
    return sum(map(math.prod, load_manifest(tensors).values()))


def stored(name: str) -> int:
    """The bytes of a transformer in GPU memory."""
    tensors = load_manifest(LISTS[name]).items()
    return sum(math.prod(shape) * (4 if is_fp32(tensor) else 2) for tensor, shape in tensors)


def encoders(family: Family) -> int:
    """The bytes of the VAE in fp32, and of the vision encoder where there is one."""
    vae = count("wan2.2_vae" if family.vae == "Wan2.2_VAE.pth" else "wan2.1_vae")
    seen = {name: shape for name, shape in load_manifest("clip_xlm_roberta_vit_h_14").items() if "visual." in name}
    unread = ("visual.transformer.31.", "visual.post_norm", "visual.head")
    vision = sum(math.prod(shape) for name, shape in seen.items() if not name.startswith(unread))
    return 4 * (vae + (vision if family.clip else 0))


def download(name: str) -> int:
    family, clip = FAMILIES[name], count("clip_xlm_roberta_vit_h_14")
    vae = count("wan2.2_vae" if family.vae == "Wan2.2_VAE.pth" else "wan2.1_vae")
    weights = count(LISTS[name]) * len(family.experts) + vae + (clip if family.clip else 0)
    return 4 * weights + 2 * count("t5_umt5_xxl_enc") + TOKENIZER


@cache
def lora(name: str) -> int:
    """The numbers in a LoRA of rank 32 on attention, of one transformer."""
    with torch.device("meta"):
        model = WanModel(FAMILIES[name].shape)
    layers = (model.get_submodule(layer) for layer in select_modules(model, ["attn"]))
    return sum(32 * (layer.in_features + layer.out_features) for layer in layers)


def kept_per_token(shape: WanShape, strategy: str) -> int:
    """The bytes that a fused block in bf16 keeps for each token, without the few of its LoRAs."""
    width, attentions = 2 * shape.dim, 3 if shape.image_dim else 2
    answers = (
        attentions * (width + 4 * shape.num_heads) + (attentions > 2) * width
    )  # two that are summed, and their sum
    products = 4 * width + 2 * shape.ffn_dim  # q, k, v; q; the wide layer
    everything = 3 * (width + 4) + products + answers  # and three normalised streams with their scales
    selective = width + attentions * (width + 4 * shape.num_heads)
    return {"none": everything, "selective": selective, "full": width}[strategy]


def kept(name: str, tokens: int, strategy: str = "full") -> str:
    """What all blocks keep for the backward pass."""
    shape = FAMILIES[name].shape
    return in_gb(kept_per_token(shape, strategy) * tokens * shape.num_layers)


# -------------------------------------------------------------------------------------------------------------- sizes


@PAGE_NAMES
def test_a_page_states_the_sizes_of_its_model(page):
    path, names = ROOT / "docs" / f"{page}.md", PAGES[page]
    experts = len(FAMILIES[names[0]].experts)
    assert row(path, "download")[1:] == [in_gb(download(name)) for name in names]
    weights = row(path, "transformer in GPU" if experts == 1 else "one expert in GPU")
    assert weights[1:] == [in_gb(stored(name)) for name in names]
    assert experts == 1 or row(path, "the other in main memory")[1:] == weights[1:]
    adapter = row(path, "LoRA of rank 32" if experts == 1 else "two LoRAs of rank 32")
    assert adapter[1:] == [in_gb(16 * experts * lora(name)) for name in names]
    checkpointed = row(path, "kept by `--gradient_checkpointing full`")
    tokens = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) tokens", checkpointed[0])]
    assert checkpointed[1:] == ["; ".join(kept(name, number) for number in tokens) for name in names]
    assert row(path, "VAE")[1:] == [in_gb(encoders(FAMILIES[name])) for name in names]


def test_the_readme_states_the_sizes_of_the_models():
    sizes = [1 + (frames - 1) // 4 for frames in (21, 81)]
    assert row(README, "transformer: bf16")[1:] == [in_gb(stored(name)) for name in COLUMNS]
    assert row(README, "VAE and vision")[1:] == [in_gb(encoders(FAMILIES[name])) for name in COLUMNS]
    assert row(README, "LoRA of rank 32")[1:] == [in_gb(16 * lora(name)) for name in COLUMNS]
    for beginning, latent_frames in zip(("kept by all blocks", "the same for 81 frames"), sizes, strict=True):
        tokens = [count_tokens(832, 480, 1, FAMILIES[name].grid) * latent_frames for name in COLUMNS]
        strategies = ("full", "selective", "none")
        cells = ["; ".join(kept(*pair, how) for how in strategies) for pair in zip(COLUMNS, tokens, strict=True)]
        assert row(README, beginning)[1:] == cells
    downloads = [in_gb(download(name)) for name in COLUMNS]
    downloads[2] += f"; {in_gb(download('wan2.2-t2v-A14B'))}"
    assert row(README, "model files to download")[1:] == downloads


@pytest.mark.parametrize("name", COLUMNS)
def test_a_block_keeps_what_the_documents_count(name):
    shape = tiny_shape(FAMILIES[name])
    model = tiny_transformer(shape)
    for parameter, tensor in model.named_parameters():
        tensor.data = tensor.data if is_fp32(parameter) else tensor.data.bfloat16()
    rank, names = 4, select_modules(model, ["attn"])
    prepare(model, Memory(fuse=True, stream=torch.bfloat16), lambda model: add_lora(model, names, rank, rank))
    found = []
    for tokens in (8, 24):
        mod, text = torch.zeros(1, 1, 6, shape.dim), torch.zeros(1, shape.text_len, shape.dim, dtype=torch.bfloat16)
        rotary = torch.zeros(tokens, 1, shape.dim // shape.num_heads // 2, 2)
        image = torch.zeros_like(text) if shape.image_dim else None
        costs = room.kept_per_token(
            model.blocks[0].forward, torch.zeros(1, tokens, shape.dim), mod, rotary, text, image
        )
        found.append({strategy: tokens * cost for strategy, cost in costs.items()})
    few, many = found
    for strategy in ("none", "selective", "full"):
        hidden = 2 * rank * 6 if strategy == "none" else 0  # of the LoRAs on q, k, v, o; q, o
        assert many[strategy] - few[strategy] == 16 * (kept_per_token(shape, strategy) + hidden), strategy


@pytest.mark.parametrize("tokens, beginning", [(9_360, "9,360"), (32_760, "32,760")])
def test_the_page_about_memory_states_what_all_blocks_keep(tokens, beginning):
    for strategy in ("full", "selective", "none"):
        cells = row(ROOT / "docs" / "memory.md", f"{beginning} | `{strategy}`")[2:]
        assert cells == [kept(name, tokens, strategy) for name in COLUMNS]


@cache
def layout(name: str) -> WanModel:
    with torch.device("meta"):
        return WanModel(FAMILIES[name].shape)


def in_blocks(name: str, format: str | None) -> int:
    """The bytes of the weights of the linear layers of all blocks."""
    storage = Storage(torch.device("meta"), torch.bfloat16, format)
    layers = linear_layers(layout(name))
    return sum(size for each, size in storage.sizes(layout(name)).items() if each.removesuffix(".weight") in layers)


@pytest.mark.parametrize("format", ["bf16", *QUANTISED])
def test_the_page_about_memory_states_what_weights_take(format):
    storage = Storage(torch.device("meta"), torch.bfloat16, format if format in QUANTISED else None)
    cells = row(ROOT / "docs" / "memory.md", f"`{format}`")[3:]
    assert cells == [in_gb(sum(storage.sizes(layout(name)).values())) for name in COLUMNS]


def test_the_page_about_memory_states_what_streamed_blocks_take():
    beginnings = ("1.3B | 0", "5B | 0", "14B, one A14B expert | 1", "I2V-14B, FLF2V | 1")
    for name, beginning in zip(COLUMNS, beginnings, strict=True):
        *_, slots, slots8, host, host8 = row(ROOT / "docs" / "memory.md", beginning)
        sizes = [in_blocks(name, format) for format in (None, "int8")]
        assert [host, host8] == [in_gb(size) for size in sizes]
        assert [slots, slots8] == [in_gb(SLOTS * size / FAMILIES[name].shape.num_layers) for size in sizes]


def test_the_page_about_memory_states_how_much_of_an_expert_may_wait_on_disk():
    whole = sum(Storage(torch.device("meta"), torch.bfloat16).sizes(layout("wan2.2-t2v-A14B")).values())
    share = f"{in_blocks('wan2.2-t2v-A14B', None) / whole:.0%}".replace("%", " %")
    assert f"{share} of it in bf16, are in no memory" in read(ROOT / "docs" / "memory.md")


def test_the_page_about_memory_states_what_the_text_encoder_takes():
    with torch.device("meta"):
        encoder = UMT5Encoder()
    page = " ".join(read(ROOT / "docs" / "memory.md").split())
    sizes = (
        in_gb(sum(Storage(torch.device("meta"), torch.bfloat16, format).sizes(encoder, lambda _: False).values()))
        for format in (None, "int8", "nf4")
    )
    assert "{} in bf16, {} in `int8`, {} in `nf4`".format(*sizes) in page


def test_the_readme_states_where_the_text_encoder_fits():
    with torch.device("meta"):
        encoder = UMT5Encoder()
    page = " ".join(read(README).split())
    needed = [
        HEADROOM * sum(Storage(torch.device("meta"), torch.bfloat16, format).sizes(encoder, lambda _: False).values())
        for format in (None, "int8")
    ]
    assert f"on the GPU where {in_gb(needed[0])} are free" in page
    assert f"With `--text_encoder_dtype int8`, {in_gb(needed[1])} are enough" in page


def test_the_page_about_memory_states_the_bits_of_nf4():
    stored = [in_blocks(name, "nf4") for name in COLUMNS]
    counts = [sum(layer.weight.numel() for layer in linear_layers(layout(name)).values()) for name in COLUMNS]
    bits = [8 * size / count for size, count in zip(stored, counts, strict=True)]
    assert row(ROOT / "docs" / "memory.md", "`nf4`")[1] == f"{min(bits):.1f} to {max(bits):.1f}"


def cached(name: str) -> str:
    """What the cache keeps of a clip of 832x480 with 21 and with 81 frames."""
    family, unmasked = FAMILIES[name], SimpleNamespace(mask=None)
    sizes = []
    for frames in (21, 81):
        tokens = count_tokens(832, 480, frames, family.grid)
        window = SimpleNamespace(tokens=tokens, frames=frames, grid=family.grid, source=unmasked)
        sizes.append(f"{cached_bytes([window], family, has_control=False) / 1e6:.1f} MB")
    return "; ".join(sizes)


def test_the_readme_states_the_sizes_of_what_is_written():
    assert row(README, "a LoRA file of rank 32")[1:] == [f"{4 * lora(name) / 1e6:.0f} MB" for name in COLUMNS]
    states = [12 * lora(name) / 1e6 for name in COLUMNS]
    shown = [f"{state:.0f} MB" if state < 1000 else f"{state / 1e3:.2f} GB" for state in states]
    shown[2] += f"; {2 * states[2] / 1e3:.2f} GB"
    assert row(README, "the state to resume from")[1:] == shown
    assert row(README, "a clip's cached latents")[1:] == [cached(name) for name in COLUMNS]
    below = " ".join(read(README).split())
    assert f"I2V-A14B takes {cached('wan2.2-i2v-A14B')}, and one of FLF2V {cached('wan2.1-flf2v-14B-720P')}." in below


def test_the_page_of_the_5b_states_its_tokens():
    page, grid = ROOT / "docs" / "wan22_ti2v_5b.md", FAMILIES["wan2.2-ti2v-5B"].grid
    for base_res in (624, 832, 960):
        width, height = bucket_size(1920, 1080, base_res, grid)
        cells = row(page, f"{width}x{height} (`--base_res {base_res}`")[1:]
        tokens = count_tokens(width, height, 1, grid), count_tokens(width, height, 121, grid)
        assert cells == [f"{tokens[0]}", f"{max_frames(width, height, 10_000, grid)}", f"{tokens[1]:,} tokens"]


# ---------------------------------------------------------------------------------------------------------- forecasts

SMALL_CARD = replace(CARDS["3060"], memory=8 * GIB)
BY_CARD = {"12 GB, RTX 3060": "3060", "16 GB, RTX 4080": "4080", "24 GB, RTX 4090": "4090"}
BY_CARD |= {"48 GB, RTX A6000": "a6000", "80 GB, H100": "h100"}
TRAINED = ("wan2.1-t2v-1.3B", "wan2.2-ti2v-5B", "wan2.1-t2v-14B", "wan2.2-t2v-A14B")  # of the table by card


def foreseen(name: str, frames: int, card: Card, weights: str | None = None) -> Forecast:
    """What `--plan` foresees for clips of 832x480."""
    family = FAMILIES[name]
    tokens = count_tokens(832, 480, frames, family.grid)
    limits = Limits(card.memory * (1 - MARGIN), ASSUMED_HOST)
    work = Workload(family.shape, tokens, experts=len(family.experts))
    return choose(work, card, limits, Given(weights=weights))


def flags_of(found: Forecast) -> str:
    return Fit(None, None, None, found).flags


def forecast_cell(name: str, frames: int, card: Card) -> str:
    try:
        found = foreseen(name, frames, card)
    except UserError as error:
        fewer = re.search(
            r"nf4 weights, 40 of 40 blocks swapped, checkpointing offload\n--token_limit (\d+) would fit", str(error)
        )
        assert fewer
        return f"no; about {int(fewer[1]):,} tokens fit"
    flags = flags_of(found).removeprefix("--weight_dtype bf16").strip()
    host = f" + {found.host.total / 1e9:.1f}" if found.host.total else ""
    return f"{found.device.total / 1e9:.1f}{host} GB" + (f", `{flags}`" if flags else "")


def by_card(name: str, frames: int) -> ParameterSet:
    """Each counts the step of another width and length: one is enough for `make test`."""
    is_quick = (name, frames) == ("wan2.2-ti2v-5B", 21)
    return pytest.param(name, frames, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize("name, frames", [by_card(name, frames) for frames in (21, 81) for name in TRAINED])
def test_the_readme_states_what_is_foreseen_by_card(name, frames):
    heading = f"| 832x480, {frames} frames |"
    table = heading + read(README).split(heading)[1].split("\n\n")[0]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    column, tokens = 1 + TRAINED.index(name), count_tokens(832, 480, frames, FAMILIES[name].grid)
    assert head[column].endswith(f": {tokens:,} tokens")
    cards = {"8 GB, at the rates of an RTX 3060": SMALL_CARD} | {text: CARDS[card] for text, card in BY_CARD.items()}
    assert {cells[0]: cells[column] for cells in rows} == {
        text: forecast_cell(name, frames, card) for text, card in cards.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, card", [(8, SMALL_CARD), *((n, CARDS[c]) for n, c in ((12, "3060"), (16, "4080"), (24, "4090")))]
)
def test_a_recipe_has_the_options_and_sizes_that_are_foreseen(size, card):
    page = read(ROOT / "docs" / "memory.md")
    text, block = re.search(rf"^\*\*{size} GB\*\*(.*?)^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE).groups()
    sizes = re.findall(r"\((\d+\.\d \+ \d+\.\d GB)\)", text)
    lines = block.replace("\\\n", " ").splitlines()
    for stated, line in zip(sizes, lines, strict=True):
        opts = parse_options(train_wan_lora.Options, shlex.split(line)[2:])
        family = named_family(opts.pretrained_model_name_or_path)
        frames = max_frames(832, 480, opts.token_limit, family.grid)
        found = foreseen(family.name, frames, card, weights="int8")
        assert flags_of(found) == f"--weight_dtype {opts.weight_dtype} --blocks_to_swap {opts.blocks_to_swap}"
        assert stated == f"{found.device.total / 1e9:.1f} + {found.host.total / 1e9:.1f} GB"


@pytest.mark.slow
def test_the_activations_of_the_vae_are_those_that_are_counted():
    family, sizes = FAMILIES["wan2.1-t2v-1.3B"], [(832, 480, frames) for frames in (21, 81)]
    encode, decode = (
        [f"{encoding_bytes(family, OnGpu(*pair)) / 1e9:.1f}" for pair in pairs]
        for pairs in ([(size, None) for size in sizes], [(None, size) for size in sizes])
    )
    page = " ".join(read(ROOT / "docs" / "memory.md").split())
    assert (
        f"{' to '.join(encode)} GB to encode 832x480 with the VAE of Wan 2.1, {' to '.join(decode)} GB to dec" in page
    )
    assert f"the VAE takes {encode[0]} to {decode[1]} GB beside the weights" in " ".join(read(README).split())


# ------------------------------------------------------------------------------------------------------------ experts


@pytest.mark.parametrize("name, page", [("wan2.2-t2v-A14B", "wan22_t2v_a14b"), ("wan2.2-i2v-A14B", "wan22_i2v_a14b")])
def test_the_samplers_of_comfyui_change_where_the_experts_do(name, page):
    family = FAMILIES[name]
    timesteps = make_solver("unipc", family.steps, family.shift, torch.device("cpu")).timesteps
    steps = sum(part_at(family.boundaries, timestep[None]) == 0 for timestep in timesteps)
    high, low = row(ROOT / "docs" / f"{page}.md", "KSampler (Advanced)")[1:]
    for cell, guidance in ((high, family.guidance[0]), (low, family.guidance[1])):
        assert f"`steps` {family.steps}, `cfg` {guidance}," in cell
    assert f"`end_at_step` {steps}," in high and f"`start_at_step` {steps}," in low
    assert row(ROOT / "docs" / f"{page}.md", "ModelSamplingSD3")[1:] == [f"`shift` {family.shift}"] * 2


def test_the_page_of_the_experts_states_their_shares_of_the_noise_levels():
    shift, page = TrainingOptions.shift, " ".join(read(ROOT / "docs" / "wan22_t2v_a14b.md").split())
    shares = [1 - unshift_sigma(FAMILIES[name].boundaries[0], shift) for name in ("wan2.2-t2v-A14B", "wan2.2-i2v-A14B")]
    high, low = (f"{100 * share:.0f} %" for share in shares)
    expected = (
        f"With `--shift {shift:g}`, the default, {high} of all levels would be the high expert's for T2V and {low} for"
    )
    assert expected in page
