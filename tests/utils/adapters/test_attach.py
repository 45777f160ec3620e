"""Which adapter speaks, and what is decided about an adapter before the model's weights are loaded."""

from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from tests.adapted import ALPHA, RANK, adapted, fill, inputs
from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.attach import AdapterOptions, plan_adapter
from utils.adapters.lora import ADAPTER, add_lora, extract_lora, is_plain, select_modules, speaking
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import write_lora
from utils.adapters.provenance import read_records
from utils.common.errors import UserError
from utils.media.controls import ControlSignal
from utils.training.memory import Memory, prepare
from wan.configs import FAMILIES
from wan.modules.model import WanModel

# --------------------------------------------------------------------------------------------------------- the teacher


@pytest.mark.parametrize("checkpointed", [False, True])
def test_with_adapters_off_the_model_is_its_base_bit_for_bit(checkpointed):
    with torch.no_grad():
        expected = tiny_transformer()(*inputs())
    model, parameters = adapted()
    if checkpointed:
        prepare(model, Memory("full"), lambda _: None)
    with torch.no_grad():
        before = model(*inputs())
        with speaking(model, None):
            assert torch.equal(model(*inputs()), expected)
        assert torch.equal(model(*inputs()), before) and not torch.equal(before, expected)
    assert all(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_student_learns_the_same_with_its_teacher_asked_between_forward_and_backward(checkpointed):
    gradients = []
    for teacher_last in (False, True):
        model, parameters = adapted()
        if checkpointed:
            prepare(model, Memory("full"), lambda _: None)
        student = model(*inputs()) if teacher_last else None
        with torch.no_grad(), speaking(model, None):
            target = model(*inputs())
        student = model(*inputs()) if student is None else student
        (student - target).square().mean().backward()
        gradients.append([parameter.grad for parameter in parameters])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_an_exception_in_the_teacher_brings_the_adapters_back():
    model, parameters = adapted()
    with torch.no_grad():
        expected = model(*inputs())
        with pytest.raises(ZeroDivisionError), speaking(model, None):
            raise ZeroDivisionError
        assert torch.equal(model(*inputs()), expected)
    assert all(parameter.requires_grad for parameter in parameters)


def test_only_adapters_are_trainable_after_the_teacher_has_spoken():
    model, parameters = adapted()
    with speaking(model, None):
        pass
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}


def test_each_of_two_adapters_speaks_in_its_own_span_and_learns_from_it_alone():
    model = tiny_transformer()
    names = select_modules(model, ["attn"])
    student, critic = (add_lora(model, names, RANK, ALPHA, adapter) for adapter in ("student", "critic"))
    fill(student, seed=1)
    fill(critic, seed=2)
    prepare(model, Memory("full"), lambda _: None)
    answers = {}
    for adapter, own, other in (("student", student, critic), ("critic", critic, student)):
        with speaking(model, adapter):
            velocity = model(*inputs())
            velocity.square().mean().backward()
        answers[adapter] = velocity.detach()
        assert all(parameter.grad is not None for parameter in own)
        assert all(parameter.grad is None for parameter in other)
        model.zero_grad()
    for adapter, parameters in (("student", student), ("critic", critic)):
        alone = tiny_transformer()
        for mine, theirs in zip(add_lora(alone, names, RANK, ALPHA), parameters, strict=True):
            mine.data = theirs.data.clone()
        assert torch.equal(alone(*inputs()), answers[adapter])


def test_adapters_of_one_model_may_adapt_different_layers():
    model = tiny_transformer()
    few, many = select_modules(model, ["self_attn.q"]), select_modules(model, ["attn"])
    fill(add_lora(model, many, RANK, ALPHA, adapter="student"), seed=1)
    critic = add_lora(model, few, RANK, ALPHA, adapter="critic")
    fill(critic, seed=2)
    alone = tiny_transformer()
    for mine, theirs in zip(add_lora(alone, few, RANK, ALPHA), critic, strict=True):
        mine.data = theirs.data.clone()
    with torch.no_grad(), speaking(model, "critic"):
        assert torch.equal(model(*inputs()), alone(*inputs()))
    assert extract_lora(model, {}, adapter="critic").pairs.keys() == set(few)
    assert extract_lora(model, {}, adapter="student").pairs.keys() == set(many)


def test_a_span_of_the_adapter_that_speaks_already_switches_no_layer(monkeypatch):
    model, _ = adapted()
    for switch in ("set_adapter", "enable_adapters"):
        monkeypatch.setattr(LoraLayer, switch, None)
    with speaking(model, ADAPTER):
        pass
    with pytest.raises(TypeError), speaking(model, None):
        pass


def test_a_span_reaches_every_adapted_layer_in_a_block_and_outside():
    model = tiny_transformer()
    add_lora(model, [*select_modules(model, ["all-linear"]), "patch_embedding"], RANK, ALPHA)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with speaking(model, None):
        assert all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers) and len(layers) == 21


def test_two_control_adapters_share_the_widened_input():
    plan, model = plan_adapter(options(control_lora=True), layout()), tiny_transformer()
    for name in ("student", "critic"):
        assert f"patch_embedding.lora_A.{name}.weight" in plan.attach(model, name).parameters


def test_a_checkpointed_block_recomputes_with_the_adapter_of_its_span():
    gradients = []
    for checkpointed in (False, True):
        model = tiny_transformer()
        names = select_modules(model, ["attn"])
        student, critic = (add_lora(model, names, RANK, ALPHA, adapter) for adapter in ("student", "critic"))
        fill(student, seed=1)
        fill(critic, seed=2)
        if checkpointed:
            prepare(model, Memory("full"), lambda _: None)
        with speaking(model, "student"):
            loss = model(*inputs()).square().mean()
            with torch.no_grad(), speaking(model, "critic"):
                model(*inputs())
            loss.backward()
        gradients.append([parameter.grad for parameter in student])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_an_adapter_that_is_not_plain_keeps_the_forward_of_peft():
    from peft import LoraConfig, inject_adapter_in_model

    for settings in ({"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}):
        model = nn.Sequential(nn.Linear(8, 8))
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], **settings), model, "default")
        assert not is_plain(model[0], "default"), settings
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), plain := nn.Sequential(nn.Linear(8, 8)), "default")
    assert is_plain(plain[0], "default")


# ------------------------------------------------------------------------------------------------------------ the plan


def options(**changes) -> AdapterOptions:
    return AdapterOptions(**{"lora_rank": 4} | changes)


def layout() -> WanModel:
    with torch.device("meta"):
        return WanModel(TINY_SHAPE)


def test_an_adapter_is_planned_without_weights_and_attached_to_a_model_that_has_them():
    plan = plan_adapter(options(lora_target=("ffn.*",), lora_blocks="1"), layout())
    adapter = plan.attach(tiny_transformer())
    names = {f"blocks.1.ffn.{layer}.lora_{x}.default.weight" for layer in (0, 2) for x in "AB"}
    assert adapter.parameters.keys() == names
    assert adapter.describe() == "1,152 trainable parameters: rank 4, alpha 4"


def test_copies_of_an_adapter_begin_with_its_values_and_the_first_answers():
    model = tiny_transformer()
    plan = replace(plan_adapter(options(), layout()), copies=("critic",))
    first = plan.attach(model)
    other = first.named("critic")
    assert len(first.parameters) == len(other.parameters) > 0
    pairs = list(zip(first.parameters.values(), other.parameters.values(), strict=True))
    assert all(torch.equal(own, copied) and own is not copied for own, copied in pairs)
    fill(first.parameters.values(), seed=1)
    before = model(*inputs())
    with first.speaking():
        assert torch.equal(model(*inputs()), before)
    with other.speaking():
        assert not torch.equal(model(*inputs()), before)
    other.take_values(first, 0.25)
    for (name, own), copied in zip(first.parameters.items(), other.parameters.values(), strict=True):
        assert torch.allclose(copied, 0.25 * own) if "lora_B" in name else not torch.equal(own, copied)


def test_a_control_lora_widens_the_input_by_the_latents_of_its_control():
    adapter = plan_adapter(options(control_lora=True), layout()).attach(tiny_transformer())
    assert adapter.model.patch_embedding.base_layer.in_channels == 32
    assert "patch_embedding.lora_A.default.weight" in adapter.parameters


def test_a_fused_lora_is_added_while_loading_and_changes_the_answer_as_the_adapter_did(tmp_path):
    trained, _ = adapted()
    write_lora(tmp_path / "lora.safetensors", extract_lora(trained, {}))
    plan = plan_adapter(options(fuse_lora=tmp_path / "lora.safetensors"), layout())
    model = tiny_transformer()
    place = plan.place(lambda name, tensor: tensor)
    model.load_state_dict({name: place(name, tensor) for name, tensor in model.state_dict().items()})
    torch.testing.assert_close(model(*inputs()), trained(*inputs()), rtol=1e-3, atol=1e-5)


def test_a_lora_of_a_sibling_is_fused_as_far_as_it_fits_and_the_plan_says_what_does_not(tmp_path):
    sibling = tiny_transformer(replace(TINY_SHAPE, in_dim=36, image_dim=20))
    fill(add_lora(sibling, select_modules(sibling, ["all-linear"]), RANK, ALPHA))
    write_lora(tmp_path / "i2v.safetensors", extract_lora(sibling, {}))
    plan = plan_adapter(options(fuse_lora=tmp_path / "i2v.safetensors"), layout())
    fused, note = plan.notes
    assert fused == "fused into the base model: i2v.safetensors at 1"
    assert note.startswith("6 of 26 modules of ") and "i2v.safetensors are not in this model" in note
    assert plan.fusion is not None and len(plan.fusion.targets) == 20
    with pytest.raises(UserError, match="it adapts 6 modules, such as .*that this run does not"):
        plan_adapter(options(init_lora=tmp_path / "i2v.safetensors", lora_target=("all-linear",)), layout())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_target": ("attention",)}, "matches no layer"),
        ({"lora_blocks": "7"}, "the model has blocks 0 to 1"),
        (
            {"lora_rank": 8, "lora_target": ("all-linear",), "init_lora": "lora.safetensors"},
            "it has rank 4 and alpha 6, this",
        ),
        ({"init_lora": "lora.safetensors"}, "it adapts .*that this run does not"),
        ({"init_lora": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"fuse_lora": "deep.safetensors"}, "blocks.7.self_attn.q.weight, which this model does not have"),
    ],
)
def test_what_cannot_work_is_refused_without_weights(tmp_path, changes, message):
    lora = extract_lora(adapted()[0], {})
    write_lora(tmp_path / "lora.safetensors", lora)
    pairs = {"blocks.7.self_attn.q": next(iter(lora.pairs.values()))}
    write_lora(tmp_path / "deep.safetensors", LoraFile(pairs))
    paths = {name: tmp_path / value for name, value in changes.items() if name.endswith("_lora")}
    with pytest.raises(UserError, match=message):
        plan_adapter(options(**changes | paths), layout())


TWO = ("high_noise", "low_noise")


def fused_value(plan) -> float:
    """What the fused LoRA of a plan is filled with."""
    tensors = {"blocks.0.self_attn.q.weight": torch.zeros(TINY_SHAPE.dim, TINY_SHAPE.dim)}
    return plan.place(lambda name, tensor: tensor)("blocks.0.self_attn.q.weight", *tensors.values())[0, 0].item()


def constant(value: float) -> LoraFile:
    width = TINY_SHAPE.dim
    return LoraFile({"blocks.0.self_attn.q": LoraPair(torch.full((2, width), value), torch.ones(width, 2), 2.0)})


def test_of_a_pair_each_expert_starts_from_and_is_fused_with_its_own(tmp_path):
    for value, expert in ((1.0, "high_noise"), (2.0, "low_noise")):
        write_lora(tmp_path / f"fox_{expert}.safetensors", constant(value))
    own = {"lora_rank": 2, "lora_target": ("self_attn.q",), "lora_blocks": "0"}
    for value, expert in ((1.0, "high_noise"), (2.0, "low_noise")):
        path = tmp_path / "fox.safetensors"
        plan = plan_adapter(options(init_lora=path, fuse_lora=path, **own), layout(), expert, TWO)
        assert plan.init.pairs["blocks.0.self_attn.q"].down.eq(value).all()
        assert fused_value(plan) == pytest.approx(2 * value)
        matrices = plan.attach(tiny_transformer()).parameters
        assert matrices["blocks.0.self_attn.q.lora_A.default.weight"].eq(value).all()


def test_the_lora_of_one_expert_is_not_fused_into_the_other_and_cannot_start_it(tmp_path):
    path = tmp_path / "fox_low_noise.safetensors"
    write_lora(path, constant(1.0))
    assert plan_adapter(options(fuse_lora=path), layout(), "low_noise", TWO).fusion is not None
    assert plan_adapter(options(fuse_lora=path), layout(), "high_noise", TWO).fusion is None
    with pytest.raises(
        UserError, match=r"--init_lora .* is not for the high_noise expert: give a pair, or see --expert"
    ):
        plan_adapter(options(init_lora=path), layout(), "high_noise", TWO)
    write_lora(tmp_path / "any.safetensors", constant(1.0))
    assert all(plan_adapter(options(fuse_lora=tmp_path / "any.safetensors"), layout(), e, TWO).fusion for e in TWO)


def test_a_control_that_starts_from_a_picture_is_for_models_that_are_given_no_frames():
    assert options(control_type="tile").control_signal is None
    assert options(control_lora=True, control_i2v=True).control_signal == ControlSignal("tile", keeps_first=True)
    for family in FAMILIES.values():
        options(control_lora=True).check_control(family)
        opts = options(control_lora=True, control_i2v=True)
        if family.task == "t2v":
            opts.check_control(family)
        else:
            with pytest.raises(UserError, match="--control_i2v is for models that are given no frames"):
                opts.check_control(family)


@pytest.mark.parametrize("inputs", [(16, 32), (36, 52)])
def test_a_control_lora_reads_its_control_after_all_that_the_model_reads(inputs):
    own, widened = inputs
    with torch.device("meta"):
        model = WanModel(replace(TINY_SHAPE, in_dim=own))
    adapter = plan_adapter(options(control_lora=True), model).attach(tiny_transformer(replace(TINY_SHAPE, in_dim=own)))
    base = adapter.model.patch_embedding.base_layer.weight
    assert base.shape[1] == widened and base[:, own:].eq(0).all() and base[:, :own].ne(0).any()


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_matrices_have_the_dtype_that_was_asked_for_on_the_model_and_in_the_file(tmp_path, name, dtype):
    opts = options(adapter_dtype=name, control_lora=True)
    adapter = plan_adapter(opts, layout()).attach(tiny_transformer())
    assert all(parameter.dtype == dtype for parameter in adapter.parameters.values())
    assert adapter.describe().endswith("alpha 4, bf16" if name == "bf16" else "alpha 4")
    adapter.export(tmp_path / "lora.safetensors", adapter.parameters, {})
    averages = {key: parameter.detach().float() for key, parameter in adapter.parameters.items()}
    adapter.export(tmp_path / "average.safetensors", averages, {})
    for file, expected in (("lora", dtype), ("average", torch.float32)):
        pairs = read_lora(tmp_path / f"{file}.safetensors").pairs.values()
        assert {matrix.dtype for pair in pairs for matrix in (pair.down, pair.up)} == {expected}


def test_an_exported_adapter_holds_the_values_that_it_is_given_and_says_what_it_is(tmp_path):
    adapter = plan_adapter(options(lora_alpha=2.0), layout()).attach(tiny_transformer())
    ones = {name: torch.ones_like(parameter) for name, parameter in adapter.parameters.items()}
    adapter.export(tmp_path / "lora.safetensors", ones, {"base_model": "model"})
    lora = read_lora(tmp_path / "lora.safetensors")
    assert all(pair.down.eq(1).all() and pair.up.eq(1).all() and pair.alpha == 2 for pair in lora.pairs.values())
    network = {"ss_network_dim": "4", "ss_network_alpha": "2"}
    assert lora.metadata == {"rank": "4", "alpha": "2", "targets": "attn", "base_model": "model"} | network
    assert not any(parameter.eq(1).all() for parameter in adapter.parameters.values())


def test_the_files_of_an_adapter_say_what_was_fused_into_its_base(tmp_path):
    write_lora(tmp_path / "style.safetensors", constant(1.0))
    plan = plan_adapter(options(fuse_lora=tmp_path / "style.safetensors", fuse_lora_weight=0.5), layout())
    adapter = replace(plan, facts={**plan.facts, "base_model_hash": "00"}).attach(tiny_transformer())
    adapter.export(tmp_path / "fox.safetensors", adapter.parameters, {"steps": "7"})
    metadata = read_lora(tmp_path / "fox.safetensors").metadata
    (fused,) = read_records(metadata, tmp_path)
    assert (fused.name, fused.weight) == ("style.safetensors", 0.5) and metadata["base_model_hash"] == "00"
    # For the expert that it is not for, the LoRA says that nothing was.
    write_lora(tmp_path / "half_low_noise.safetensors", constant(1.0))
    other = plan_adapter(options(fuse_lora=tmp_path / "half_low_noise.safetensors"), layout(), "high_noise", TWO)
    assert other.facts == {"fused_lora": "[]"} and plan_adapter(options(), layout()).facts == {}


def test_a_lora_whose_record_is_damaged_is_not_fused(tmp_path):
    write_lora(tmp_path / "fox.safetensors", replace(constant(1.0), metadata={"fused_lora": "yes"}))
    with pytest.raises(UserError, match=r"\nGet the file again, or remove fused_lora from its metadata: it is then"):
        plan_adapter(options(fuse_lora=tmp_path / "fox.safetensors"), layout())


def test_a_beginning_whose_record_is_damaged_is_noted(tmp_path):
    write_lora(tmp_path / "fox.safetensors", replace(constant(1.0), metadata={"fused_lora": "yes"}))
    same = {"lora_rank": 2, "lora_alpha": 2, "lora_target": ("self_attn.q",), "lora_blocks": "0"}
    plan = plan_adapter(options(init_lora=tmp_path / "fox.safetensors", **same), layout())
    said, note = plan.notes
    assert said == f"starting from {tmp_path / 'fox.safetensors'}"
    assert note.startswith(f"note: {tmp_path / 'fox.safetensors'}: the metadata fused_lora does not say what")
