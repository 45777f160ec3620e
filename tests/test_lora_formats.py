"""docs/lora_formats.md says of every kind of file what programs make of it: each cell is measured here.

python -m tests.test_lora_formats writes the table anew.
"""

import json
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora_to_comfy
from tests.documents import ROOT
from tests.lora_kinds import RANK, Kind, make_kinds
from tests.loras import comfy_merge
from tests.tiny import TINY_SHAPE, initialise
from utils.adapters.attach import AdapterOptions, plan_adapter
from utils.adapters.fitting import fitting
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_reader import read_experts, read_lora
from utils.common.errors import UserError
from wan.modules.model import WanModel
from wan.names import diffusers_name

PAGE = ROOT / "docs" / "lora_formats.md"
Weights = dict[str, Tensor]


def tiny() -> WanModel:
    model = WanModel(TINY_SHAPE)
    initialise(model, seed=0)
    return model.eval().requires_grad_(False)


KINDS = make_kinds(tiny())


def save(kind: Kind, folder: Path) -> Path:
    """The file of a kind, or its folder."""
    path = folder / "lora.safetensors" if kind.config is None else folder / "lora" / "adapter_model.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(dict(kind.tensors), path, metadata=dict(kind.metadata) or None)
    if kind.config is None:
        return path
    (path.parent / "adapter_config.json").write_text(json.dumps(kind.config))
    return path.parent


def meant(path: Path) -> Weights:
    """The weights that this file means by our own reader; of two experts, those of high noise."""
    model, lora = tiny(), next(iter(read_experts(path).values()))
    fuse_lora(model, lora)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def compared(found: Weights, wanted: Weights) -> str:
    """Whether all weights are as wanted, or some and the others as without a LoRA, or none."""
    before = dict(tiny().named_parameters())
    changed = [name for name, weight in wanted.items() if not torch.equal(weight, before[name])]
    right = [found[name].shape == wanted[name].shape and close(found[name], wanted[name]) for name in changed]
    return "yes" if all(right) else "in part" if any(right) else "no"


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5)


def by_comfyui(path: Path, wanted: Weights) -> str:
    tensors = load_file(path / "adapter_model.safetensors" if path.is_dir() else path)
    weights = dict(tiny().state_dict())
    if "lora_unet__blocks_0_cross_attn_k.lora_down.weight" in tensors:  # by which ComfyUI knows VideoX-Fun's files
        tensors = {key.replace("lora_unet__", "lora_unet_"): tensor for key, tensor in tensors.items()}
    wide = "diffusion_model.patch_embedding.diff"
    if wide in tensors and tensors[wide].shape != weights["patch_embedding.weight"].shape:
        del tensors[wide]  # ComfyUI logs a mismatch of shapes and skips it
    merged, _ = comfy_merge(weights, tensors, strength=1.0)
    return compared(merged, wanted)


def by_diffusers(path: Path, wanted: Weights) -> str:
    shape, model = TINY_SHAPE, tiny()
    transformer = WanTransformer3DModel(
        patch_size=shape.patch_size, num_attention_heads=shape.num_heads, num_layers=shape.num_layers,
        attention_head_dim=shape.dim // shape.num_heads, in_channels=shape.in_dim, out_channels=shape.out_dim,
        text_dim=shape.text_dim, freq_dim=shape.freq_dim, ffn_dim=shape.ffn_dim,
    )  # fmt: skip
    names = {name: f"{diffusers_name(module(name))}{name[len(module(name)) :]}" for name in model.state_dict()}
    transformer.load_state_dict({names[name]: weight for name, weight in model.state_dict().items()})
    pipeline = WanPipeline(**dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler")), transformer=transformer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline.load_lora_weights(str(path / "adapter_model.safetensors" if path.is_dir() else path))
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
    except Exception:  # whatever it raises, the user has no LoRA
        return "no"
    found = transformer.state_dict()
    return compared({name: found[names[name]] for name in wanted}, wanted)


def module(parameter: str) -> str:
    """The module, or the bare parameter, of a parameter's name."""
    return re.sub(r"\.(?:weight|bias)$", "", parameter)


def by_converter(path: Path, wanted: Weights) -> str:
    """What option makes of it a file by which ComfyUI gives every weight its value, or all that it can."""
    output = path.parent / "out.safetensors"
    base = path.parent / "base.safetensors"
    save_file(dict(tiny().state_dict()), base)
    fold = ["--fold", str(8 * RANK), "--base", str(base)]
    for name, options in (("yes", []), ("with --fold", fold), ("with --drop_unsupported", ["--drop_unsupported"])):
        try:
            convert_lora_to_comfy.main(["--input_lora", str(path), "--output_lora", str(output), *options])
        except UserError:
            continue
        if not output.exists():
            return "yes, to two files"
        found = by_comfyui(output, wanted)
        expected = {"with --fold": "no", "with --drop_unsupported": "in part"}.get(name, "yes")
        assert found in (expected, "yes"), (name, found)
        return name
    return "no"


def works(action: Callable[[], object]) -> str:
    try:
        action()
    except UserError:
        return "no"
    return "yes"


def initialised(path: Path) -> None:
    lora = read_lora(path)
    alpha = next(iter(lora.pairs.values())).effective_alpha if lora.pairs else 1.0
    targets = ("all-linear",)
    control = bool(lora.input_shapes)
    opts = AdapterOptions(lora_rank=RANK, lora_alpha=alpha, lora_target=targets, init_lora=path, control_lora=control)
    with torch.device("meta"):
        layout = WanModel(TINY_SHAPE)
    plan_adapter(opts, layout)


def row(kind: Kind, folder: Path) -> str:
    path = save(kind, folder)
    wanted = meant(path)
    fuse = works(lambda: fuse_lora(tiny(), fitting(read_lora(path), tiny(), path)[0]))
    cells = [by_converter(path, wanted), fuse, works(lambda: initialised(path)), fuse]
    cells += [by_comfyui(path, wanted), by_diffusers(path, wanted)]
    return " | ".join(["", kind.what, kind.made_by, *cells, ""]).strip()


@pytest.mark.parametrize("kind", KINDS, ids=[f"{kind.what} {kind.made_by}" for kind in KINDS])
def test_the_row_of_a_kind_says_what_programs_make_of_it(tmp_path, kind):
    assert row(kind, tmp_path) in PAGE.read_text(encoding="utf-8").splitlines()


def test_no_row_is_of_a_kind_that_is_not_measured():
    table = PAGE.read_text(encoding="utf-8").split("\n|---|---|---|---|---|---|---|---|\n")[1].split("\n\n")[0]
    assert len(table.splitlines()) == len(KINDS)


if __name__ == "__main__":
    rows = []
    for each in KINDS:
        with tempfile.TemporaryDirectory() as place:
            rows.append(row(each, Path(place)))
    head, rest = PAGE.read_text(encoding="utf-8").split("\n|---|---|---|---|---|---|---|---|\n")
    line = "\n|---|---|---|---|---|---|---|---|\n"
    PAGE.write_text(head + line + "\n".join(rows) + "\n\n" + rest.split("\n\n", 1)[1], encoding="utf-8")
