"""LoRAs of every released Wan, trained and converted, change the weights of ComfyUI and diffusers as they should."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from torch import Tensor

import convert_lora_to_comfy
from tests.adapted import fill
from tests.loras import comfy_merge, metadata_of
from tests.peers import diffusers_transformer
from tests.tiny import initialise
from utils.adapters.attach import AdapterOptions, AdapterPlan
from utils.adapters.lora_file import delta
from utils.adapters.lora_reader import read_lora
from wan.configs import FAMILIES, Family
from wan.modules.model import WanModel, WanShape
from wan.names import diffusers_name


def small(shape: WanShape) -> WanShape:
    """As few parameters as possible, with every layer and the inputs of a released model."""
    image_dim = 8 if shape.image_dim else 0
    return replace(shape, dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=16, freq_dim=8, image_dim=image_dim)


# Releases that differ in width or in how they are sampled have the same LoRA files.
ROWS: dict[tuple[WanShape, int], tuple[str, Family]] = {
    (small(family.shape), len(family.experts)): (name, family) for name, family in FAMILIES.items()
}
every_row = pytest.mark.parametrize(
    "family", [row for _, row in ROWS.values()], ids=[name for name, _ in ROWS.values()]
)


def base(shape: WanShape) -> dict[str, Tensor]:
    model = WanModel(shape)
    initialise(model, seed=0)
    return model.state_dict()


def trained(
    folder: Path,
    family: Family,
    targets: tuple[str, ...] = ("all-linear",),
    control: bool = False,
    alpha: float | None = 3.0,
) -> dict[str, Path]:
    """The files of a run, one for each expert."""
    files = {}
    for seed, expert in enumerate(family.experts):
        opts = AdapterOptions(lora_rank=2, lora_alpha=alpha, lora_target=targets, control_lora=control)
        model = WanModel(small(family.shape)).requires_grad_(False)
        adapter = AdapterPlan(opts).attach(model)
        fill(list(adapter.parameters.values()), seed)
        single = len(family.experts) == 1
        files[expert.name] = folder / f"wan-lora{'' if single else f'_{expert.name}'}-00000100.safetensors"
        adapter.export(files[expert.name], adapter.parameters, {} if single else {"expert": expert.name})
    return files


def convert(*arguments: object) -> None:
    convert_lora_to_comfy.main([str(argument) for argument in arguments])


def converted(folder: Path, files: dict[str, Path], layout: str) -> dict[str, Path]:
    """The files of a run in another layout, converted with one command."""
    convert("--input_lora", folder / "wan-lora-00000100.safetensors", "--to", layout)
    return {expert: file.with_stem(f"{file.stem}_{layout}") for expert, file in files.items()}


def assert_changed(before: dict[str, Tensor], after: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    """Whether exactly these weights have changed, and by this much."""
    assert changes.keys() <= before.keys() == after.keys()
    for name, weight in after.items():
        change = changes.get(name, torch.zeros(()))
        assert (weight - before[name] - change).abs().max() <= 1e-6 * max(1, change.abs().max()), name


@every_row
def test_a_lora_adapts_the_layers_of_a_family_that_read_a_picture(tmp_path, family):
    layers = {name.split(".")[-1] for path in trained(tmp_path, family).values() for name in read_lora(path).pairs}
    others = {"k_img", "v_img", "1", "3"} if family.shape.image_dim else set()
    assert layers == {"q", "k", "v", "o", "0", "2"} | others


@every_row
@pytest.mark.parametrize("control", [False, True])
def test_comfyui_loads_every_key_of_a_familys_lora(tmp_path, family, control):
    files = trained(tmp_path, family, control=control)
    kohya = converted(tmp_path, files, "kohya")
    convert(
        "--input_lora", tmp_path / "wan-lora-00000100_kohya.safetensors", "--output_lora", tmp_path / "a.safetensors"
    )
    before = wide = base(small(family.shape))
    if control:
        unread = torch.zeros(24, family.out_dim, *family.shape.patch_size)
        wide = before | {"patch_embedding.weight": torch.cat([before["patch_embedding.weight"], unread], dim=1)}
    for expert, file in files.items():
        changes = {f"{name}.weight": delta(pair, 0.7) for name, pair in read_lora(file).pairs.items()}
        again = tmp_path / ("a.safetensors" if len(files) == 1 else f"a_{expert}.safetensors")
        for path in (file, kohya[expert], again):
            after, left = comfy_merge(before, load_file(path), strength=0.7)
            assert not left
            assert_changed(wide, after, changes)


@every_row
@pytest.mark.parametrize(
    ("layout", "targets", "alpha"),
    [
        ("comfy", ("all-linear",), None),
        ("comfy", ("attn", "ffn.*"), 3.0),
        ("diffusers", ("all-linear",), 3.0),
    ],
)
def test_diffusers_loads_the_lora_of_each_expert_into_its_transformer(tmp_path, family, layout, targets, alpha):
    files = trained(tmp_path, family, targets, alpha=alpha)
    given = files if layout == "comfy" else converted(tmp_path, files, layout)
    transformers = [diffusers_transformer(small(family.shape)) for _ in files]
    before = [{name: weight.clone() for name, weight in each.state_dict().items()} for each in transformers]
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    second = transformers[1] if len(transformers) == 2 else None
    pipeline = WanPipeline(**parts, transformer=transformers[0], transformer_2=second)
    for number, path in enumerate(given.values()):
        pipeline.load_lora_weights(str(path), load_into_transformer_2=number == 1, adapter_name=f"expert{number}")
    components = ["transformer", "transformer_2"][: len(files)]
    pipeline.fuse_lora(components=components)
    pipeline.unload_lora_weights()
    for file, transformer, old in zip(files.values(), transformers, before, strict=True):
        pairs = {diffusers_name(name): pair for name, pair in read_lora(file).pairs.items()}
        assert_changed(old, transformer.state_dict(), {f"{name}.weight": delta(pair) for name, pair in pairs.items()})


@pytest.mark.parametrize("layout", ["wantraining", "kohya", "diffusers"])
def test_a_file_of_an_expert_says_so_in_every_layout(tmp_path, layout):
    files = trained(tmp_path, FAMILIES["wan2.2-i2v-A14B"])
    for expert, path in converted(tmp_path, files, layout).items():
        assert metadata_of(path)["expert"] == expert and expert in path.name
