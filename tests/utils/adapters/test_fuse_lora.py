"""LoRAs become part of the weights, and control LoRAs widen the input."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.fusion import Fusion, fuse_lora
from utils.adapters.initial import load_lora
from utils.adapters.lora import add_lora, extract_lora, select_modules, widen_patch_embedding
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import write_lora
from utils.common.errors import UserError
from utils.encoding.conditioning import Cond, make_predict
from wan.modules.model import WanModel

RANK, ALPHA = 4, 6.0
Q = "blocks.0.self_attn.q"


def inputs() -> tuple[Tensor, Tensor, Cond]:
    generator = torch.Generator().manual_seed(0)
    latents, channels = torch.randn(2, 2, 16, 2, 4, 6, generator=generator)
    text = torch.randn(2, 5, TINY_SHAPE.text_dim, generator=generator)
    return latents, torch.tensor([100.0, 900.0]), Cond(text, channels)


def plain_inputs() -> tuple[Tensor, Tensor, Cond]:
    latents, timestep, cond = inputs()
    return latents, timestep, Cond(cond.text)


def fill(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def adapted(alpha: float = ALPHA) -> WanModel:
    model = tiny_transformer()
    fill(add_lora(model, select_modules(model, ["all-linear"]), RANK, alpha))
    return model


def controlled() -> WanModel:
    """A model with 16 more input channels and an adapter on its patch embedding too."""
    model = tiny_transformer()
    names = select_modules(model, ["attn"])
    widen_patch_embedding(model, 2 * TINY_SHAPE.in_dim)
    fill(add_lora(model, [*names, "patch_embedding"], RANK, ALPHA))
    return model


def weights(model: WanModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------ fusing


def test_fusing_tensor_by_tensor_while_loading_equals_fusing_into_a_loaded_model():
    lora = extract_lora(controlled(), {})
    loaded = tiny_transformer()
    before = weights(loaded)
    fuse_lora(loaded, lora, 0.7)
    fusion = Fusion().with_lora(tiny_transformer(), lora, 0.7)
    placed = {name: fusion.add(name, tensor) for name, tensor in before.items()}
    assert placed.keys() == weights(loaded).keys()
    assert all(torch.equal(placed[name], tensor) for name, tensor in weights(loaded).items())
    assert fusion.targets == {name for name, tensor in before.items() if not torch.equal(placed[name], tensor)} | {
        "patch_embedding.weight"
    }


def test_what_a_fusion_does_not_adapt_is_passed_through_untouched():
    model = adapted()
    fusion = Fusion().with_lora(tiny_transformer(), extract_lora(model, {}))
    tensor = torch.randn(3)
    assert fusion.add("head.head.bias", tensor) is tensor


@torch.no_grad()
def test_a_fused_lora_answers_like_its_adapter():
    model = adapted()
    fused = tiny_transformer()
    fuse_lora(fused, extract_lora(model, {}))
    expected = make_predict(model)(*plain_inputs())
    actual = make_predict(fused)(*plain_inputs())
    assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    assert list(fused.state_dict()) == list(tiny_transformer().state_dict())


@torch.no_grad()
def test_fused_at_half_the_weight_a_lora_answers_like_an_adapter_of_half_the_alpha():
    fused = tiny_transformer()
    fuse_lora(fused, extract_lora(adapted(), {}), weight=0.5)
    expected = make_predict(adapted(alpha=ALPHA / 2))(*plain_inputs())
    assert (make_predict(fused)(*plain_inputs()) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_fused_and_taken_away_again_the_weights_are_the_old_ones():
    model, lora = tiny_transformer(), extract_lora(adapted(), {})
    fuse_lora(model, lora)
    assert not torch.allclose(model.blocks[0].ffn[0].weight, tiny_transformer().blocks[0].ffn[0].weight)
    fuse_lora(model, lora, weight=-1.0)
    for name, tensor in tiny_transformer().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_sum_is_rounded_once_to_the_dtype_of_the_weight():
    model, lora = tiny_transformer().to(torch.bfloat16), extract_lora(adapted(), {})
    base, pair = model.blocks[0].self_attn.q.weight.float(), lora.pairs[Q]
    fuse_lora(model, lora)
    expected = (base + (ALPHA / RANK) * pair.up @ pair.down).bfloat16()
    assert model.blocks[0].self_attn.q.weight.dtype == torch.bfloat16
    assert (model.blocks[0].self_attn.q.weight != expected).float().mean() < 0.01


def test_deltas_reach_weights_biases_and_bare_parameters():
    model, before = tiny_transformer(), tiny_transformer()
    deltas = {
        "blocks.0.norm3.diff": torch.full((48,), 0.5),
        "blocks.0.norm3.diff_b": torch.full((48,), 0.25),
        "blocks.1.modulation.diff": torch.ones(1, 6, 48),
        "head.head.diff_b": torch.full((64,), -1.0),
    }
    fuse_lora(model, LoraFile({}, diffs=deltas), weight=2.0)
    for parameter, old, change in (
        (model.blocks[0].norm3.weight, before.blocks[0].norm3.weight, 1.0),
        (model.blocks[0].norm3.bias, before.blocks[0].norm3.bias, 0.5),
        (model.blocks[1].modulation, before.blocks[1].modulation, 2.0),
        (model.head.head.bias, before.head.head.bias, -2.0),
    ):
        assert torch.equal(parameter, old + change)


PAIR = LoraPair(torch.ones(4, 48), torch.ones(48, 4), ALPHA)
FOREIGN = {
    "a module of a larger model": (LoraFile({"blocks.2.self_attn.q": PAIR}), r"blocks\.2\.self_attn\.q.*another Wan"),
    "a module of another family": (LoraFile({"img_emb.proj.1": PAIR}), "img_emb.proj.1.weight, which this model"),
    "another width in": (LoraFile({Q: replace(PAIR, down=torch.ones(4, 64))}), r"\(48, 64\).*the model \(48, 48\)"),
    "another width out": (LoraFile({Q: replace(PAIR, up=torch.ones(64, 4))}), r"\(64, 48\).*the model \(48, 48\)"),
    "a delta of another width": (LoraFile({}, {"blocks.0.norm3.diff": torch.ones(47)}), r"norm3\.weight"),
    "a delta of no parameter": (LoraFile({}, {"blocks.0.norm1.diff": torch.ones(48)}), r"norm1\.weight"),
    "a widened linear layer": (LoraFile({Q: PAIR}, input_shapes={Q: (48, 48)}), "only the patch embedding can be"),
    "a narrower input": (
        LoraFile(
            {"patch_embedding": LoraPair(torch.ones(4, 8, 1, 2, 2), torch.ones(48, 4, 1, 1, 1), 4.0)},
            input_shapes={"patch_embedding": (48, 8, 1, 2, 2)},
        ),
        "16 input channels, more than the 8 asked for",
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_lora_that_does_not_fit_is_refused_before_anything_is_changed(what):
    foreign, message = FOREIGN[what]
    model = tiny_transformer()
    before, lora = weights(model), extract_lora(adapted(), {})
    mixed = LoraFile(lora.pairs | foreign.pairs, foreign.diffs, foreign.input_shapes)
    with pytest.raises(UserError, match=message):
        fuse_lora(model, mixed)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())


# ----------------------------------------------------------------------------------------------------------- control


@torch.no_grad()
def test_a_widened_model_answers_bit_for_bit_as_before_to_any_control():
    model, wide = tiny_transformer(), tiny_transformer()
    widen_patch_embedding(wide, 32)
    assert wide.patch_embedding.weight.shape == (48, 32, 1, 2, 2) and wide.patch_embedding.in_channels == 32
    assert torch.equal(wide.patch_embedding.weight[:, :16], model.patch_embedding.weight)
    assert wide.patch_embedding.weight[:, 16:].eq(0).all() and not wide.patch_embedding.weight.requires_grad
    expected = make_predict(model)(*plain_inputs())
    assert torch.equal(make_predict(wide)(*plain_inputs()), expected)
    torch.testing.assert_close(make_predict(wide)(*inputs()), expected, rtol=1e-5, atol=1e-5)


def test_an_input_cannot_be_narrowed():
    model = tiny_transformer()
    widen_patch_embedding(model, 32)
    with pytest.raises(UserError, match="32 input channels, more than the 16 asked for"):
        widen_patch_embedding(model, 16)


def test_a_fresh_control_adapter_changes_nothing_and_learns_from_the_control():
    model = tiny_transformer()
    expected = make_predict(model)(*plain_inputs())
    widen_patch_embedding(model, 32)
    add_lora(model, ["patch_embedding"], RANK, ALPHA)
    torch.testing.assert_close(make_predict(model)(*inputs()), expected, rtol=1e-5, atol=1e-5)
    up, down = (matrix["default"].weight for matrix in (model.patch_embedding.lora_B, model.patch_embedding.lora_A))
    make_predict(model)(*inputs()).square().mean().backward()
    assert up.grad.abs().max() > 0 and up.dtype == torch.float32
    up.data -= up.grad
    make_predict(model)(*inputs()).square().mean().backward()
    assert down.grad[:, 16:].abs().max() > 0


def test_a_control_lora_survives_the_way_to_a_file_and_back(tmp_path):
    model = controlled()
    write_lora(tmp_path / "control.safetensors", extract_lora(model, {}))
    lora = read_lora(tmp_path / "control.safetensors")
    assert lora.input_shapes == {"patch_embedding": (48, 32, 1, 2, 2)}
    other = controlled()
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()
    load_lora(other, lora)
    assert torch.equal(make_predict(other)(*inputs()), make_predict(model)(*inputs()))


@torch.no_grad()
def test_a_fused_control_lora_widens_the_input_and_answers_like_its_adapter(tmp_path):
    model = controlled()
    write_lora(tmp_path / "control.safetensors", extract_lora(model, {}))
    fused = tiny_transformer()
    fuse_lora(fused, read_lora(tmp_path / "control.safetensors"))
    assert fused.patch_embedding.in_channels == 32
    for given in (inputs(), plain_inputs()):
        expected = make_predict(model)(*given)
        assert (make_predict(fused)(*given) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@torch.no_grad()
def test_an_adapter_on_a_fused_control_lora_starts_from_it():
    fused = tiny_transformer()
    fuse_lora(fused, extract_lora(controlled(), {}))
    expected = make_predict(fused)(*inputs())
    widen_patch_embedding(fused, 32)
    add_lora(fused, ["patch_embedding", Q], RANK, ALPHA)
    torch.testing.assert_close(make_predict(fused)(*inputs()), expected, rtol=1e-6, atol=1e-6)
