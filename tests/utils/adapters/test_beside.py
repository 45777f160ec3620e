"""Further LoRAs act in previews as if they were fused, and leave nothing behind."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_wan_lora
from tests.adapted import ALPHA, LAYERS, RANK, adapted, fill, inputs
from tests.checkout import copy_prompts
from tests.loras import make_pair, save_all
from tests.tiny import TINY_SHAPE, tiny_transformer, write_clips, write_model, write_transformer
from utils.adapters.beside import Chosen, beside
from utils.adapters.choosing import further_loras
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora import add_lora, select_modules, speaking, widen_patch_embedding
from utils.adapters.lora_file import LoraFile
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import write_lora
from utils.common.errors import UserError
from utils.encoding.conditioning import Cond, make_predict
from utils.encoding.sampling import denoise
from utils.runs.metrics import Metrics
from utils.training.experts import Experts
from utils.training.memory import Memory, prepare
from wan.checkpoints import load_transformer, open_model
from wan.checkpoints.transformer import read_config, read_transformer
from wan.configs import FAMILIES
from wan.modules.model import WanModel
from wan.text2video import Sampler

CPU = torch.device("cpu")
DIM, A14B = TINY_SHAPE.dim, FAMILIES["wan2.2-t2v-A14B"]
OUTSIDE = ["text_embedding.0", "time_embedding.2", "time_projection.1", "head.head", "patch_embedding"]
DIFFS = {
    "blocks.0.norm3.diff": "blocks.0.norm3.weight",
    "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
    "blocks.1.cross_attn.norm_k.diff": "blocks.1.cross_attn.norm_k.weight",
    "blocks.0.ffn.2.diff": "blocks.0.ffn.2.weight",
    "blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
    "blocks.0.modulation.diff": "blocks.0.modulation",
}


def speed_lora(seed: int = 3) -> LoraFile:
    """A LoRA with everything that a file may change: linear layers, the input, norms, biases, bare parameters."""
    torch.manual_seed(seed)
    weights = {name: tuple(value.shape) for name, value in tiny_transformer().named_parameters()}
    names = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in LAYERS if layer != "ffn.2"] + OUTSIDE
    pairs = {name: make_pair(weights[f"{name}.weight"], rank=2, alpha=1.0) for name in names}
    pairs["blocks.0.self_attn.norm_q"] = make_pair((DIM, 1))
    diffs = {key: 0.1 * torch.randn(weights[target]) for key, target in DIFFS.items()}
    return LoraFile(
        {name: replace(pair, down=0.1 * pair.down, up=0.3 * pair.up) for name, pair in pairs.items()}, diffs
    )


def only(key: str) -> LoraFile:
    whole = speed_lora()
    return LoraFile(
        {key: whole.pairs[key]} if key in whole.pairs else {}, {key: whole.diffs[key]} if key in DIFFS else {}
    )


SPEED = [Chosen(speed_lora(), 0.7), Chosen(speed_lora(4), -0.4)]


def fused(model: WanModel, loras: Sequence[Chosen] = SPEED) -> WanModel:
    model = copy.deepcopy(model)
    for chosen in loras:
        fuse_lora(model, chosen.lora, chosen.strength)
    return model


def sampled(model: WanModel) -> Tensor:
    noise, _, text = inputs()
    return denoise(Sampler("unipc", 3, (2.0,), 5.0), make_predict(model), noise, Cond(text), torch.zeros(4, 32))


def off(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_sampling_beside_loras_equals_sampling_with_them_fused():
    model = tiny_transformer()
    plain, expected = sampled(model), sampled(fused(model))
    with beside(model, SPEED, CPU):
        found = sampled(model)
    assert off(found, expected) < 1e-5 and off(plain, expected) > 0.1


@pytest.mark.parametrize("key", [*speed_lora().pairs, *DIFFS])
def test_each_part_of_a_lora_acts_as_if_it_were_fused(key):
    model, loras = tiny_transformer(), [Chosen(only(key), 1.5)]
    plain, expected = model(*inputs()), fused(model, loras)(*inputs())
    with beside(model, loras, CPU):
        found = model(*inputs())
    assert off(found, expected) < 2e-6 and off(plain, expected) > 1e-4


def test_a_convolution_may_come_flattened_and_as_a_whole():
    model, pair = tiny_transformer(), speed_lora().pairs["patch_embedding"]
    flat = replace(pair, down=pair.down.flatten(1), up=pair.up.flatten(1))
    whole = {"patch_embedding.diff": 0.1 * torch.randn(model.patch_embedding.weight.shape)}
    for lora in (LoraFile({"patch_embedding": flat}), LoraFile({}, whole)):
        with beside(model, [Chosen(lora, 1.0)], CPU):
            assert off(model(*inputs()), fused(model, [Chosen(lora, 1.0)])(*inputs())) < 2e-6


def controlled(model: WanModel) -> WanModel:
    names = select_modules(model, ["all-linear"])
    widen_patch_embedding(model, 2 * TINY_SHAPE.in_dim)
    fill(add_lora(model, [*names, "patch_embedding"], RANK, ALPHA))
    return model


@pytest.mark.parametrize("adapter", ["default", None])
def test_further_loras_act_beside_a_control_lora_in_training_and_without_it(adapter):
    latents, timestep, text = inputs()
    cond = Cond(text, latents.flip(0))
    model, expected = controlled(tiny_transformer()), controlled(fused(tiny_transformer()))
    with beside(model, SPEED, CPU), speaking(model, adapter), speaking(expected, adapter):
        found = make_predict(model)(latents, timestep, cond)
        assert off(found, make_predict(expected)(latents, timestep, cond)) < 1e-5


def trained(model: WanModel) -> list[Tensor]:
    """What a step of training computes: the answer and the gradients."""
    answer = model(*inputs())
    answer.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return [answer.detach(), *gradients]


def places(model: WanModel) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_in_the_model(checkpointing, fails):
    model, _ = adapted(("attn",))
    if checkpointing:
        prepare(model, Memory("full"), lambda _: None)
    before, plain, where = trained(model), sampled(model), places(model)
    parts = {name: dict(vars(module)) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        with suppress(ZeroDivisionError), beside(model, SPEED, CPU):
            assert not torch.equal(sampled(model), plain) and model.state_dict().keys() == weights.keys()
            assert 1 / (not fails)
    assert parts == {name: dict(vars(module)) for name, module in model.named_modules()}
    assert where == places(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(sampled(model), plain)
    assert all(torch.equal(found, expected) for found, expected in zip(trained(model), before, strict=True))


def test_a_lora_that_fails_half_way_leaves_nothing_either():
    model, plain = tiny_transformer(), sampled(tiny_transformer())
    broken = LoraFile(SPEED[0].lora.pairs, {"blocks.9.norm3.diff": torch.ones(DIM)})
    with pytest.raises(KeyError), beside(model, [SPEED[1], Chosen(broken, 1.0)], CPU):
        pass
    assert torch.equal(sampled(model), plain)


def test_the_weights_of_layers_are_not_touched_however_they_are_stored():
    model, loras = (
        tiny_transformer(),
        [Chosen(only(key), 1.0) for key in ("blocks.0.self_attn.q", "blocks.0.ffn.2.diff")],
    )
    weights = {name for name, _ in model.named_parameters() if name.endswith((".q.weight", ".ffn.2.weight"))}
    before = places(model)
    with beside(model, [*SPEED, *loras], CPU):
        assert weights and all(places(model)[name] == before[name] for name in weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_loras_of_any_dtype_act_on_a_bf16_model(tmp_path, dtype):
    write_transformer(tmp_path, tiny_transformer())
    model = load_transformer(read_transformer(tmp_path, read_config(tmp_path)), torch.bfloat16)
    lora = speed_lora()
    pairs = {name: replace(pair, down=pair.down.to(dtype), up=pair.up.to(dtype)) for name, pair in lora.pairs.items()}
    stored = [Chosen(LoraFile(pairs, {key: diff.to(dtype) for key, diff in lora.diffs.items()}), 1.0)]
    plain, expected = model(*inputs()), fused(tiny_transformer(), stored)(*inputs())
    with beside(model, stored, CPU):
        found = model(*inputs())
    assert found.dtype == torch.float32 and off(found, expected) < 0.02 < 0.1 < off(plain, expected)
    assert torch.equal(model(*inputs()), plain)


@pytest.mark.slow
def test_compiled_blocks_meet_the_loras_and_forget_them():
    model = tiny_transformer()
    expected, plain = fused(model)(*inputs()), model(*inputs())
    for block in model.blocks:
        block.compile(backend="eager", dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            assert off(model(*inputs()), plain) < 1e-5
            with beside(model, SPEED, CPU):
                assert off(model(*inputs()), expected) < 1e-5


def test_the_loras_follow_the_experts_and_are_off_when_these_are_moved(monkeypatch):
    models = {name: adapted(("attn",), seed)[0] for seed, name in enumerate(("high_noise", "low_noise"))}
    bare = {name: copy.deepcopy(model) for name, model in models.items()}
    loras = {"high_noise": [SPEED[0]], "low_noise": [SPEED[1]]}
    experts, moved, (latents, _, text) = Experts(models, (0.875,), CPU), [], inputs(1)

    def watched(_: Experts, coming: str) -> None:
        (leaving,) = (name for name in models if name != coming)
        moved.extend([sampled(models[leaving]), sampled(models[coming])])

    monkeypatch.setattr("utils.training.experts.Experts._exchange", watched)

    def answers() -> dict[str, Tensor]:
        asked = {"low_noise": torch.tensor([100.0]), "high_noise": torch.tensor([900.0])}
        return {name: experts.predict(latents, timestep, Cond(text)) for name, timestep in asked.items()}

    expected = {}
    for name, timestep in (("high_noise", 900.0), ("low_noise", 100.0)):
        with beside(bare[name], loras[name], CPU):
            expected[name] = make_predict(bare[name])(latents, torch.tensor([timestep]), Cond(text))
    plain = answers()
    moved.clear()
    with experts.beside(loras):
        found = answers()
    assert all(torch.equal(found[name], expected[name]) and not torch.equal(found[name], plain[name]) for name in found)
    order = ["high_noise", "low_noise", "low_noise", "high_noise"]
    assert all(torch.equal(answer, sampled(bare[name])) for name, answer in zip(order, moved, strict=True))
    assert all(torch.equal(answer, plain[name]) for name, answer in answers().items())


def test_only_experts_that_a_lora_is_for_change():
    models = {name: tiny_transformer(seed=seed) for seed, name in enumerate(("high_noise", "low_noise"))}
    experts, (latents, _, text) = Experts(models, (0.875,), CPU), inputs(1)
    levels = torch.tensor([900.0]), torch.tensor([100.0])
    high, low = (experts.predict(latents, level, Cond(text)) for level in levels)
    with experts.beside({"high_noise": SPEED, "low_noise": []}):
        assert not torch.equal(experts.predict(latents, levels[0], Cond(text)), high)
        assert torch.equal(experts.predict(latents, levels[1], Cond(text)), low)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with two experts, clips, and LoRAs."""
    folder = tmp_path_factory.mktemp("two")
    write_model(folder / "model", A14B)
    write_clips(folder / "clips")
    for seed, name in enumerate(("high_noise", "low_noise")):
        save_all(folder / f"speed_{name}.safetensors", speed_lora(seed))
    write_lora(folder / "style.safetensors", only("blocks.0.self_attn.q"))
    control = LoraFile({"patch_embedding": make_pair((DIM, 32, 1, 2, 2))}, {}, {"patch_embedding": (DIM, 32, 1, 2, 2)})
    write_lora(folder / "control.safetensors", control)
    write_lora(folder / "wide.safetensors", LoraFile({"blocks.0.self_attn.q": make_pair((7, 7))}))
    image = LoraFile({name: make_pair((DIM, DIM)) for name in ("blocks.0.cross_attn.k_img", "blocks.0.self_attn.q")})
    write_lora(folder / "image.safetensors", image)
    return folder


def test_further_loras_are_read_for_each_expert_and_what_is_left_out_is_said_once(folder, capsys):
    files = open_model(folder / "model")
    found = further_loras([f"{folder}/speed.safetensors:0.5", f"{folder}/image.safetensors"], files)
    assert {name: [chosen.strength for chosen in loras] for name, loras in found.items()} == {
        "high_noise": [0.5, 1.0],
        "low_noise": [0.5, 1.0],
    }
    for seed, loras in enumerate(found.values()):
        expected = speed_lora(seed).pairs["head.head"].up
        assert torch.equal(loras[0].lora.pairs["head.head"].up, expected) and len(loras[1].lora.pairs) == 1
    assert capsys.readouterr().out.count("cross_attn.k_img): left out") == 1


def test_without_further_loras_no_transformer_is_built(folder, monkeypatch):
    monkeypatch.setattr("utils.encoding.sampling.build_transformer", None)  # whoever calls it fails
    assert further_loras([], open_model(folder / "model")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("control.safetensors", r"control.safetensors is a control LoRA: .*\n.*test_wan_control_lora.py"),
        ("wide.safetensors:0.5", r"wide.safetensors: the LoRA has \(7, 7\) at blocks.0.self_attn.q.weight"),
        ("nowhere.safetensors", "nowhere.safetensors: there is no such file"),
        ("style.safetensors:1e999", "1e999: write FILE or FILE:STRENGTH"),
    ],
)
def test_further_loras_that_cannot_be_used_are_refused_by_name(folder, text, message):
    with pytest.raises(UserError, match=message):
        further_loras([f"{folder}/{text}"], open_model(folder / "model"))


def test_previews_show_further_loras_and_training_gives_the_same_lora(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", copy_prompts(tmp_path / "embeddings"))
    flags = "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 60 --num_workers 0"
    flags += " --max_train_steps 2 --expert_phase_steps 1 --val_samples 1 --learning_rate 1e-2 --distill_cfg 1"
    flags += " --sample_prompts fox --sample_every 10 --sample_steps 2 --gradient_checkpointing"
    shown, losses = [], []
    monkeypatch.setattr(Metrics, "log_previews", lambda run, videos, fps: shown.append(videos[0][1]))
    monkeypatch.setattr(Metrics, "log_validation", lambda run, values, variety: losses.append(values))
    results = []
    for name, further in {"without": "", "with": "--also_lora speed.safetensors:0.8 style.safetensors"}.items():
        train_wan_lora.main([*flags.split(), *further.split(), "--output_dir", str(tmp_path / name)])
        files = sorted((tmp_path / name).glob("*/checkpoints/wan-lora-*_noise.safetensors"))
        results.append([read_lora(file).pairs for file in files])
    half = len(shown) // 2
    assert half == 2 and not any(torch.equal(*pair) for pair in zip(shown[:half], shown[half:], strict=True))
    half = len(losses) // 2
    for before, after in zip(losses[:half], losses[half:], strict=True):
        assert all(torch.equal(before[name].values, after[name].values) for name in before)
    assert len(results[0]) == len(results[1]) >= 2
    for before, after in zip(*results, strict=True):
        for name, pair in before.items():
            assert torch.equal(pair.down, after[name].down) and torch.equal(pair.up, after[name].up)
