"""LoRAs of sibling models: what fits is used, what does not is said, and another Wan's are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.adapted import ALPHA, RANK, fill
from tests.loras import change_of, make_loha, make_lokr, make_pair
from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.dora import PEFT, Magnitude
from utils.adapters.fitting import fitting
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora import add_lora, extract_lora, select_modules, widen_patch_embedding
from utils.adapters.lora_file import LoraFile, LoraPair, delta
from utils.common.errors import UserError
from wan.modules.model import WanModel, WanShape

T2V = TINY_SHAPE
I2V = replace(T2V, in_dim=36, image_dim=20)  # as Wan 2.1, with layers that read image tokens
I2V_A14B = replace(T2V, in_dim=36)
SOURCE = Path("style.safetensors")
Q = "blocks.0.self_attn.q"
MODULATION = torch.ones(1, 2, 48)


def lora_of(shape: WanShape, control: bool = False, patch: bool = False) -> LoraFile:
    """A LoRA on all linear layers of a model, on its input for a control, or on its input as it is."""
    model = tiny_transformer(shape)
    names = select_modules(model, ["all-linear"])
    if control:
        widen_patch_embedding(model, shape.in_dim + shape.out_dim)
    fill(add_lora(model, [*names, "patch_embedding"] if control or patch else names, RANK, ALPHA))
    lora = extract_lora(model, {})
    return lora if control else replace(lora, input_shapes={})


def weights(model: WanModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("shape", [T2V, I2V, I2V_A14B])
@pytest.mark.parametrize("control", [False, True])
def test_a_lora_of_the_same_model_is_used_as_it_is(shape, control):
    lora = lora_of(shape, control)
    fitted, notes = fitting(lora, tiny_transformer(shape), SOURCE)
    assert fitted == lora and notes == []


def test_a_text_to_video_lora_fits_an_image_to_video_model():
    lora = lora_of(T2V)
    assert fitting(lora, tiny_transformer(I2V), SOURCE) == (lora, [])


@pytest.mark.parametrize("shape", [T2V, I2V_A14B])
def test_layers_that_read_image_tokens_are_left_out_and_named(shape):
    lora, model = lora_of(I2V), tiny_transformer(shape)
    fitted, (note,) = fitting(lora, model, SOURCE)
    assert fitted.pairs.keys() == lora_of(T2V).pairs.keys() and len(fitted.pairs) == 20
    assert note == (
        "6 of 26 modules of style.safetensors are not in this model (cross_attn.k_img, cross_attn.v_img, img_emb): "
        "left out"
    )
    before = weights(model)
    fuse_lora(model, fitted)
    for name, tensor in model.state_dict().items():
        pair = lora.pairs.get(name.removesuffix(".weight"))
        assert torch.equal(tensor, before[name] if pair is None else before[name] + delta(pair))


def test_deltas_of_parameters_that_the_model_lacks_are_left_out():
    kept = {
        "blocks.0.norm3.diff": torch.ones(48),
        "head.head.diff_b": torch.ones(64),
        "head.modulation.diff": MODULATION,
    }
    gone = {"blocks.1.cross_attn.norm_k_img.diff": torch.ones(48), "img_emb.emb_pos.diff": torch.ones(1, 514, 20)}
    fitted, (note,) = fitting(LoraFile({}, kept | gone), tiny_transformer(), SOURCE)
    assert fitted.diffs.keys() == kept.keys()
    assert note.startswith("2 of 5 modules of style.safetensors are not in this model (cross_attn.norm_k_img, img_emb)")
    (only,) = fitting(LoraFile({}, kept | {"img_emb.emb_pos.diff": MODULATION}), tiny_transformer(), SOURCE)[1]
    assert only.startswith("1 of 4 modules of style.safetensors is not")


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize(("trained", "used", "shared"), [(T2V, I2V, 16), (I2V, T2V, 16)])
def test_a_change_of_the_input_reaches_the_channels_that_both_models_have(trained, used, shared, flattened):
    lora, model = lora_of(trained, patch=True), tiny_transformer(used)
    change = delta(lora.pairs["patch_embedding"])
    if flattened:
        pair = lora.pairs["patch_embedding"]
        lora.pairs["patch_embedding"] = LoraPair(pair.down.flatten(1), pair.up.flatten(1), pair.alpha)
    before = model.patch_embedding.weight.clone()
    fitted, notes = fitting(lora, model, SOURCE)
    assert notes[-1] == (
        f"style.safetensors was made for {trained.in_dim} input channels, and this model has {used.in_dim}: "
        "the first 16 are changed"
    )
    fuse_lora(model, fitted)
    torch.testing.assert_close(model.patch_embedding.weight[:, :shared], before[:, :shared] + change[:, :shared])
    assert torch.equal(model.patch_embedding.weight[:, shared:], before[:, shared:])


def test_a_whole_delta_of_the_input_does_so_too():
    model, change = tiny_transformer(I2V), torch.ones(48, 16, 1, 2, 2)
    before = model.patch_embedding.weight.clone()
    fitted, notes = fitting(LoraFile({}, {"patch_embedding.diff": change}), model, SOURCE)
    fuse_lora(model, fitted, 0.5)
    assert torch.equal(model.patch_embedding.weight[:, :16], before[:, :16] + 0.5) and len(notes) == 1
    assert torch.equal(model.patch_embedding.weight[:, 16:], before[:, 16:])


def test_a_file_that_states_a_models_own_inputs_is_no_control_lora():
    """WanTraining's keys: the reader takes each pair on the input for a control's."""
    lora = replace(lora_of(T2V, patch=True), input_shapes={"patch_embedding": (48, 16, 1, 2, 2)})
    fitted, notes = fitting(lora, tiny_transformer(I2V), SOURCE)
    assert fitted.input_shapes == {} and fitted.pairs["patch_embedding"].down.shape[1] == 36 and len(notes) == 1
    widened = tiny_transformer(T2V)
    widen_patch_embedding(widened, 32)
    assert fitting(lora, widened, SOURCE)[0].pairs["patch_embedding"].down.shape[1] == 32
    unreleased = replace(T2V, in_dim=20)
    lora = replace(lora_of(unreleased, patch=True), input_shapes={"patch_embedding": (48, 20, 1, 2, 2)})
    fitted, notes = fitting(lora, tiny_transformer(unreleased), SOURCE)
    assert fitted.pairs == lora.pairs and notes == []


@pytest.mark.parametrize(
    ("trained", "used", "message"),
    [
        (T2V, I2V, "that has 32 input channels with the control; this model has 36, and 52 with the control"),
        (I2V, T2V, "that has 52 input channels with the control; this model has 16, and 32 with the control"),
    ],
)
def test_a_control_lora_for_other_inputs_is_refused(trained, used, message):
    with pytest.raises(UserError, match=message):
        fitting(lora_of(trained, control=True), tiny_transformer(used), SOURCE)


def test_a_control_lora_fits_a_sibling_with_the_same_inputs():
    fitted, (note,) = fitting(lora_of(I2V, control=True), tiny_transformer(I2V_A14B), SOURCE)
    assert fitted.input_shapes == {"patch_embedding": (48, 52, 1, 2, 2)} and note.startswith("6 of 27 modules")


def test_a_lora_of_which_nothing_fits_is_refused():
    pair = LoraPair(torch.ones(2, 20), torch.ones(20, 2), 2.0)
    with pytest.raises(UserError, match=r"style.safetensors adapts img_emb, and this model has no such module"):
        fitting(LoraFile({"img_emb.proj.1": pair}), tiny_transformer(), SOURCE)


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("blocks.2.self_attn.q", 48, r"blocks\.2\.self_attn\.q.*another Wan"),
        (Q, 64, r"\(64, 64\).*the model \(48, 48\)"),
    ],
)
def test_a_deeper_or_wider_models_lora_is_still_refused(name, width, message):
    pair = LoraPair(torch.ones(2, width), torch.ones(width, 2), 2.0)
    model = tiny_transformer()
    fitted, notes = fitting(
        LoraFile({Q: LoraPair(torch.ones(2, 48), torch.ones(48, 2), 2.0)} | {name: pair}), model, SOURCE
    )
    assert notes == []
    with pytest.raises(UserError, match=message):
        fuse_lora(model, fitted)


def test_a_change_of_the_input_in_no_shape_of_a_kernel_is_refused():
    model, odd = tiny_transformer(), LoraPair(torch.ones(2, 7), torch.ones(48, 2), 2.0)
    fitted, notes = fitting(LoraFile({"patch_embedding": odd}), model, SOURCE)
    assert notes == []
    with pytest.raises(UserError, match="patch_embedding"):
        fuse_lora(model, fitted)


@pytest.mark.parametrize("form", ["loha", "lokr", "core"])
@pytest.mark.parametrize(("trained", "used"), [(T2V, I2V_A14B), (I2V_A14B, T2V)])
def test_a_loha_or_lokr_of_the_input_reaches_the_channels_that_both_models_have(form, trained, used):
    shape = (48, trained.in_dim, 1, 2, 2)
    lycoris = make_loha(shape) if form == "loha" else make_lokr(shape, "core" if form == "core" else "whole", 2)
    model, before = tiny_transformer(used), tiny_transformer(used)
    lora, (note,) = fitting(LoraFile({}, lycoris={"patch_embedding": lycoris, Q: make_loha((48, 48))}), model, SOURCE)
    assert "the first 16 are changed" in note and lora.lycoris.keys() == {Q}
    fuse_lora(model, lora, 0.5)
    change = model.patch_embedding.weight - before.patch_embedding.weight
    expected = 0.5 * change_of(lycoris, shape)[:, :16]
    assert (change[:, :16] - expected).abs().max() <= 1e-5 * expected.abs().max() and change[:, 16:].eq(0).all()


def test_a_dora_of_another_input_is_refused_because_it_depends_on_all_of_it():
    pair = make_pair((48, 36, 1, 2, 2))
    lora = LoraFile({"patch_embedding": pair}, magnitudes={"patch_embedding": Magnitude(torch.ones(48), PEFT)})
    with pytest.raises(UserError, match="DoRA for a patch embedding of 36 input channels, and this model has 16"):
        fitting(lora, tiny_transformer(T2V), SOURCE)
    assert fitting(lora, tiny_transformer(I2V_A14B), SOURCE) == (lora, [])


def test_layers_of_every_kind_that_the_model_lacks_are_left_out_with_all_that_they_have():
    k_img = "blocks.0.cross_attn.k_img"
    lora = LoraFile(
        {Q: make_pair((48, 48))},
        lycoris={k_img: make_loha((48, 48))},
        magnitudes={name: Magnitude(torch.ones(48), PEFT) for name in (Q, k_img)},
        notes=("a note of the file",),
    )
    fitted, said = fitting(lora, tiny_transformer(T2V), SOURCE)
    assert fitted.modules == fitted.magnitudes.keys() == {Q} and not fitted.lycoris
    assert said[0] == "a note of the file" and "cross_attn.k_img): left out" in said[1]


@pytest.mark.parametrize("shape", [(48, 32, 1, 2, 2), (48, 128)])
def test_a_control_lora_of_a_full_change_keeps_the_channels_of_its_control(shape):
    diff = torch.randn(shape)
    lora = LoraFile({}, {"patch_embedding.diff": diff}, {"patch_embedding": (48, 32, 1, 2, 2)})
    model, before = tiny_transformer(T2V), tiny_transformer(T2V)
    fitted, said = fitting(lora, model, SOURCE)
    fuse_lora(model, fitted, 0.5)
    expected = 0.5 * diff.reshape(48, 32, 1, 2, 2)
    expected[:, :16] += before.patch_embedding.weight
    assert not said and torch.allclose(model.patch_embedding.weight, expected, atol=1e-6)


def test_a_flattened_control_lora_widens_the_input():
    pair = make_pair((48, 128))
    lora = LoraFile({"patch_embedding": pair}, input_shapes={"patch_embedding": (48, 32, 1, 2, 2)})
    model, before = tiny_transformer(T2V), tiny_transformer(T2V)
    fuse_lora(model, fitting(lora, model, SOURCE)[0])
    expected = change_of(pair, (48, 32, 1, 2, 2)).float()
    expected[:, :16] += before.patch_embedding.weight
    torch.testing.assert_close(model.patch_embedding.weight.data, expected, rtol=1e-5, atol=1e-5)
