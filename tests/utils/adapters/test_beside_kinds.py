"""LoHa, LoKr and DoRA act beside a model as if they were fused: on plain and on quantised layers, beside an adapter."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.adapted import ALPHA, RANK, adapted, fill, inputs
from tests.loras import make_loha, make_lokr, make_pair
from tests.tiny import TINY_SHAPE, tiny_transformer, write_transformer
from utils.adapters.beside import Chosen, beside
from utils.adapters.dora import COMFY, PEFT, Magnitude
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora import add_lora, select_modules, widen_patch_embedding
from utils.adapters.lora_file import LoraFile, delta
from utils.encoding.conditioning import Cond, make_predict
from utils.encoding.sampling import denoise
from utils.storage.linear import QuantisedLinear
from utils.storage.load import Store
from utils.storage.weights import Storage
from wan.checkpoints import build_transformer, cast_to
from wan.checkpoints.transformer import read_config, read_transformer
from wan.modules.model import WanModel
from wan.text2video import Sampler

CPU, DIM = torch.device("cpu"), TINY_SHAPE.dim
Q, V, FFN, PATCH = "blocks.0.self_attn.q", "blocks.1.cross_attn.v", "blocks.0.ffn.0", "patch_embedding"
SHAPES = {Q: (DIM, DIM), V: (DIM, DIM), FFN: (2 * DIM, DIM), PATCH: (DIM, 16, 1, 2, 2), "head.head": (64, DIM)}


def changes(make: Callable[..., object], magnitudes: str = "", names: tuple[str, ...] = tuple(SHAPES)) -> LoraFile:
    """A change of this kind in layers of every sort, small enough that the model still answers with a scale of 1."""
    torch.manual_seed(0)
    made = {name: make(SHAPES[name]).map(lambda factor: 0.3 * factor) for name in names}
    lengths = {}
    for name in made if magnitudes else ():
        values = 0.5 + torch.rand(SHAPES[name][0] if magnitudes != "inputs" else SHAPES[name][1])
        axes = (1, -1) if magnitudes == "inputs" else (-1, 1)
        ones = [1] * (len(SHAPES[name]) - 2)
        rule = PEFT if magnitudes == "PEFT" else COMFY
        lengths[name] = Magnitude(values if rule == PEFT else values.reshape(*axes, *ones), rule)
    is_pair = make is make_pair
    return LoraFile(made if is_pair else {}, lycoris={} if is_pair else made, magnitudes=lengths)


KINDS = {
    "LoHa": lambda **more: changes(lambda shape: make_loha(shape, 2, 2.0), **more),
    "LoKr of whole factors": lambda **more: changes(lambda shape: make_lokr(shape), **more),
    "LoKr, both decomposed": lambda **more: changes(lambda shape: make_lokr(shape, "both", 1, -2.0), **more),
    "DoRA of PEFT": lambda **more: changes(make_pair, "PEFT", **more),
    "DoRA of ComfyUI": lambda **more: changes(make_pair, "ComfyUI", **more),
    "DoRA of ComfyUI for inputs": lambda **more: changes(make_pair, "inputs", **more),
    "DoRA of a LoKr": lambda **more: changes(lambda shape: make_lokr(shape, "second", 2), "PEFT", **more),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def fused(model: WanModel, lora: LoraFile, strength: float) -> WanModel:
    model = copy.deepcopy(model)
    fuse_lora(model, lora, strength)
    return model


def off(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def sampled(model: WanModel) -> Tensor:
    noise, _, text = inputs()
    return denoise(Sampler("unipc", 3, (2.0,), 5.0), make_predict(model), noise, Cond(text), torch.zeros(4, 32))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@every_kind
def test_each_kind_acts_as_if_it_were_fused_and_leaves_nothing(kind, strength):
    model, lora = tiny_transformer(), KINDS[kind]()
    plain, expected = model(*inputs()), fused(model, lora, strength)(*inputs())
    with beside(model, [Chosen(lora, strength)], CPU):
        found = model(*inputs())
    assert off(found, expected) < 1e-5 and off(plain, expected) > 0.05
    assert torch.equal(model(*inputs()), plain)


@every_kind
def test_a_video_that_is_sampled_beside_it_is_that_of_the_fused_weights(kind):
    model, lora = tiny_transformer(), KINDS[kind]()
    expected = sampled(fused(model, lora, 0.6))
    with beside(model, [Chosen(lora, 0.6)], CPU):
        assert off(sampled(model), expected) < 1e-4


@every_kind
def test_it_acts_beside_an_adapter_in_training_whose_change_it_does_not_see(kind):
    lora = KINDS[kind]()
    model, _ = adapted()
    expected = fused(tiny_transformer(), lora, 0.6)
    fill(add_lora(expected, select_modules(expected, ("all-linear",)), RANK, ALPHA))
    plain = model(*inputs())
    with beside(model, [Chosen(lora, 0.6)], CPU):
        assert off(model(*inputs()), expected(*inputs())) < 1e-5
    assert torch.equal(model(*inputs()), plain)


@every_kind
def test_it_acts_on_a_model_whose_input_a_control_has_widened(kind):
    latents, timestep, text = inputs()
    lora, model, expected = KINDS[kind](), tiny_transformer(), fused(tiny_transformer(), KINDS[kind](), 0.6)
    for each in (model, expected):
        widen_patch_embedding(each, 32)
        fill(add_lora(each, [PATCH, Q], RANK, ALPHA))
    with beside(model, [Chosen(lora, 0.6)], CPU):
        found = make_predict(model)(latents, timestep, Cond(text, latents.flip(0)))
    assert off(found, make_predict(expected)(latents, timestep, Cond(text, latents.flip(0)))) < 1e-5


@pytest.mark.parametrize("stored_in", ["int8", "fp8_scaled"])
@every_kind
def test_it_acts_on_layers_whose_weights_are_codes(tmp_path, kind, stored_in):
    write_transformer(tmp_path, tiny_transformer())
    files = read_transformer(tmp_path, read_config(tmp_path))
    model = build_transformer(files)
    Store(Storage(CPU, torch.float32, stored_in)).load(model, files, cast_to)
    lora = KINDS[kind]()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantisedLinear)}
    assert {Q, V} <= layers.keys()
    plainly = tiny_transformer()
    for name, layer in layers.items():
        plainly.get_submodule(name).weight.data = layer.values(torch.float32)
    plain, expected = model(*inputs()), fused(plainly, lora, 0.6)(*inputs())
    with beside(model, [Chosen(lora, 0.6)], CPU):
        found = model(*inputs())
    assert off(found, expected) < 1e-5 < 0.05 < off(plain, expected)
    assert torch.equal(model(*inputs()), plain)


SEVERAL = [("LoHa", "LoKr of whole factors"), ("LoHa", "DoRA of PEFT"), ("DoRA of ComfyUI", "DoRA of ComfyUI")]


@pytest.mark.parametrize("kinds", SEVERAL)
def test_several_act_as_if_they_were_fused_one_after_another(kinds):
    model, (first, second) = tiny_transformer(), (KINDS[kind]() for kind in kinds)
    expected = fused(fused(model, first, 0.5), second, -0.3)
    with beside(model, [Chosen(first, 0.5), Chosen(second, -0.3)], CPU):
        assert off(model(*inputs()), expected(*inputs())) < 1e-5


def test_a_vector_may_be_changed_by_factors_too():
    name = "blocks.0.self_attn.norm_q"
    lora = LoraFile({}, lycoris={name: make_loha((DIM, 1), 2, 2.0)})
    model, expected = tiny_transformer(), tiny_transformer()
    weight = expected.get_parameter(f"{name}.weight")
    weight.data = weight + delta(lora.lycoris[name]).flatten()
    assert isinstance(weight, nn.Parameter)
    with beside(model, [Chosen(lora, 1.0)], CPU):
        assert off(model(*inputs()), expected(*inputs())) < 1e-5
