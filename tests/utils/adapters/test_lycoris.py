"""LoHa and LoKr change weights as their formulas say, in every form in which tools store them."""

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.adapted import inputs
from tests.loras import change_of, comfy_merge, make_loha, make_lokr, written
from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.average import average
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_file import LoraError, LoraFile, delta
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import to_state_dict, write_lora
from utils.adapters.lycoris import Lycoris
from utils.common.errors import UserError

DIM = TINY_SHAPE.dim
LINEAR, KERNEL = (6, 8), (6, 8, 1, 2, 2)
Q, PATCH = "blocks.0.self_attn.q", "patch_embedding"
FORMS = {
    "LoHa": lambda shape, alpha: make_loha(shape, 3, alpha),
    "LoKr of whole factors": lambda shape, alpha: make_lokr(shape, "whole", alpha=alpha),
    "LoKr, the second decomposed": lambda shape, alpha: make_lokr(shape, "second", 2, alpha),
    "LoKr, both decomposed": lambda shape, alpha: make_lokr(shape, "both", 1, alpha),
}
OF_KERNELS = {
    "LoHa with cores": lambda shape, alpha: make_loha(shape, 3, alpha, core=True),
    "LoKr with a core": lambda shape, alpha: make_lokr(shape, "core", 2, alpha),
    "LoKr with a kernel in its second side": lambda shape, alpha: make_lokr(shape, "kernel", 2, alpha),
}
every_form = pytest.mark.parametrize("form", FORMS)
every_kernel = pytest.mark.parametrize("form", [*FORMS, *OF_KERNELS])


def made(form: str, shape: tuple[int, ...], alpha: float | None = 5.0) -> Lycoris:
    torch.manual_seed(0)
    return (FORMS | OF_KERNELS)[form](shape, alpha)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert found.shape == expected.shape
    return bool((found.double() - expected).norm() <= 1e-6 * expected.norm())


@pytest.mark.parametrize("alpha", [None, 5.0, -2.0, 0.0])
@every_form
def test_the_change_of_a_linear_layer_is_that_of_the_formula(form, alpha):
    lycoris = made(form, LINEAR, alpha)
    assert lycoris.weight_shape == LINEAR and close(delta(lycoris), change_of(lycoris, LINEAR))
    assert close(delta(lycoris, 0.6), 0.6 * change_of(lycoris, LINEAR))
    assert delta(lycoris).abs().max() <= lycoris.bound * (1 + 1e-6)


@every_kernel
def test_the_change_of_a_kernel_is_that_of_the_formula_in_every_form(form):
    lycoris = made(form, KERNEL)
    assert close(delta(lycoris).reshape(KERNEL), change_of(lycoris, KERNEL))
    flat = lycoris.flattened()
    assert all(factor.ndim == 2 for factor in flat.factors.values())
    assert close(delta(flat).reshape(KERNEL), change_of(lycoris, KERNEL))


def test_a_core_whose_two_ranks_differ_keeps_its_scale_where_it_is_flattened():
    lycoris = Lycoris(make_lokr(KERNEL, "core", 2, 5.0).factors | {"lokr_t2": torch.randn(3, 2, 1, 2, 2)}, 5.0)
    lycoris = Lycoris({**lycoris.factors, "lokr_w2_a": torch.randn(3, 3)}, 5.0)
    assert close(delta(lycoris.flattened()).reshape(KERNEL), delta(lycoris).reshape(KERNEL).double())


def test_alpha_has_no_meaning_where_both_factors_are_whole():
    whole = make_lokr(LINEAR, "whole", alpha=100.0)
    assert whole.scale == 1 and torch.equal(
        delta(whole), torch.kron(whole.factors["lokr_w1"], whole.factors["lokr_w2"])
    )


def test_alpha_is_divided_by_the_rank_of_the_second_factor_where_both_have_one():
    """As ComfyUI does, whatever tool may give them different ranks."""
    first, second = make_lokr(LINEAR, "both", 1).factors, make_lokr(LINEAR, "second", 2).factors
    factors = {**{n: f for n, f in first.items() if "w1" in n}, **{n: f for n, f in second.items() if "w2" in n}}
    lycoris, base = Lycoris(factors, 3.0), torch.randn(LINEAR)
    merged, left = comfy_merge({f"{Q}.weight": base}, tensors_of(lycoris, f"diffusion_model.{Q}"), 1.0)
    assert lycoris.scale == 1.5 and not left
    torch.testing.assert_close(base + delta(lycoris), merged[f"{Q}.weight"])


# ------------------------------------------------------------------------------------------------------------- files


def tensors_of(lycoris: Lycoris, stem: str) -> dict[str, torch.Tensor]:
    tensors = {f"{stem}.{role}": factor for role, factor in lycoris.factors.items()}
    return tensors | ({} if lycoris.alpha is None else {f"{stem}.alpha": torch.tensor(lycoris.alpha)})


@pytest.mark.parametrize("strength", [1.0, 0.6])
@every_form
def test_a_file_is_fused_with_its_full_change(tmp_path, form, strength):
    lycoris = made(form, (DIM, DIM), 2.0)
    patch = made("LoKr with a core", (DIM, 16, 1, 2, 2), 2.0)
    tensors = tensors_of(lycoris, "lora_unet_blocks_0_self_attn_q") | tensors_of(patch, "lora_unet_patch_embedding")
    lora = read_lora(written(tmp_path / "l.safetensors", tensors))
    model, before = tiny_transformer(), tiny_transformer()
    fuse_lora(model, lora, strength)
    for name, each in ((Q, lycoris), (PATCH, patch)):
        old = before.get_parameter(f"{name}.weight")
        expected = old.double() + strength * change_of(each, tuple(old.shape))
        assert close(model.get_parameter(f"{name}.weight"), expected)
    assert not torch.allclose(model(*inputs()), before(*inputs()), atol=1e-3)


@pytest.mark.parametrize("layout", ["comfy", "kohya"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_form
def test_comfyui_gets_the_factors_bit_for_bit_and_makes_the_same_weight_of_them(tmp_path, form, dtype, layout):
    lycoris = made(form, LINEAR).map(lambda factor: factor.to(dtype))
    source = written(tmp_path / "l.safetensors", tensors_of(lycoris, f"lycoris_{Q.replace('.', '_')}"))
    write_lora(tmp_path / "out.safetensors", read_lora(source), layout)
    tensors = load_file(tmp_path / "out.safetensors")
    stem = f"diffusion_model.{Q}" if layout == "comfy" else f"lora_unet_{Q.replace('.', '_')}"
    assert tensors.keys() == {f"{stem}.{role}" for role in [*lycoris.factors, "alpha"]}
    for role, factor in lycoris.factors.items():
        assert tensors[f"{stem}.{role}"].dtype == dtype and torch.equal(tensors[f"{stem}.{role}"], factor)
    base = torch.randn(LINEAR)
    merged, left = comfy_merge({f"{Q}.weight": base}, tensors, 0.7)
    assert not left and close(merged[f"{Q}.weight"], base.double() + 0.7 * change_of(lycoris, LINEAR))


@every_kernel
def test_comfyui_which_knows_no_kernels_of_three_dimensions_makes_the_same_weight(form):
    lycoris, base = made(form, KERNEL), torch.randn(KERNEL)
    tensors, _ = to_state_dict(LoraFile({}, lycoris={PATCH: lycoris}))
    merged, left = comfy_merge({f"{PATCH}.weight": base}, tensors, 0.7)
    assert not left and close(merged[f"{PATCH}.weight"], base.double() + 0.7 * change_of(lycoris, KERNEL))


@pytest.mark.parametrize("layout", ["wantraining", "diffusers", "peft"])
@pytest.mark.parametrize(("lycoris", "kind"), [(make_loha(), "LoHa"), (make_lokr(), "LoKr")])
def test_other_programs_cannot_load_them_and_the_way_out_is_named(layout, lycoris, kind):
    with pytest.raises(LoraError, match=f"holds no {kind}. Fold it into plain LoRA: --fold RANK"):
        to_state_dict(LoraFile({}, lycoris={Q: lycoris}), layout)


def spoiled(number: float) -> dict[str, torch.Tensor]:
    tensors = tensors_of(make_loha(), Q)
    tensors[f"{Q}.hada_w2_b"][0, 0] = number
    return tensors


def test_reading_makes_no_change_in_full(tmp_path, monkeypatch):
    tensors = tensors_of(make_loha(), Q) | tensors_of(make_lokr(), "blocks.0.ffn.0")
    made = []
    monkeypatch.setattr(Lycoris, "product", lambda self: (made.append(self), torch.empty(6, 8, device="meta"))[1])
    assert len(read_lora(written(tmp_path / "l.safetensors", tensors)).lycoris) == 2
    assert all(factor.is_meta for each in made for factor in each.factors.values())


@pytest.mark.parametrize("alpha", [None, 0.5, -7.0])
@every_kernel
def test_no_number_of_a_change_exceeds_its_bound(form, alpha):
    lycoris = made(form, KERNEL, alpha)
    assert 0 < delta(lycoris).abs().max() <= lycoris.bound * (1 + 1e-6)
    assert lycoris.product().abs().max() <= lycoris.bound * (1 + 1e-6)
    assert math.isnan(lycoris.map(lambda factor: factor * torch.nan).bound)


BAD = {
    "NaN in a factor": (spoiled(torch.nan), f"{Q}.hada_w2_b: holds NaN or infinite"),
    "infinity in a factor": (spoiled(torch.inf), f"{Q}.hada_w2_b: holds NaN or infinite"),
    "a product beyond fp32": (tensors_of(make_loha().map(lambda f: f * 1e12), Q), "may be infinite in fp32"),
    "an alpha that makes it so": (
        tensors_of(Lycoris(make_loha().map(lambda f: f * 1e6).factors, 1e20), Q),
        "may be infinite in fp32",
    ),
    "one core of two": (
        {key: t for key, t in tensors_of(make_loha(KERNEL, core=True), Q).items() if "t2" not in key},
        "only a part of a LoHa",
    ),
    "a core of another rank": (
        tensors_of(make_lokr(KERNEL, "core", 2), Q) | {f"{Q}.lokr_t2": torch.ones(3, 3, 1, 2, 2)},
        "do not fit together",
    ),
    "a pair as well": (
        tensors_of(make_loha(), Q) | {f"{Q}.lora_down.weight": torch.ones(2, 8)},
        "two changes of one weight",
    ),
    "a full change as well": (
        tensors_of(make_loha(), Q) | {f"{Q}.diff": torch.ones(6, 8)},
        "two changes of one weight",
    ),
    "a factor of no LoKr": (tensors_of(make_lokr(), Q) | {f"{Q}.lokr_w3": torch.ones(2, 2)}, "not LoRA keys"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_whole_loha_or_lokr_is_refused(tmp_path, what):
    tensors, message = BAD[what]
    with pytest.raises(LoraError, match=message) as caught:
        read_lora(written(tmp_path / "bad.safetensors", tensors))
    assert len(str(caught.value).splitlines()) == 1


def test_they_cannot_be_averaged_because_their_factors_are_no_steps_of_one_line():
    with pytest.raises(UserError, match="only plain LoRAs can be averaged: fold LoHa, LoKr and DoRA"):
        average([LoraFile({}, lycoris={Q: make_loha()}), LoraFile({}, lycoris={Q: make_loha()})])
