"""Several LoRAs become part of a model while it is loaded, one after another."""

import pytest
import torch

from tests.adapted import ALPHA, RANK, fill, inputs
from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.fusion import Fusion, fuse_lora, read_fusion
from utils.adapters.lora import add_lora, extract_lora, select_modules, widen_patch_embedding
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from utils.adapters.provenance import FusedFile, FusedRecord
from utils.common.errors import UserError
from wan.modules.model import WanModel


def write(path, seed: int, control: bool = False) -> LoraFile:
    model = tiny_transformer()
    modules = select_modules(model, ["attn"])
    if control:
        widen_patch_embedding(model, 32)
        modules.append("patch_embedding")
    fill(add_lora(model, modules, RANK, ALPHA), seed)
    lora = extract_lora(model, {})
    write_lora(path, lora)
    return lora


def file(path, weight: float) -> FusedFile:
    return FusedFile(path, FusedRecord(path.name, "0" * 64, weight))


def layout() -> WanModel:
    with torch.device("meta"):
        return WanModel(TINY_SHAPE)


@torch.no_grad()
def loaded(fusion: Fusion) -> WanModel:
    """A model whose weights went through the fusion."""
    model, state = tiny_transformer(), tiny_transformer().state_dict()
    fusion.widen(model)
    place = fusion.place(lambda _, tensor: tensor.clone())
    model.load_state_dict({name: place(name, tensor) for name, tensor in state.items()})
    return model


def test_each_is_added_at_its_weight_as_if_the_others_were_in_the_model_already(tmp_path):
    first, second = write(tmp_path / "a.safetensors", 1), write(tmp_path / "b.safetensors", 2)
    empty = layout()
    fusion, notes = read_fusion(empty, [file(tmp_path / "a.safetensors", 0.5), file(tmp_path / "b.safetensors", -2.0)])
    expected = tiny_transformer()
    fuse_lora(expected, first, 0.5)
    fuse_lora(expected, second, -2.0)
    found = loaded(fusion)
    assert notes == [] and len(fusion.targets) == 16 and not fusion.reads_control
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert not torch.equal(found(*inputs()), tiny_transformer()(*inputs()))


def test_nothing_is_fused_by_default():
    cast = lambda name, tensor: tensor  # noqa: E731
    assert Fusion().targets == set() and not Fusion().reads_control
    tensor = torch.ones(3)
    assert Fusion().place(cast)("x", tensor) is tensor


def test_a_control_lora_widens_the_model_for_those_after_it_and_the_layout_stays(tmp_path):
    control, plain = (
        write(tmp_path / "c.safetensors", 1, control=True),
        write(tmp_path / "p.safetensors", 2, control=True),
    )
    # One that changes the patch embedding alone was made for the inputs of the model before.
    narrow = LoraFile({"patch_embedding": LoraPair(torch.ones(2, 16, 1, 2, 2), torch.ones(48, 2, 1, 1, 1), 2.0)})
    write_lora(tmp_path / "n.safetensors", narrow)
    empty = layout()
    files = [file(tmp_path / f"{name}.safetensors", 1.0) for name in "cpn"]
    fusion, notes = read_fusion(empty, files)
    assert fusion.reads_control and empty.patch_embedding.in_channels == 16
    assert len(notes) == 1 and "this model has 32: the first 16 are changed" in notes[0]
    expected = tiny_transformer()
    fuse_lora(expected, control)
    fuse_lora(expected, plain)
    before, weight = expected.patch_embedding.weight, loaded(fusion).patch_embedding.weight
    assert weight.shape[1] == 32 and torch.equal(weight[:, 16:], before[:, 16:])
    torch.testing.assert_close(weight[:, :16], before[:, :16] + 2)


def test_a_lora_that_does_not_fit_is_named(tmp_path):
    write(tmp_path / "a.safetensors", 1)
    pair = LoraPair(torch.ones(2, 7), torch.ones(7, 2), 2.0)
    write_lora(tmp_path / "odd.safetensors", LoraFile({"blocks.0.self_attn.q": pair}))
    with pytest.raises(UserError, match=r"odd\.safetensors: the LoRA has \(7, 7\)"):
        read_fusion(layout(), [file(tmp_path / "a.safetensors", 1.0), file(tmp_path / "odd.safetensors", 1.0)])
