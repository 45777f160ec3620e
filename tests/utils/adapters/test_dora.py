"""DoRA of both kinds of files: by the rule of the program that wrote the magnitudes, at every strength."""

import pytest
import torch
from safetensors.torch import load_file

from tests.adapted import inputs
from tests.loras import (
    change_of,
    comfy_merge,
    dora_weight,
    half,
    make_loha,
    make_lokr,
    make_lora,
    make_pair,
    written,
)
from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.dora import COMFY, PEFT, Magnitude, decomposed_change
from utils.adapters.fusion import fuse_lora
from utils.adapters.initial import load_lora
from utils.adapters.lora import add_lora
from utils.adapters.lora_file import LoraError, LoraFile, delta
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import to_state_dict, write_lora
from utils.common.errors import UserError

DIM = TINY_SHAPE.dim
LINEAR, KERNEL = (6, 8), (6, 4, 1, 2, 2)
Q, PATCH = "blocks.0.self_attn.q", "patch_embedding"


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert found.shape == expected.shape
    return bool((found.double() - expected).norm() <= 2e-6 * expected.norm())


def lengths(shape: tuple[int, ...], kind: str) -> Magnitude:
    """Magnitudes between 1 and 2, stored as this program stores them."""
    ones = [1] * (len(shape) - 1)
    stored = {PEFT: [shape[0]], COMFY: [shape[0], *ones], "inputs": [1, shape[1], *ones[1:]]}[kind]
    return Magnitude(1 + torch.rand(stored), PEFT if kind == PEFT else COMFY)


@pytest.mark.parametrize("shape", [LINEAR, KERNEL])
@pytest.mark.parametrize("kind", [PEFT, COMFY, "inputs"])
def test_a_weight_becomes_what_the_rule_of_its_program_says(shape, kind):
    torch.manual_seed(0)
    weight, pair, magnitude = torch.randn(shape), make_pair(shape), lengths(shape, kind)
    assert magnitude.fits(shape)
    found = weight + decomposed_change(weight, delta(pair), magnitude)
    assert close(found, dora_weight(weight, change_of(pair, shape), magnitude))


def test_the_two_rules_differ_and_agree_where_nothing_is_changed():
    torch.manual_seed(0)
    weight, values = torch.randn(LINEAR), 1 + torch.rand(6)
    still, moved = torch.zeros(LINEAR), torch.randn(LINEAR)
    peft, comfy = Magnitude(values, PEFT), Magnitude(values[:, None], COMFY)
    torch.testing.assert_close(decomposed_change(weight, still, peft), decomposed_change(weight, still, comfy))
    rows = (weight + decomposed_change(weight, moved, peft)).norm(dim=1)
    torch.testing.assert_close(rows, values)
    assert not torch.allclose((weight + decomposed_change(weight, moved, comfy)).norm(dim=1), values, rtol=0.01)


@pytest.mark.parametrize(
    ("values", "rule", "fits"),
    [
        (torch.ones(6), PEFT, True),
        (torch.ones(8), PEFT, False),
        (torch.ones(6, 1), COMFY, True),
        (torch.ones(6), COMFY, True),
        (torch.ones(1, 8), COMFY, True),
        (torch.ones(1, 8), PEFT, False),
        (torch.ones(1, 6), COMFY, False),
        (torch.ones(1), COMFY, False),
        (torch.ones(6, 8), COMFY, False),
    ],
)
def test_there_is_one_length_for_each_output_or_in_comfyui_for_each_input(values, rule, fits):
    assert Magnitude(values, rule).fits(LINEAR) == fits


# ------------------------------------------------------------------------------------------------------------- fusing

FACTORS = {
    "a pair": lambda shape: make_pair(shape),
    "a LoHa": lambda shape: make_loha(shape),
    "a LoKr": lambda shape: make_lokr(shape, "second"),
}


def dora(factors, shape, kind, name=Q) -> LoraFile:
    kinds = ({name: factors}, {}) if hasattr(factors, "down") else ({}, {name: factors})
    return LoraFile(kinds[0], lycoris=kinds[1], magnitudes={name: lengths(shape, kind)})


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
@pytest.mark.parametrize("kind", [PEFT, COMFY, "inputs"])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize(("name", "shape"), [(Q, (DIM, DIM)), (PATCH, (DIM, 16, 1, 2, 2))])
def test_a_dora_is_fused_between_the_old_weight_and_the_decomposed_one(factors, kind, strength, name, shape):
    torch.manual_seed(0)
    lora = dora(FACTORS[factors](shape), shape, kind, name)
    model = tiny_transformer()
    old = model.get_parameter(f"{name}.weight").double()
    fuse_lora(model, lora, strength)
    whole = dora_weight(old, change_of(lora.factors[name], shape), lora.magnitudes[name])
    assert close(model.get_parameter(f"{name}.weight"), old + strength * (whole - old))


def test_a_full_change_of_the_bias_stays_beside_a_dora():
    lora = dora(make_pair((DIM, DIM)), (DIM, DIM), PEFT)
    model, before = tiny_transformer(), tiny_transformer()
    fuse_lora(model, LoraFile(lora.pairs, {f"{Q}.diff_b": torch.ones(DIM)}, magnitudes=lora.magnitudes), 0.5)
    old = before.get_parameter(f"{Q}.bias")
    assert torch.equal(model.get_parameter(f"{Q}.bias"), old + 0.5)
    assert not torch.allclose(model(*inputs()), before(*inputs()), atol=1e-3)


def test_a_dora_cannot_begin_an_adapter_that_has_no_magnitudes():
    model = tiny_transformer()
    add_lora(model, [Q], 2, 3.0)
    with pytest.raises(UserError, match=f"--init_lora: it holds more than LoRA pairs .DoRA of {Q}"):
        load_lora(model, dora(make_pair((DIM, DIM)), (DIM, DIM), PEFT))


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "key", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.x.weight"]
)
def test_magnitudes_of_peft_are_read_in_every_spelling(tmp_path, key):
    path = written(
        tmp_path / "l.safetensors", half(f"base_model.model.{Q}") | {f"base_model.model.{Q}.{key}": torch.ones(6)}
    )
    (magnitude,) = read_lora(path).magnitudes.values()
    assert magnitude.rule == PEFT and torch.equal(magnitude.values, torch.ones(6))


@pytest.mark.parametrize("stored", [(6, 1), (6,), (6, 1, 1), (1, 8)])
def test_comfyui_makes_of_a_converted_dora_what_the_file_means(tmp_path, stored):
    """ComfyUI would multiply by a plain vector along the other axis: it is written with the axes of the weight."""
    torch.manual_seed(0)
    pair, values, base = make_pair(LINEAR), 1 + torch.rand(stored), torch.randn(LINEAR)
    tensors = {f"lora_unet_blocks_0_self_attn_q.lora_{m}.weight": t for m, t in pair.tensors.items()}
    tensors |= {
        "lora_unet_blocks_0_self_attn_q.dora_scale": values,
        "lora_unet_blocks_0_self_attn_q.alpha": torch.tensor(3.0),
    }
    lora = read_lora(written(tmp_path / "l.safetensors", tensors))
    expected = dora_weight(base, change_of(pair, LINEAR), Magnitude(values, COMFY))
    for layout in ("comfy", "kohya"):
        write_lora(tmp_path / "out.safetensors", lora, layout)
        merged, left = comfy_merge({f"{Q}.weight": base}, load_file(tmp_path / "out.safetensors"), 0.6)
        assert not left and close(merged[f"{Q}.weight"], base + 0.6 * (expected - base))


@pytest.mark.parametrize("stored", [(6, 1, 1, 1, 1), (6, 1), (6,), (1, 4, 1, 1, 1)])
def test_comfyui_makes_of_a_dora_of_the_patch_embedding_what_the_file_means(stored):
    torch.manual_seed(0)
    pair, base, magnitude = make_pair(KERNEL), torch.randn(KERNEL), Magnitude(1 + torch.rand(stored), COMFY)
    tensors, _ = to_state_dict(LoraFile({PATCH: pair}, magnitudes={PATCH: magnitude}))
    merged, left = comfy_merge({f"{PATCH}.weight": base}, tensors, 1.0)
    assert not left and close(merged[f"{PATCH}.weight"], dora_weight(base, change_of(pair, KERNEL), magnitude))


@pytest.mark.parametrize(
    ("rule", "layout", "message"),
    [
        (PEFT, "comfy", "DoRA of PEFT: PEFT divides by the length of the changed weight, ComfyUI by .* unchanged"),
        (PEFT, "kohya", "DoRA of PEFT"),
        (COMFY, "peft", "DoRA of ComfyUI: PEFT divides"),
        (PEFT, "diffusers", "DoRA of PEFT: diffusers cannot load DoRA of Wan"),
        (COMFY, "diffusers", "DoRA of ComfyUI: diffusers cannot"),
        (COMFY, "wantraining", "DoRA of ComfyUI: WanTraining cannot"),
    ],
)
def test_a_dora_of_another_rule_is_refused_with_the_reason_and_the_way_out(rule, layout, message):
    lora = dora(make_pair(), (6, 5), rule)
    with pytest.raises(LoraError, match=f"{message}.*--fold RANK --base FILE"):
        to_state_dict(lora, layout)


def test_peft_has_dora_in_all_layers_or_in_none():
    lora = make_lora()
    magnitudes = {Q: Magnitude(torch.ones(6), PEFT)}
    with pytest.raises(LoraError, match="in all layers or in none. Fold it"):
        to_state_dict(LoraFile(lora.pairs, magnitudes=magnitudes), "peft")


@pytest.mark.parametrize("role", ["dora_scale", "lora_magnitude_vector"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([1.0, torch.nan, 1, 1, 1, 1]), "holds NaN or infinite numbers"),
        (torch.tensor([1.0, torch.inf, 1, 1, 1, 1]), "holds NaN or infinite numbers"),
        (torch.ones(6, dtype=torch.int64), "stored as torch.int64"),
        (torch.ones(7), "one number for each output"),
        (torch.ones(0), "is empty"),
    ],
)
def test_magnitudes_that_are_none_are_refused(tmp_path, role, values, message):
    path = written(tmp_path / "bad.safetensors", half() | {f"diffusion_model.{Q}.{role}": values})
    with pytest.raises(LoraError, match=message):
        read_lora(path)


def test_a_magnitude_that_overflows_the_chosen_dtype_is_not_written(tmp_path):
    lora = LoraFile({Q: make_pair()}, magnitudes={Q: Magnitude(torch.full((6, 1), 1e6), COMFY)})
    with pytest.raises(LoraError, match=f"{Q} holds numbers that are not finite in torch.float16"):
        write_lora(tmp_path / "l.safetensors", lora, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
