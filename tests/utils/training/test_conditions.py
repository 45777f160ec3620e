"""A condition that does not reach the model ends a run before its first step; the check itself leaves no trace."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import test_wan_control_lora
import train_wan_lora
import utils.encoding.conditioning
from tests.checkout import copy_prompts
from tests.media import video
from tests.tiny import IMAGE_DIM, TINY_SHAPE, tiny_shape, tiny_transformer, write_model
from utils.adapters.attach import AdapterOptions, LoraAdapter, plan_adapter
from utils.adapters.lora_reader import read_lora
from utils.common.errors import UserError
from utils.common.tensor_files import read_tensors
from utils.encoding.conditioning import Batch, Cond
from utils.training.conditions import check_conditions
from utils.training.memory import Memory, prepare
from wan.configs import FAMILIES, Family
from wan.modules.model import WanModel

T2V, I2V = FAMILIES["wan2.1-t2v-1.3B"], FAMILIES["wan2.1-i2v-14B-480P"]
TI2V, I2V22 = FAMILIES["wan2.2-ti2v-5B"], FAMILIES["wan2.2-i2v-A14B"]
FLF2V = FAMILIES["wan2.1-flf2v-14B-720P"]
ROWS = {"t2v": T2V, "i2v": I2V, "flf2v": FLF2V, "5b": TI2V, "i2v-a14b": I2V22}


def make_batch(family: Family, control: bool = False) -> Batch:
    """One clip of the family, with everything that it is conditioned on."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    extra = family.in_dim - family.out_dim + control * family.out_dim
    cond = Cond(
        draw(5, TINY_SHAPE.text_dim),
        draw(extra, 2, 4, 4) if extra else None,
        draw(257 * len(family.given), IMAGE_DIM) if family.clip else None,
        draw(family.out_dim, 1, 4, 4) if family.given_as == "latents" else None,
    )
    return Batch(draw(family.out_dim, 2, 4, 4), cond)


def make_adapter(family: Family, control: bool = False, checkpointing: str = "none") -> LoraAdapter:
    torch.manual_seed(0)
    with torch.device("meta"):
        layout = WanModel(tiny_shape(family))
    plan = plan_adapter(AdapterOptions(lora_rank=2, control_lora=control), layout)
    return prepare(tiny_transformer(tiny_shape(family)), Memory(checkpointing), plan.attach)


def zero(*names: str, part: slice = slice(None)) -> Callable[[WanModel], None]:
    """Cuts a path by zeros in these weights, or in some inputs of a kernel."""

    def cut(model: WanModel) -> None:
        for found, parameter in model.named_parameters():
            if found.replace(".base_layer", "").endswith(names):
                parameter.data[:, part] = 0

    return cut


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("family", ROWS.values(), ids=ROWS)
def test_a_model_that_reads_all_its_conditions_passes(family, control):
    for checkpointing in ("none", "full") if control else ("none",):
        check_conditions(
            make_adapter(family, control, checkpointing), make_batch(family, control), 0.5, family.given, control
        )


@pytest.mark.parametrize(
    ("family", "cut", "name"),
    [
        (T2V, zero("text_embedding.2.weight"), "text"),
        (I2V, zero("patch_embedding.weight", part=slice(16, 36)), "channels of the given first frame"),
        (I2V22, zero("patch_embedding.weight", part=slice(16, 36)), "channels of the given first frame"),
        (I2V, zero("img_emb.proj.3.weight"), "vision tokens of the first frame"),
        (
            FLF2V,
            zero("img_emb.proj.1.weight"),
            "vision tokens of the first frame and the vision tokens of the last frame",
        ),
        (T2V, lambda model: model.head.head.weight.data.fill_(torch.nan), "text"),
    ],
)
def test_a_condition_that_is_cut_off_is_named(family, cut, name):
    adapter = make_adapter(family)
    cut(adapter.model)
    with pytest.raises(UserError, match=f"^the base model does not read the {name}: its weights are damaged"):
        check_conditions(adapter, make_batch(family), 0.5, family.given, False)


def test_an_adapter_does_not_stand_in_for_a_base_that_ignores_a_condition():
    adapter = make_adapter(I2V, control=True)
    zero("patch_embedding.weight", part=slice(16, 36))(adapter.model)
    adapter.parameters["patch_embedding.lora_B.default.weight"].data.fill_(1)
    with pytest.raises(UserError, match="does not read the channels of the given first frame"):
        check_conditions(adapter, make_batch(I2V, control=True), 0.5, I2V.given, True)


def test_a_first_frame_that_is_dropped_on_its_way_is_named(monkeypatch):
    adapter = make_adapter(TI2V)
    monkeypatch.setattr(utils.encoding.conditioning, "hold_first", lambda latents, first, held: latents)
    with pytest.raises(UserError, match="does not read the given first frame"):
        check_conditions(adapter, make_batch(TI2V), 0.5, TI2V.given, False)


def test_a_last_frame_that_is_dropped_on_its_way_is_named_though_the_first_arrives(monkeypatch):
    adapter, predict = make_adapter(FLF2V), utils.encoding.conditioning._predict

    def without_last(model: WanModel, latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        channels, image = cond.channels.clone(), cond.image.clone()
        channels[:, :, -1], image[:, 257:] = 0, 0
        return predict(model, latents, timestep, replace(cond, channels=channels, image=image))

    monkeypatch.setattr(utils.encoding.conditioning, "_predict", without_last)
    lost = "channels of the given last frame and the vision tokens of the last frame"
    with pytest.raises(UserError, match=f"^the base model does not read the {lost}:"):
        check_conditions(adapter, make_batch(FLF2V), 0.5, FLF2V.given, False)


@pytest.mark.parametrize("family", [T2V, I2V, TI2V], ids=lambda family: family.task)
def test_a_control_whose_columns_do_not_reach_the_lora_fails(family):
    adapter, batch = make_adapter(family, control=True), make_batch(family, control=True)
    columns = adapter.parameters["patch_embedding.lora_A.default.weight"].data
    assert columns.shape[1] == family.in_dim + family.out_dim
    saved = columns.clone()
    columns[:, -family.out_dim :] = 0
    with pytest.raises(UserError, match="the control does not reach the LoRA"):
        check_conditions(adapter, batch, 0.5, family.given, True)
    columns.copy_(saved)
    columns[:, : -family.out_dim] = 0  # those of the base's own inputs do not matter to it
    check_conditions(adapter, batch, 0.5, family.given, True)


def test_a_control_of_zeros_fails():
    batch = make_batch(T2V, control=True)
    empty = replace(batch, cond=replace(batch.cond, channels=torch.zeros_like(batch.cond.channels)))
    with pytest.raises(UserError, match="is the control of the longest clip empty"):
        check_conditions(make_adapter(T2V, control=True), empty, 0.5, T2V.given, True)


@pytest.mark.parametrize("family", [I2V, TI2V], ids=lambda family: family.task)
def test_the_check_draws_no_random_number_and_leaves_no_gradient_and_no_value_changed(family):
    adapter, batch = make_adapter(family, control=True), make_batch(family, control=True)
    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    trainable = [name for name, parameter in adapter.model.named_parameters() if parameter.requires_grad]
    state = torch.get_rng_state()
    check_conditions(adapter, batch, 0.5, family.given, True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in adapter.model.parameters())
    assert [name for name, parameter in adapter.model.named_parameters() if parameter.requires_grad] == trainable
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.model.state_dict().items())
    assert torch.equal(batch.cond.channels, make_batch(family, control=True).cond.channels)


# ---------------------------------------------------------------------------------------------------------- in a run


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", copy_prompts(tmp_path / "embeddings"))
    video(tmp_path / "clips" / "a.mp4", frames=5)
    return tmp_path


def train(family: str, flags: str) -> list[Path]:
    """Trains the small model of this test; the LoRA files."""
    if not Path("model").exists():
        write_model(Path("model"), FAMILIES[family])
    usual = "--dataset clips --pretrained_model_name_or_path model --base_res 64 --enlarge --num_workers 0"
    train_wan_lora.main([*usual.split(), "--val_samples", "0", *flags.split()])
    newest = max(Path("outputs").iterdir())
    return sorted(newest.glob("checkpoints/wan-lora*.safetensors"))


def test_a_run_gives_the_same_loras_bit_for_bit_with_and_without_the_check(work, monkeypatch):
    flags = "--control_lora --control_inject_noise 0.1 --expert_phase_steps 1 --max_train_steps 1 --learning_rate 1e-3"
    asked: list[LoraAdapter] = []

    def watched(adapter: LoraAdapter, *args) -> None:
        asked.append(adapter)
        check_conditions(adapter, *args)

    monkeypatch.setattr(train_wan_lora, "check_conditions", watched)
    checked = train("wan2.2-i2v-A14B", flags)
    assert len(asked) == 2 and asked[0].model is not asked[1].model
    monkeypatch.setattr(train_wan_lora, "check_conditions", lambda *_: None)
    plain = train("wan2.2-i2v-A14B", flags)
    names = [f"wan-lora-00000002_{side}_noise.safetensors" for side in ("high", "low")]
    assert [path.name for path in plain] == [path.name for path in checked] == names
    for one, other in zip(plain, checked, strict=True):
        (found, _), (expected, _) = read_tensors(one), read_tensors(other)
        assert found.keys() == expected.keys() and one != other
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_whose_base_ignores_a_condition_ends_before_its_first_step(work, monkeypatch):
    monkeypatch.setattr(utils.encoding.conditioning, "hold_first", lambda latents, first, held: latents)
    with pytest.raises(UserError, match="does not read the given first frame"):
        train("wan2.2-ti2v-5B", "--max_train_steps 1")
    assert not (work / "outputs").exists()


def test_a_lora_that_starts_from_a_picture_says_so_and_is_not_sampled_without_one(work):
    (trained,) = train("wan2.1-t2v-1.3B", "--control_lora --control_i2v --max_train_steps 1")
    assert read_lora(trained).metadata["control_i2v"] == "true"
    flags = f"--lora_path {trained} --pretrained_model_name_or_path model --input_video clips/a.mp4"
    with pytest.raises(UserError, match="trained with --control_i2v: pass the picture to start from as --image"):
        test_wan_control_lora.main(flags.split())
    (plain,) = train("wan2.1-t2v-1.3B", "--control_lora --max_train_steps 1")
    assert "control_i2v" not in read_lora(plain).metadata
