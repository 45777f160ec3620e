"""Whole files of quantised transformers, read to values or held in the codes that they have."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.layouts import KINDS, Stored, stored, write_single
from tests.tiny import FAMILY, TINY_SHAPE, tiny_transformer
from tests.trainees import inputs_of
from utils.adapters.full_model import write_config
from utils.storage.formats import quantise
from utils.storage.load import Store
from utils.storage.weights import Storage, format_of, linear_layers
from wan.checkpoints import TRANSFORMER, build_transformer, cast_to, load_transformer
from wan.checkpoints.transformer import read_config, read_transformer
from wan.modules.model import WanModel

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
BLOCKS = re.compile(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\..*weight")
GROUP = 16  # the tiny model's widths are multiples of it


def to_int8(weight: Tensor, group: int) -> Stored:
    """As ComfyUI writes it: rotated in fp32, and rounded to steps of a 127th of the largest value of a row."""
    if group:
        four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
        weight = weight @ torch.block_diag(*[torch.kron(four, four) / 4] * (weight.shape[1] // group))
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return Stored((weight / scale).round().to(torch.int8), scale)


def write_int8(folder: Path, state: Mapping[str, Tensor], prefix: str, in_header: bool, group: int = GROUP) -> Path:
    """A whole transformer as ComfyUI's int8 files have it, beside its config.json."""
    settings = {"format": "int8_tensorwise"} | ({"convrot": True, "convrot_groupsize": group} if group else {})
    tensors, layers = {}, {}
    for name, tensor in state.items():
        kept = to_int8(tensor, group) if BLOCKS.fullmatch(name) and tensor.ndim == 2 else Stored(tensor)
        tensors[prefix + name], layer = kept.weight, name.removesuffix(".weight")
        if kept.scale is not None:
            tensors[f"{prefix}{layer}.weight_scale"], layers[layer] = kept.scale, settings
            if not in_header:
                text = torch.tensor(list(json.dumps(settings).encode())).byte()
                tensors[f"{prefix}{layer}.comfy_quant"] = text
    assert len(layers) == 20
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if in_header else None
    path = folder / TRANSFORMER
    write_config(folder, TINY_SHAPE, FAMILY)
    save_file(tensors, path, metadata)
    return path


def load(folder: Path, dtype: torch.dtype, storage_format: str | None = None) -> WanModel:
    """The model of a folder: in values, or held in the codes of a format."""
    files = read_transformer(folder / TRANSFORMER, read_config(folder))
    if storage_format is None:
        return load_transformer(files, dtype)
    model = build_transformer(files)
    Store(Storage(CPU, dtype, storage_format)).load(model, files, cast_to)
    return model


@pytest.mark.parametrize("group", [GROUP, 0])
@pytest.mark.parametrize(("prefix", "in_header"), [("", True), ("model.diffusion_model.", False)])
def test_a_whole_int8_file_has_the_values_of_its_model_within_the_error_of_int8(tmp_path, prefix, in_header, group):
    state = tiny_transformer().state_dict()
    write_int8(tmp_path, state, prefix, in_header, group)
    found = load(tmp_path, FP32).state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        error = float((found[name] - tensor).norm() / tensor.norm())
        assert 1e-4 < error < 0.009 if BLOCKS.fullmatch(name) and tensor.ndim == 2 else error == 0, name


@torch.no_grad()
def answer(model: WanModel) -> Tensor:
    return model(*inputs_of(model))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_codes_of_an_int8_file_are_held_as_they_are_and_answer_as_its_values_do(tmp_path, dtype, capsys):
    path = write_int8(tmp_path, tiny_transformer().state_dict(), "", in_header=True)
    held, in_file = load(tmp_path, dtype, "int8"), load_file(path)
    layers = linear_layers(held)
    assert len(layers) == 20
    for name, layer in layers.items():
        assert torch.equal(layer.weight, in_file[f"{name}.weight"])
        assert torch.equal(layer.scale, in_file[f"{name}.weight_scale"]) and layer.mixed_by.shape == (GROUP, GROUP)
    assert torch.equal(answer(held), answer(load(tmp_path, dtype)))
    said = capsys.readouterr().out
    assert "int8: 20 of 26 linear layers are quantised" in said and "20 as the file has them" in said


@pytest.mark.parametrize("kind", ["fp8", "fp8-e5m2", "fp8-scaled-old", "fp8-scaled-new", "fp8-scaled-rows"])
@pytest.mark.parametrize("storage_format", ["fp8", "fp8_scaled"])
def test_the_codes_of_an_fp8_file_are_held_as_they_are_and_answer_as_its_values_do(tmp_path, kind, storage_format):
    kept = stored(tiny_transformer().state_dict(), KINDS[kind].store)
    write_single(tmp_path / TRANSFORMER, kept, KINDS[kind].prefix, KINDS[kind].scales)
    write_config(tmp_path, TINY_SHAPE, FAMILY)
    held = load(tmp_path, BF16, storage_format)
    for name, layer in linear_layers(held).items():
        assert torch.equal(layer.weight.float(), kept[f"{name}.weight"].weight.float())
        assert layer.weight.dtype == kept[f"{name}.weight"].weight.dtype
    assert torch.equal(answer(held), answer(load(tmp_path, BF16)))


def test_blocks_of_columns_with_their_own_scale_are_held_too(tmp_path):
    shape = replace(TINY_SHAPE, dim=64, ffn_dim=128)
    kind = KINDS["fp8-scaled-blocks"]
    kept = stored(tiny_transformer(shape).state_dict(), kind.store)
    write_single(tmp_path / TRANSFORMER, kept, kind.prefix, kind.scales)
    write_config(tmp_path, shape, FAMILY)
    held = load(tmp_path, BF16, "fp8_scaled")
    assert held.blocks[0].ffn[2].scale.shape == (64, 2, 1)
    assert torch.equal(answer(held), answer(load(tmp_path, BF16)))


def test_codes_of_another_format_are_made_of_the_values_of_the_file(tmp_path):
    write_int8(tmp_path, tiny_transformer().state_dict(), "", in_header=True)
    values, held = load(tmp_path, FP32), load(tmp_path, BF16, "fp8_scaled")
    for name, layer in linear_layers(held).items():
        expected = quantise(values.get_submodule(name).weight, format_of(name, "fp8_scaled"))
        assert torch.equal(layer.weight.float(), expected.codes.float()) and torch.equal(layer.scale, expected.scale)
