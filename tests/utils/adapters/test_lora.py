"""Adapters: which modules, how they answer and learn, and how they come from and go to files."""

import copy
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from tests.adapted import ALPHA, LAYERS, RANK, adapted, fill, inputs
from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.initial import load_lora
from utils.adapters.lora import add_lora, extract_lora, parse_blocks, select_modules
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import write_lora
from utils.common.errors import UserError
from wan.modules.model import WanModel


@pytest.fixture(scope="module")
def many_blocks() -> nn.Module:
    """Just enough of a model with 30 blocks to choose modules from."""
    model = nn.Module()
    model.blocks = nn.ModuleList(copy.deepcopy(tiny_transformer().blocks[0]) for _ in range(30))
    return model


# -------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", {1}),
        ("0,2", {0, 2}),
        ("4-9", {4, 5, 6, 7, 8, 9}),
        ("0, 3-4 ,29", {0, 3, 4, 29}),
        ("5-5", {5}),
        (None, set(range(30))),
    ],
)
def test_block_numbers_are_exactly_those_written(text, expected):
    assert parse_blocks(text, 30) == expected


@pytest.mark.parametrize("text", ["", "one", "1;2", "-1", "1-", "1,,2", "1.5", "0x1", "*"])
def test_blocks_that_are_not_understood_are_refused(text):
    with pytest.raises(UserError, match="is not understood; write 1 or 0,2 or 4-9"):
        parse_blocks(text, 30)


@pytest.mark.parametrize("text", ["30", "9-4", "28-30", "1,100"])
def test_blocks_that_the_model_lacks_are_refused(text):
    with pytest.raises(UserError, match="the model has blocks 0 to 29"):
        parse_blocks(text, 30)


def test_block_1_is_block_1_and_never_10_to_19(many_blocks):
    names = select_modules(many_blocks, ["all-linear"], "1")
    assert sorted(names) == sorted(f"blocks.1.{layer}" for layer in LAYERS)


def test_attn_means_both_attentions_of_every_block(many_blocks):
    names = select_modules(many_blocks, ["attn"])
    assert set(names) == {f"blocks.{i}.{layer}" for i in range(30) for layer in LAYERS if "attn" in layer}
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["self_attn.q"], {"blocks.4.self_attn.q", "blocks.5.self_attn.q"}),
        (["self_attn.[kv]"], {f"blocks.{i}.self_attn.{x}" for i in (4, 5) for x in "kv"}),
        (["cross_attn.q", "attn"], {f"blocks.{i}.{layer}" for i in (4, 5) for layer in LAYERS if "attn" in layer}),
        (["ffn.*"], {"blocks.4.ffn.0", "blocks.4.ffn.2", "blocks.5.ffn.0", "blocks.5.ffn.2"}),
        (["blocks.4.ffn.0", "self*.o"], {"blocks.4.ffn.0", "blocks.4.self_attn.o", "blocks.5.self_attn.o"}),
    ],
)
def test_targets_are_named_sets_and_patterns_over_names(many_blocks, targets, expected):
    assert set(select_modules(many_blocks, targets, "4-5")) == expected


def test_head_and_embeddings_are_never_meant():
    assert set(select_modules(tiny_transformer(), ["*"])) == {f"blocks.{i}.{x}" for i in (0, 1) for x in LAYERS}


def test_every_target_of_a_text_to_video_model_is_in_its_blocks_and_in_their_order():
    names = select_modules(tiny_transformer(), ["all-linear", "attn"])
    assert names == [f"blocks.{i}.{layer}" for i in (0, 1) for layer in LAYERS]


VISION = replace(TINY_SHAPE, in_dim=36, image_dim=20, image_positions=514)
IMAGE_LAYERS = {f"blocks.{i}.cross_attn.{x}_img" for i in (0, 1) for x in "kv"}
IMAGE_EMBEDDING = {"img_emb.proj.1", "img_emb.proj.3"}


@pytest.mark.parametrize(
    ("targets", "blocks", "expected"),
    [
        (["all-linear"], None, IMAGE_LAYERS | IMAGE_EMBEDDING),
        (["attn"], None, IMAGE_LAYERS),
        (["img_emb.*"], None, IMAGE_EMBEDDING),
        (["img_emb.proj.3", "self_attn.q"], None, {"img_emb.proj.3"}),
        (["*img*"], None, IMAGE_LAYERS | IMAGE_EMBEDDING),
        (["ffn.*"], None, set()),
        (["all-linear"], "0-1", IMAGE_LAYERS),
    ],
)
def test_layers_that_read_a_picture_are_reached_where_the_model_has_them(targets, blocks, expected):
    names = select_modules(tiny_transformer(VISION), targets, blocks)
    assert {name for name in names if "img" in name} == expected and len(names) == len(set(names))


def test_the_image_embedding_is_in_no_block():
    with pytest.raises(UserError, match=r"'img_emb\.\*' matches no layer"):
        select_modules(tiny_transformer(VISION), ["img_emb.*"], "0-1")
    with pytest.raises(UserError, match=r"'img_emb\.\*' matches no layer"):
        select_modules(tiny_transformer(), ["img_emb.*"])


@pytest.mark.parametrize("target", ["self_attn", "q", "head.head", "attention", "norm3", "blocks.9.ffn.0"])
def test_a_target_that_matches_nothing_is_refused_with_what_is_known(target):
    with pytest.raises(UserError, match=r"matches no layer; known: attn, all-linear, .*self_attn\.q.*ffn\.2"):
        select_modules(tiny_transformer(), ["attn", target])


def test_only_the_chosen_modules_get_an_adapter(many_blocks):
    model = copy.deepcopy(many_blocks)
    names = select_modules(model, ["self_attn.q"], "1,10")
    add_lora(model, names, RANK, ALPHA)
    assert [name for name, module in model.named_modules() if isinstance(module, LoraLinear)] == names


# ---------------------------------------------------------------------------------------------- answers and gradients


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing():
    model = tiny_transformer()
    expected = model(*inputs())
    add_lora(model, select_modules(model, ["all-linear"]), RANK, ALPHA)
    assert torch.equal(model(*inputs()), expected)


def test_an_adapter_on_all_layers_of_a_model_that_reads_a_picture_changes_nothing_yet_and_learns_in_each():
    model = tiny_transformer(replace(VISION, image_positions=0))
    latents, timestep, text = inputs()
    given = torch.cat([latents, torch.ones(2, 20, 2, 4, 6)], dim=1), timestep, text, torch.ones(2, 3, 20)
    with torch.no_grad():
        expected = model(*given)
    parameters = add_lora(model, select_modules(model, ["all-linear"]), RANK, ALPHA)
    found = model(*given)
    assert torch.equal(found, expected) and len(parameters) == 2 * (20 + len(IMAGE_LAYERS | IMAGE_EMBEDDING))
    found.square().mean().backward()
    assert all(up.grad is not None and up.grad.abs().max() > 0 for up in parameters[1::2])


def test_the_adapters_parameters_alone_train_and_are_fp32_on_a_bf16_base():
    model = tiny_transformer().to(torch.bfloat16)
    parameters = add_lora(model, select_modules(model, ["attn"]), RANK, ALPHA)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters} and len(parameters) == 2 * 2 * 8
    assert all(parameter.dtype == torch.float32 for parameter in parameters)


def test_an_adapter_in_bf16_starts_from_the_rounded_matrices_of_one_in_fp32_and_another_beside_it_keeps_its_dtype():
    torch.manual_seed(0)
    expected = add_lora(tiny_transformer(), ["blocks.0.ffn.0"], RANK, ALPHA)
    torch.manual_seed(0)
    model = tiny_transformer()
    parameters = add_lora(model, ["blocks.0.ffn.0"], RANK, ALPHA, "first", torch.bfloat16)
    other = add_lora(model, ["blocks.0.ffn.0"], RANK, ALPHA, "second")
    assert all(torch.equal(own, e.bfloat16()) for own, e in zip(parameters, expected, strict=True))
    assert {p.dtype for p in parameters} == {torch.bfloat16} and {p.dtype for p in other} == {torch.float32}


@pytest.mark.parametrize(("given", "own"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_an_adapter_that_is_started_from_a_file_keeps_its_own_dtype(tmp_path, given, own):
    names, models = ["blocks.0.ffn.0", "blocks.1.self_attn.q"], [tiny_transformer(), tiny_transformer()]
    first, second = (
        add_lora(m, names, RANK, ALPHA, dtype=dtype) for m, dtype in zip(models, (given, own), strict=True)
    )
    for parameter in first:
        parameter.data = torch.randn(parameter.shape).to(given)
    write_lora(tmp_path / "lora.safetensors", extract_lora(models[0], {}))
    lora = read_lora(tmp_path / "lora.safetensors")
    assert all(pair.up.dtype == pair.down.dtype == given for pair in lora.pairs.values())
    load_lora(models[1], lora)
    assert all(torch.equal(a.to(own), b) and b.dtype == own for a, b in zip(first, second, strict=True))


def linear_pair(dtype: torch.dtype = torch.float32) -> tuple[LoraLinear, LoraLinear]:
    """The same adapted layer twice: with the fused forward, and with PEFT's."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layer = nn.Linear(24, 40).to(dtype).requires_grad_(False)
    fill(add_lora(model, ["layer"], RANK, ALPHA))
    reference = copy.deepcopy(model.layer)
    del reference.forward
    return model.layer, reference


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("shape", [(24,), (7, 24), (2, 7, 24), (2, 3, 5, 24)])
def test_the_fused_forward_equals_that_of_peft_in_values_and_gradients(shape):
    results = []
    for layer in linear_pair():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = layer(x)
        (y * torch.linspace(-1, 1, 40)).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert results[0][0].shape == (*shape[:-1], 40)
    assert all(relative_error(fused, reference) <= 2e-6 for fused, reference in zip(*results, strict=True))


def test_the_fused_forward_of_nothing_is_nothing():
    fused, _ = linear_pair()
    assert fused(torch.ones(0, 24)).shape == (0, 40)


def test_the_fused_forward_of_a_strided_input_equals_that_of_its_copy():
    layer, _ = linear_pair()
    x = torch.randn(24, 5, 2).permute(2, 1, 0)
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=1e-6, atol=1e-6)


def test_in_bf16_the_fused_forward_is_close_and_gradients_are_fp32():
    fused, reference = linear_pair(torch.bfloat16)
    exact, _ = linear_pair()
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2))
    y = fused(x.bfloat16())
    y.float().square().mean().backward()
    scale = exact(x).abs().max()
    assert y.dtype == torch.bfloat16 and (y - exact(x)).abs().max() < 0.02 * scale
    assert (y - reference(x.bfloat16())).abs().max() < 0.02 * scale
    assert fused.lora_A["default"].weight.grad.dtype == torch.float32


def test_the_whole_model_answers_as_with_peft():
    model, parameters = adapted()
    results = []
    for fused in (True, False):
        if not fused:
            for module in model.modules():
                if isinstance(module, LoraLinear):
                    del module.forward
        velocity = model(*inputs())
        velocity.square().mean().backward()
        results.append([velocity.detach(), *(parameter.grad for parameter in parameters)])
        model.zero_grad()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_after_the_second_step_every_matrix_has_a_finite_gradient_that_is_not_zero():
    model = tiny_transformer()
    parameters = add_lora(model, select_modules(model, ["all-linear"]), RANK, ALPHA)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(*inputs()).square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


# --------------------------------------------------------------------------------------------------- files and back


def matrices(model: WanModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_an_adapter_survives_the_way_to_a_file_and_back(tmp_path):
    model, _ = adapted()
    write_lora(tmp_path / "lora.safetensors", extract_lora(model, {"step": "7"}))
    lora = read_lora(tmp_path / "lora.safetensors")
    other, _ = adapted(seed=9)
    assert not torch.equal(other(*inputs()), model(*inputs()))
    load_lora(other, lora)
    expected = matrices(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in matrices(other).items())
    assert torch.equal(other(*inputs()), model(*inputs())) and lora.metadata["step"] == "7"


def test_an_average_is_extracted_from_its_own_values_and_the_adapter_keeps_its_own():
    model, _ = adapted()
    before = matrices(model)
    halves = {name: value / 2 for name, value in before.items()}
    half, whole = extract_lora(model, {}, halves), extract_lora(model, {})
    assert all(torch.equal(half.pairs[name].up, pair.up / 2) for name, pair in whole.pairs.items())
    assert all(torch.equal(value, before[name]) for name, value in matrices(model).items())


def test_an_extracted_adapter_is_a_copy():
    model, parameters = adapted()
    lora = extract_lora(model, {})
    before = {name: pair.up.clone() for name, pair in lora.pairs.items()}
    for parameter in parameters:
        parameter.data.zero_()
    assert all(torch.equal(pair.up, before[name]) for name, pair in lora.pairs.items())
    assert all(not pair.up.requires_grad and pair.alpha == ALPHA for pair in lora.pairs.values())


def test_a_loaded_adapter_can_be_trained_further():
    model, parameters = adapted()
    lora = extract_lora(model, {})
    fill(parameters, seed=5)
    load_lora(model, lora)
    model(*inputs()).square().mean().backward()
    assert all(parameter.requires_grad and parameter.grad.abs().max() > 0 for parameter in parameters)
