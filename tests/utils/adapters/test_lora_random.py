"""LoRAs drawn at random, of all kinds at once, mean the same in every layout that can hold them."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.loras import comfy_merge, make_loha, make_lokr, make_pair
from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.dora import COMFY, PEFT, Magnitude
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_file import LoraError, LoraFile
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import LAYOUTS, write_lora
from wan.modules.model import WanModel

DIM, PATCH = TINY_SHAPE.dim, "patch_embedding"
SHAPES = {name: tuple(value.shape) for name, value in tiny_transformer().named_parameters()}
LAYERS = sorted(name.removesuffix(".weight") for name, shape in SHAPES.items() if len(shape) > 1 and "mod" not in name)
VECTORS = sorted(name for name, shape in SHAPES.items() if len(shape) == 1 or "modulation" in name)
KINDS = ["pair", "pair", "pair", "loha", "lokr", "diff"]
SEEDS = range(40)


def stored_shape(draw: random.Random, name: str, wide: bool) -> tuple[int, ...]:
    out, *rest = SHAPES[f"{name}.weight"]
    return (out, 32, *rest[1:]) if wide else (out, *rest)


def drawn(seed: int) -> LoraFile:
    """Some layers with changes of some kinds, at most one rule of DoRA, full changes of vectors, perhaps a control."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kinds = draw.sample(KINDS, draw.randint(1, 3)) if seed % 2 else ["pair"]
    wide, rule = draw.random() < 0.2, draw.choice([None, None, PEFT, COMFY])
    lora = LoraFile({}, metadata={"seed": str(seed)})
    for name in sorted({*draw.sample(LAYERS, draw.randint(1, 6)), *([PATCH] if wide else [])}):
        is_wide = wide and name == PATCH
        shape, rank = stored_shape(draw, name, is_wide), draw.randint(1, 4)
        alpha = draw.choice([None, 0.5, 3.0, -2.0])
        kind = draw.choice(kinds) if not is_wide else draw.choice(["pair", "diff"])
        if kind == "pair":
            lora.pairs[name] = make_pair(shape, rank, alpha)
            if len(shape) > 2 and not is_wide and draw.random() < 0.5:
                lora.pairs[name] = lora.pairs[name].map(lambda matrix: matrix.flatten(1))
        elif kind == "loha":
            lora.lycoris[name] = make_loha(shape, rank, alpha, core=len(shape) > 2 and draw.random() < 0.5)
        elif kind == "lokr":
            forms = ["whole", "second", "both"] + (["core", "kernel"] if len(shape) > 2 else [])
            lora.lycoris[name] = make_lokr(shape, draw.choice(forms), rank, alpha)
        else:
            lora.diffs[f"{name}.diff"] = 0.1 * torch.randn(shape)
        if is_wide:
            lora.input_shapes[name] = shape
        if rule and kind != "diff" and (seed % 4 == 0 or draw.random() < 0.5):
            ones = [1] * (len(shape) - 1) if rule == COMFY else []
            lora.magnitudes[name] = Magnitude(1 + torch.rand(shape[0], *ones), rule)
    for name in draw.sample(VECTORS, draw.choice([0, 0, 2])) + draw.choice([[], [f"{n}.bias" for n in lora.pairs][:2]]):
        module, _, last = name.rpartition(".")
        key = f"{name}.diff" if last == "modulation" else f"{module}.{'diff_b' if last == 'bias' else 'diff'}"
        lora.diffs[key] = 0.1 * torch.randn(SHAPES[name])
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    return lora.map(lambda tensor: tensor.to(dtype))


def can_hold(layout: str, lora: LoraFile) -> bool:
    """By the table of what each program applies, written out again."""
    rules = {magnitude.rule for magnitude in lora.magnitudes.values()}
    split = {tuple(key.rsplit(".", 1)) for key in lora.diffs}
    if layout in ("comfy", "kohya"):
        return PEFT not in rules and not any(name.endswith("modulation") for name, _ in split)
    vectors = {(name, role) for name, role in split if role == "diff_b" or name not in LAYERS}
    if lora.lycoris or COMFY in rules or (rules and layout != "peft"):
        return False
    full = {name for name, role in split if role == "diff" and name in LAYERS}
    if rules and (lora.magnitudes.keys() != lora.pairs.keys() or full):
        return False
    if layout == "wantraining":
        return not vectors
    carried = all(role == "diff_b" and name in lora.pairs.keys() | full for name, role in vectors)
    known = layout != "peft" or all(pair.alpha is not None for pair in lora.pairs.values())
    return not lora.input_shapes and carried and known


def fused(lora: LoraFile, strength: float = 0.7) -> dict[str, Tensor]:
    model: WanModel = tiny_transformer()
    fuse_lora(model, lora, strength)
    return model.state_dict()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].shape == weight.shape
        assert (found[name] - weight).abs().max() <= 4e-6 * max(1.0, weight.abs().max()), name


def place(folder: Path, layout: str) -> Path:
    return folder / (layout if layout == "peft" else f"{layout}.safetensors")


def held(lora: LoraFile, folder: Path) -> list[str]:
    """The layouts that took the LoRA; the others must say that they cannot."""
    taken = []
    for layout in LAYOUTS:
        if can_hold(layout, lora):
            write_lora(place(folder, layout), lora, layout)
            taken.append(layout)
        else:
            with pytest.raises(LoraError):
                write_lora(place(folder, layout), lora, layout)
    return taken


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lora_means_the_same_in_every_layout_that_holds_it(tmp_path, seed):
    lora = drawn(seed)
    expected = fused(lora)
    for layout in held(lora, tmp_path):
        again = read_lora(place(tmp_path, layout))
        assert all("states no alpha" in note for note in again.notes) and again.metadata == lora.metadata
        assert_close(fused(again), expected)
        for other in held(again, tmp_path):
            assert_close(fused(read_lora(place(tmp_path, other))), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_comfyui_makes_the_same_weights_of_it(tmp_path, seed):
    lora = drawn(seed)
    lora = lora.part(lambda key: "modulation" not in key)
    lora = replace(lora, magnitudes={n: m for n, m in lora.magnitudes.items() if m.rule == COMFY})
    base = {name: value.detach() for name, value in tiny_transformer().named_parameters()}
    for layout in ("comfy", "kohya"):
        write_lora(tmp_path / "l.safetensors", lora, layout)
        merged, left = comfy_merge(base, load_file(tmp_path / "l.safetensors"), 0.7)
        assert not left
        assert_close(merged, {name: weight for name, weight in fused(lora).items() if name in merged})


def test_the_draws_reach_every_kind_and_every_layout():
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        lora = drawn(seed)
        seen.update(layout for layout in LAYOUTS if can_hold(layout, lora))
        seen.update(each.kind for each in lora.lycoris.values())
        seen.update(f"DoRA of {each.rule}" for each in lora.magnitudes.values())
        seen.update("control" for _ in lora.input_shapes)
        seen.update(key.rpartition(".")[2] for key in lora.diffs)
    wanted = [*LAYOUTS, "LoHa", "LoKr", "DoRA of PEFT", "DoRA of ComfyUI", "control", "diff", "diff_b"]
    assert all(seen[what] >= 3 for what in wanted), seen
