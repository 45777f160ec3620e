import pytest
import torch
from safetensors.torch import load_file

from tests.loras import assert_same, make_lora, make_pair, metadata_of
from utils.adapters.lora_file import LoraError, LoraFile, LoraPair
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import LAYOUTS, to_state_dict, write_lora
from utils.common.tensor_files import has_same_content


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_comfy_to_any_layout_and_back_is_bit_exact(tmp_path, layout, dtype):
    full = layout in ("comfy", "kohya")
    lora = make_lora(control=full or layout == "wantraining", diffs=full, alpha=2.7182817459106445, dtype=dtype)
    first, other, back = (tmp_path / f"{name}.safetensors" for name in ("first", "other", "back"))
    other = tmp_path / "folder" if layout == "peft" else other
    write_lora(first, lora)
    write_lora(other, read_lora(first), layout)
    write_lora(back, read_lora(other))
    assert_same(read_lora(back), lora)
    before, after = load_file(first), load_file(back)
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert metadata_of(first) == metadata_of(back) == lora.metadata
    assert has_same_content(back, *to_state_dict(read_lora(first)))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "peft"])
def test_an_alpha_that_nobody_states_is_not_stated_in_any_layout(tmp_path, layout):
    path, lora = tmp_path / "lora.safetensors", LoraFile({"head.head": make_pair(rank=4, alpha=None)})
    write_lora(path, lora, layout)
    assert read_lora(path).pairs["head.head"].alpha is None and not any("alpha" in key for key in load_file(path))


def test_a_peft_folder_must_state_an_alpha(tmp_path):
    with pytest.raises(LoraError, match="this LoRA states none .head.head.. Give it with --alpha; .* rank, here 4"):
        write_lora(tmp_path / "folder", LoraFile({"head.head": make_pair(rank=4, alpha=None)}), "peft")
    assert not list(tmp_path.iterdir())


def test_keys_are_sorted_and_tensors_are_contiguous_and_share_no_memory(tmp_path):
    buffer = torch.randn(40)
    pair = LoraPair(buffer[:10].view(5, 2).T.requires_grad_(), buffer[10:22].view(6, 2), 2.0)
    lora = LoraFile({"head.head": pair, "blocks.0.ffn.0": pair})
    tensors, _ = to_state_dict(lora, "comfy")
    assert list(tensors) == sorted(tensors) and all(tensor.is_contiguous() for tensor in tensors.values())
    write_lora(tmp_path / "lora.safetensors", lora)
    assert torch.equal(read_lora(tmp_path / "lora.safetensors").pairs["head.head"].down, pair.down)


def test_a_cast_changes_matrices_and_diffs_but_no_alpha_and_no_shape(tmp_path):
    write_lora(tmp_path / "lora.safetensors", make_lora(control=True, diffs=True, alpha=0.1), dtype=torch.bfloat16)
    for key, tensor in load_file(tmp_path / "lora.safetensors").items():
        role = key.rpartition(".")[2]
        wanted = {"alpha": torch.float32, "reshape_weight": torch.int64}.get(role, torch.bfloat16)
        assert tensor.dtype == wanted and (role != "alpha" or (tensor.ndim == 0 and tensor == torch.tensor(0.1)))


@pytest.mark.parametrize(
    ("lora", "layout", "message"),
    [
        (make_lora(control=True), "diffusers", "cannot load a control LoRA.*patch_embedding"),
        (make_lora(diffs=True), "diffusers", "blocks.0.norm3.diff"),
        (make_lora(diffs=True), "wantraining", "blocks.0.norm3.diff"),
        (
            LoraFile({}, {"blocks.0.modulation.diff": torch.ones(6)}),
            "kohya",
            "ComfyUI .* blocks.0.modulation",
        ),
        (
            LoraFile({}, {"blocks.0.modulation.diff": torch.ones(6)}),
            "comfy",
            "ComfyUI .* blocks.0.modulation",
        ),
        (LoraFile({"base_model.model.head.head": make_pair()}), "comfy", "base_model.model.head.head is not"),
        (make_lora(), "lycoris", "no LoRA layout 'lycoris'"),
        (LoraFile({"head.head": make_pair(alpha=torch.inf)}), "comfy", "head.head.alpha"),
        (LoraFile({"head.head": LoraPair(torch.ones(2, 5), torch.ones(6, 2) / 0, 1.0)}), "comfy", "head.head.up"),
        (LoraFile({}, {"head.head.diff_b": torch.full((6,), torch.inf)}), "comfy", "head.head.diff_b"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_and_nothing_is_written(tmp_path, lora, layout, message):
    with pytest.raises(LoraError, match=message):
        write_lora(tmp_path / "lora.safetensors", lora, layout)
    assert not list(tmp_path.iterdir())


def test_a_number_that_overflows_the_chosen_dtype_is_refused(tmp_path):
    lora = LoraFile({"head.head": LoraPair(torch.full((2, 5), 1e6), torch.ones(6, 2), 1.0)})
    with pytest.raises(LoraError, match="head.head.down .*float16"):
        write_lora(tmp_path / "lora.safetensors", lora, dtype=torch.float16)


def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"precious")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("utils.common.files.os.fsync", fail)
    with pytest.raises(LoraError, match="the disk is full"):
        write_lora(path, make_lora())
    assert path.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(LoraError, match="nowhere"):
        write_lora(tmp_path / "nowhere" / "lora.safetensors", make_lora())
    with pytest.raises(LoraError, match=r"\.safetensors"):
        write_lora(tmp_path / "lora.pt", make_lora())


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    write_lora(tmp_path / "lora.safetensors", make_lora())
    (tmp_path / "plain").touch()
    assert (tmp_path / "lora.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_written_file_differs_from_one_that_differs_in_a_bit_a_dtype_or_a_word(tmp_path):
    path, lora = tmp_path / "lora.safetensors", make_lora()
    assert not has_same_content(path, *to_state_dict(lora))
    write_lora(path, lora)
    assert has_same_content(path, *to_state_dict(lora))
    assert not has_same_content(path, *to_state_dict(lora, "kohya"))
    assert not has_same_content(path, *to_state_dict(lora, dtype=torch.half))
    assert not has_same_content(path, *to_state_dict(LoraFile(lora.pairs, metadata={"format": "pt"})))
    lora.pairs["head.head"].up[0, 0] *= -1
    assert not has_same_content(path, *to_state_dict(lora))
