"""Two experts: which are trained, with which options, which answers, and which is on the device."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import utils.storage.load
from tests.experts import A14B, COND, HIGH, LOW, TEXT, Moves, draw, held_pair, in_turns, options
from tests.loras import make_pair
from tests.tiny import TINY_SHAPE, tiny_shape, tiny_transformer, write_model
from tests.trainees import equal
from utils.adapters.attach import LoraAdapter, plan_adapter
from utils.adapters.lora_file import LoraFile, delta
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import write_lora
from utils.common.errors import UserError
from utils.encoding.conditioning import Cond, make_predict
from utils.storage.weights import Storage, hold_as
from utils.training.checkpoint_plan import CheckpointPlan
from utils.training.experts import Experts, Role, base_contents, load_experts, plan_experts
from utils.training.memory import Memory
from wan.checkpoints import ModelFiles, open_model, rotation, transformer_fingerprint
from wan.configs import FAMILIES
from wan.modules.model import WanModel

KEPT = CheckpointPlan("none", 2)
CPU, DEVICE = torch.device("cpu"), torch.device("meta")
SINGLE = FAMILIES["wan2.1-t2v-1.3B"]


# ---------------------------------------------------------------------------------------------------- who is trained


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", [HIGH, LOW]),
        ("--expert both", [HIGH, LOW]),
        ("--expert high", [HIGH]),
        ("--expert low", [LOW]),
        ("--boundary_type high", [HIGH]),
        ("--boundary_type low", [LOW]),
    ],
)
def test_the_experts_that_are_asked_for_are_trained_high_first(flags, names):
    roles = options(flags).roles(A14B)
    assert [role.name for role in roles] == names
    assert [role.expert for role in roles] == [expert for expert in A14B.experts if expert.name in names]
    assert [(role.trainable, role.phase, role.label) for role in roles] == [(name, name, f"{name}: ") for name in names]


@pytest.mark.parametrize("flags", ["", "--expert both", "--expert full", "--boundary_type full"])
def test_a_model_without_experts_is_trained_whole_under_the_names_it_always_had(flags):
    (role,) = options(flags).roles(SINGLE)
    assert (role.name, role.trainable, role.phase, role.label) == ("transformer", "lora", "train", "")
    assert role.opts == options(flags)


@pytest.mark.parametrize(
    ("flags", "family", "message"),
    [
        ("--expert full", A14B, "--expert full means a model without experts, but this one has two"),
        ("--expert high", SINGLE, "--expert high: this model has no experts, leave it out"),
        ("--boundary_type low", SINGLE, "--expert low: this model has no experts"),
        ("--high_lora_rank 4", SINGLE, "--high_lora_rank would be ignored: no high-noise expert is trained"),
        ("--expert high --low_learning_rate 1e-4", A14B, "--low_learning_rate would be ignored: no low-noise expert"),
        ("--expert low --high_max_train_steps 5", A14B, "--high_max_train_steps would be ignored"),
        ("--expert_phase_steps 7 --expert low", A14B, "--expert_phase_steps would be ignored"),
        ("--expert_phase_steps 7", SINGLE, "--expert_phase_steps would be ignored"),
        ("--expert_range all", SINGLE, "--expert_range all would be ignored: this model has no experts"),
    ],
)
def test_what_no_expert_would_use_is_an_error(flags, family, message):
    with pytest.raises(UserError, match=message):
        options(flags).roles(family)


@pytest.mark.parametrize(
    ("flags", "high", "low"),
    [
        ("", (0.9, 1.0), (0.0, 0.9)),
        ("--expert_range own", (0.9, 1.0), (0.0, 0.9)),
        ("--expert_range overlap", (0.85, 1.0), (0.0, 0.95)),
        ("--expert_range all", (0.0, 1.0), (0.0, 1.0)),
    ],
)
def test_each_expert_is_trained_at_the_noise_levels_of_its_range(flags, high, low):
    assert [role.sigmas for role in options(flags).roles(A14B)] == [pytest.approx(high), pytest.approx(low)]
    assert options(f"{flags} --expert low").roles(A14B)[0].sigmas == pytest.approx(low)


def test_each_expert_has_the_options_of_the_run_except_for_its_own():
    own = "--high_learning_rate 1e-4 --high_lora_rank 4 --high_lora_alpha 2 --low_max_train_steps 30 --low_lora_alpha 8"
    high, low = (role.opts for role in options(f"--max_train_steps 70 --lora_rank 32 {own}").roles(A14B))
    assert (high.learning_rate, high.lora_rank, high.alpha, high.max_train_steps) == (1e-4, 4, 2, 70)
    assert (low.learning_rate, low.lora_rank, low.alpha, low.max_train_steps) == (1e-5, 32, 8, 30)
    assert (high.optimizer_spec.learning_rate, high.optimizer_spec.total_steps) == (1e-4, 70)
    assert low.optimizer_spec.total_steps == 30
    assert options("--low_lora_rank 8").roles(A14B)[1].opts.alpha == 8  # follows the rank, as without experts


def test_a_warm_up_is_measured_against_the_steps_of_each_expert():
    with pytest.raises(UserError, match="--lr_warmup_steps 50 must be below the 20 steps"):
        options("--lr_warmup_steps 50 --low_max_train_steps 20").roles(A14B)
    long = "--lr_warmup_steps 1500 --high_max_train_steps 2000 --low_max_train_steps 2000"
    assert len(options(long).roles(A14B)) == 2


def test_steps_of_its_own_take_the_place_of_epochs_for_one_expert():
    high, low = (role.opts for role in options("--epochs 2 --high_max_train_steps 3").roles(A14B))
    assert (high.epochs, high.max_train_steps, low.epochs) == (0, 3, 2)


def test_a_zero_is_a_value_of_its_own():
    high, low = (role.opts for role in options("--high_learning_rate 0").roles(A14B))
    assert (high.learning_rate, low.learning_rate) == (0, 1e-5)


# ------------------------------------------------------------------------------------------------- who is on the device


def adapted_pair() -> dict[str, WanModel]:
    """Two experts, each with a LoRA."""
    models = {name: tiny_transformer(tiny_shape(A14B), seed) for seed, name in enumerate((HIGH, LOW))}
    for model in models.values():
        plan_adapter(options(), build_meta(model)).attach(model)
    return models


def build_meta(model: WanModel) -> WanModel:
    with DEVICE:
        return WanModel(model.shape)


def frozen(model: WanModel) -> set[str]:
    weights = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return weights | {name for name, _ in model.named_buffers()}


def test_base_weights_go_where_they_are_needed_and_trained_matrices_stay_on_the_device():
    models = adapted_pair()
    for model in models.values():
        model.register_buffer("table", torch.ones(3))
    trained = {name for name, parameter in models[HIGH].named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained) and frozen(models[HIGH])
    with Moves(models) as moves:
        experts = Experts(models, A14B.boundaries, DEVICE)
        assert {(model, device) for model, _, device in moves.seen} == {(HIGH, "meta"), (LOW, "meta")}
        assert sorted(name for _, name, _ in moves.seen) == sorted(2 * list(trained))

        moves.seen.clear()
        experts.activate(HIGH)
        assert experts.active == HIGH and moves.seen == []

        experts.activate(LOW)
        left, came = moves.seen[::2], moves.seen[1::2]  # in turns, so that neither device ever holds both
        assert experts.active == LOW and len(left) == len(came) == len(frozen(models[HIGH]))
        assert {(model, device) for model, _, device in left} == {(HIGH, "cpu")}
        assert {(model, device) for model, _, device in came} == {(LOW, "meta")}
        assert [name for _, name, _ in left] == [name for _, name, _ in came]
        assert {name for _, name, _ in left} == frozen(models[LOW])


def test_what_is_moved_away_and_back_is_still_the_same_parameter_with_the_same_values():
    models = {name: tiny_transformer(tiny_shape(A14B), seed) for seed, name in enumerate((HIGH, LOW))}
    before = dict(models[HIGH].named_parameters())
    values = {name: parameter.clone() for name, parameter in before.items()}
    experts = Experts(models, A14B.boundaries, CPU)
    experts.activate(LOW)
    experts.activate(HIGH)
    assert all(parameter is before[name] for name, parameter in models[HIGH].named_parameters())
    assert all(torch.equal(parameter, values[name]) for name, parameter in models[HIGH].named_parameters())


@torch.no_grad()
def test_the_expert_of_a_timestep_answers_and_the_boundary_is_the_high_ones():
    models = {name: tiny_transformer(tiny_shape(A14B), seed) for seed, name in enumerate((HIGH, LOW))}
    experts = Experts(models, A14B.boundaries, CPU)
    for timestep, name in ((1000.0, HIGH), (899.9, LOW), (900.0, HIGH), (0.0, LOW)):
        found = experts.predict(draw(), torch.tensor([timestep]), COND)
        assert torch.equal(found, make_predict(models[name])(draw(), torch.tensor([timestep]), COND))
        assert experts.active == name


@torch.no_grad()
def test_a_model_of_one_transformer_answers_at_every_timestep_and_is_never_moved():
    model = tiny_transformer()
    with Moves({"transformer": model}) as moves:
        predict = Experts({"transformer": model}, (), DEVICE).predict
        assert moves.seen == []
    for timestep in (1000.0, 0.0):
        expected = make_predict(model)(draw(), torch.tensor([timestep]), Cond(TEXT))
        assert torch.equal(predict(draw(), torch.tensor([timestep]), Cond(TEXT)), expected)


def test_a_span_brings_the_expert_and_opens_its_adapter():
    models = adapted_pair()
    experts, adapter = Experts(models, A14B.boundaries, CPU), LoraAdapter(models[LOW], options())
    seen = []
    with experts.speaking(LOW, adapter.speaking):
        seen.append(experts.active)
        with pytest.raises(ZeroDivisionError), experts.speaking(HIGH, adapter.speaking):
            raise ZeroDivisionError
    assert seen == [LOW] and experts.active == HIGH
    assert experts.patch_size == (1, 2, 2)


# --------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.2-I2V-A14B", A14B))


def load(files: ModelFiles, flags: str, with_others: bool) -> tuple[list[Role], Experts, dict[str, LoraAdapter]]:
    roles = options(flags).roles(files.family)
    return roles, *load_experts(
        roles, plan_experts(roles, files), files, Memory(), KEPT, hold_as("auto", CPU), with_others
    )


def ranks(model: WanModel) -> set[int]:
    return {len(tensor) for name, tensor in model.named_parameters() if "lora_A" in name}


def test_each_trained_expert_gets_its_own_lora(files):
    roles, experts, adapters = load(files, "--lora_rank 4 --low_lora_rank 2", with_others=False)
    assert list(experts.models) == list(adapters) == [HIGH, LOW] == [role.name for role in roles]
    assert [ranks(model) for model in experts.models.values()] == [{4}, {2}]
    assert all(adapters[name].model is model for name, model in experts.models.items())
    assert experts.boundaries == (0.9,) and experts.active == HIGH


@pytest.mark.parametrize("with_others", [False, True])
def test_an_expert_that_is_not_trained_serves_previews_as_it_is_or_is_not_loaded(files, with_others):
    _, experts, adapters = load(files, "--expert low", with_others)
    assert list(adapters) == [LOW] and list(experts.models) == ([HIGH, LOW] if with_others else [LOW])
    if with_others:
        base = tiny_transformer(tiny_shape(A14B), 0)
        state = experts.models[HIGH].state_dict()
        assert state.keys() == base.state_dict().keys()
        assert all(torch.equal(state[name].float(), tensor) for name, tensor in base.state_dict().items())
        assert not any(parameter.requires_grad for parameter in experts.models[HIGH].parameters())


def fused_file(folder: Path, name: str, **metadata: str) -> Path:
    """A LoRA for one layer of the small experts."""
    shape = (TINY_SHAPE.dim, TINY_SHAPE.dim)
    write_lora(folder / name, LoraFile({"blocks.0.self_attn.q": make_pair(shape)}, metadata=metadata))
    return folder / name


def change(model: WanModel, seed: int) -> Tensor:
    """What the base weights of the small expert with this seed have become in one layer."""
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    name = "blocks.0.self_attn.q.weight"
    return weights[name] - tiny_transformer(tiny_shape(A14B), seed).state_dict()[name]


def test_a_fused_pair_reaches_the_expert_that_only_serves_previews_too(files, tmp_path, capsys):
    pair = [fused_file(tmp_path, f"speed_{name}.safetensors") for name in (HIGH, LOW)]
    _, experts, adapters = load(files, f"--expert high --fuse_lora {tmp_path / 'speed.safetensors'}", with_others=True)
    said = [f"fused into the base model: speed_{name}.safetensors at 1" for name in (HIGH, LOW)]
    assert list(adapters) == [HIGH] and capsys.readouterr().out.splitlines() == said
    for seed, (name, path) in enumerate(zip((HIGH, LOW), pair, strict=True)):
        expected = delta(read_lora(path).pairs["blocks.0.self_attn.q"])
        torch.testing.assert_close(change(experts.models[name], seed), expected, rtol=1e-4, atol=1e-5)


def test_a_fused_lora_of_one_expert_leaves_the_other_as_it_is_and_says_so(files, tmp_path, capsys):
    path = fused_file(tmp_path, "style.safetensors", expert=LOW)
    _, experts, _ = load(files, f"--fuse_lora {path}", with_others=False)
    assert "no --fuse_lora for the high_noise expert: it is not changed" in capsys.readouterr().out
    assert change(experts.models[HIGH], 0).abs().max() == 0 < change(experts.models[LOW], 1).abs().max()


def test_a_fused_lora_of_an_expert_that_is_not_trained_is_refused(files, tmp_path):
    path = fused_file(tmp_path, "style.safetensors", expert=HIGH)
    with pytest.raises(UserError, match=r"--fuse_lora .*style.safetensors is not for the low_noise expert"):
        plan_experts(options(f"--expert low --fuse_lora {path}").roles(A14B), files)


def test_what_is_trained_on_is_known_by_content(files, tmp_path):
    pair = [fused_file(tmp_path, f"speed_{name}.safetensors") for name in (HIGH, LOW)]
    hashes = {f"the base model's {name}": transformer_fingerprint(each) for name, each in files.transformers.items()}
    assert base_contents(options().roles(A14B), files) == hashes and len(set(hashes.values())) == 2
    (low,) = options("--expert low").roles(A14B)
    assert base_contents([low], files).keys() == {"the base model's low_noise"}
    asked = {f"--high_lora {path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in pair[:1]}
    assert base_contents([low], files, {"high_lora": pair[0]}) == hashes | asked
    on_top = options(f"--fuse_lora {tmp_path / 'speed.safetensors'}").roles(A14B)
    fused = {f"--fuse_lora {path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in pair}
    assert base_contents(on_top, files) == hashes | fused


def test_too_little_main_memory_for_the_expert_that_waits_is_reported_before_it_is_read(files, monkeypatch):
    roles = options().roles(A14B)
    monkeypatch.setattr(utils.storage.load.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    plans = plan_experts(roles, files)
    experts, _ = load_experts(roles[:1], plans, files, Memory(), KEPT, hold_as("auto", CPU), with_others=False)
    assert list(experts.models) == [HIGH]
    with pytest.raises(UserError, match="in main memory at any time: it takes 0.36 MB, and"):
        load_experts(roles, plans, files, Memory(), KEPT, hold_as("auto", DEVICE), with_others=False)


# ------------------------------------------------------------------------------------------ weights in main memory


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("count", [1, 2])
def test_experts_whose_blocks_are_swapped_give_the_numbers_of_those_that_are_moved_bit_for_bit(files, format, count):
    found = in_turns(files, Storage(CPU, torch.float32, format, num_streamed=count))
    assert equal(found, in_turns(files, Storage(CPU, torch.float32, format)))


def test_of_experts_whose_blocks_are_swapped_all_blocks_are_in_main_memory_and_share_their_slots(files):
    experts, _ = held_pair(files, Storage(CPU, torch.float32, "int8", num_streamed=1))
    high, low = experts._streams
    assert list(high.hosts) == list(low.hosts) == [0, 1] and high._ring is low._ring
    for name in ("blocks.0.ffn.0", "blocks.1.self_attn.q"):
        layers = [experts.models[each].get_submodule(name).get_base_layer() for each in (HIGH, LOW)]
        assert layers[0].weight.data_ptr() == layers[1].weight.data_ptr()
        assert all(stream.holds(layer.weight) for stream in experts._streams for layer in layers)


def test_the_rotation_that_all_layers_share_is_on_the_device_and_is_not_moved(files):
    experts, _ = held_pair(files, Storage(CPU, torch.float32, "int8"))
    shared = rotation(16, CPU)
    layers = [module for model in experts.models.values() for module in model.modules() if hasattr(module, "mixed_by")]
    assert len(layers) == 40 and all(layer.mixed_by is shared for layer in layers)
    with Moves(experts.models):
        experts.device = DEVICE
        experts.activate(LOW)
    assert shared.device == CPU and all(layer.mixed_by is shared for layer in layers)
    assert not any("mixed_by" in name for model in experts.models.values() for name, _ in model.named_buffers())


def test_a_switch_moves_only_what_is_in_no_stream(files):
    experts, _ = held_pair(files, Storage(CPU, torch.float32, "int8", num_streamed=1))
    models = experts.models
    streamed = {name for name, _ in models[HIGH].named_parameters() if name.endswith("base_layer.weight")}
    streamed |= {name.replace(".weight", ".scale") for name in streamed}
    experts.device = DEVICE
    with Moves(models) as moves:
        experts.activate(LOW)
    moved = {name for _, name, _ in moves.seen}
    assert len(streamed) == 40 and moved == frozen(models[HIGH]) - streamed
    assert {(model, device) for model, _, device in moves.seen} == {(HIGH, "cpu"), (LOW, "meta")}
