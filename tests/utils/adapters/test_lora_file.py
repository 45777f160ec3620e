import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils.adapters.lora_file import (
    LAYOUTS,
    LoraError,
    LoraFile,
    LoraPair,
    delta,
    has_same_content,
    read_lora,
    to_state_dict,
    write_lora,
)
from wan.names import diffusers_name, official_name

# official, diffusers, underscored: written out by hand, so that the code's tables can be wrong
NAMES = """
patch_embedding           patch_embedding                                        patch_embedding
text_embedding.0          condition_embedder.text_embedder.linear_1              text_embedding_0
text_embedding.2          condition_embedder.text_embedder.linear_2              text_embedding_2
time_embedding.0          condition_embedder.time_embedder.linear_1              time_embedding_0
time_embedding.2          condition_embedder.time_embedder.linear_2              time_embedding_2
time_projection.1         condition_embedder.time_proj                           time_projection_1
img_emb.proj.1            condition_embedder.image_embedder.ff.net.0.proj        img_emb_proj_1
img_emb.proj.3            condition_embedder.image_embedder.ff.net.2             img_emb_proj_3
head.head                 proj_out                                               head_head
blocks.0.self_attn.q      blocks.0.attn1.to_q                                    blocks_0_self_attn_q
blocks.0.self_attn.k      blocks.0.attn1.to_k                                    blocks_0_self_attn_k
blocks.1.self_attn.v      blocks.1.attn1.to_v                                    blocks_1_self_attn_v
blocks.10.self_attn.o     blocks.10.attn1.to_out.0                               blocks_10_self_attn_o
blocks.0.cross_attn.q     blocks.0.attn2.to_q                                    blocks_0_cross_attn_q
blocks.0.cross_attn.k     blocks.0.attn2.to_k                                    blocks_0_cross_attn_k
blocks.0.cross_attn.v     blocks.0.attn2.to_v                                    blocks_0_cross_attn_v
blocks.0.cross_attn.o     blocks.0.attn2.to_out.0                                blocks_0_cross_attn_o
blocks.0.cross_attn.k_img blocks.0.attn2.add_k_proj                              blocks_0_cross_attn_k_img
blocks.0.cross_attn.v_img blocks.0.attn2.add_v_proj                              blocks_0_cross_attn_v_img
blocks.39.ffn.0           blocks.39.ffn.net.0.proj                               blocks_39_ffn_0
blocks.39.ffn.2           blocks.39.ffn.net.2                                    blocks_39_ffn_2
vace_blocks.0.before_proj vace_blocks.0.proj_in                                  vace_blocks_0_before_proj
vace_blocks.5.after_proj  vace_blocks.5.proj_out                                 vace_blocks_5_after_proj
"""
NAMES = [line.split() for line in NAMES.strip().splitlines()]
PREFIXES = ("diffusion_model.", "model.diffusion_model.", "base_model.model.", "transformer.", "")
MATRICES = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A", "lora_B"),
    ("lora_A.default", "lora_B.default"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
)
Q = "diffusion_model.blocks.0.self_attn.q"


def make_pair(shape=(6, 5), rank=2, alpha=3.0, dtype=torch.float32):
    down, up = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
    return LoraPair(down.to(dtype), up.to(dtype), alpha)


def make_lora(control=False, extras=False, alpha=3.0, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = {official: (6, 5) for official, *_ in NAMES} | {"patch_embedding": (6, 4, 1, 2, 2)}
    pairs = {name: make_pair(shape, 2 + i % 3, alpha, dtype) for i, (name, shape) in enumerate(shapes.items())}
    deltas = {"blocks.0.norm3.diff": torch.randn(6), "blocks.0.self_attn.q.diff_b": torch.randn(6)}
    wide = {"patch_embedding": (6, 4, 1, 2, 2)}
    return LoraFile(pairs, deltas if extras else {}, wide if control else {}, {"format": "pt", "ss_steps": "100"})


def assert_same(found, expected):
    assert found.pairs.keys() == expected.pairs.keys() and found.extras.keys() == expected.extras.keys()
    assert (found.input_shapes, found.metadata) == (expected.input_shapes, expected.metadata)
    for name, pair in expected.pairs.items():
        other = found.pairs[name]
        assert other.alpha == pair.alpha and other.down.dtype == pair.down.dtype
        assert torch.equal(other.down, pair.down) and torch.equal(other.up, pair.up)
    assert all(torch.equal(found.extras[key], tensor) for key, tensor in expected.extras.items())


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def written(path, tensors, metadata=None):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    return path


def half(key=Q, down=(2, 5), up=(6, 2)):
    return {f"{key}.lora_A.weight": torch.ones(down), f"{key}.lora_B.weight": torch.ones(up)}


# ------------------------------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize(("official", "diffusers", "underscored"), NAMES)
def test_a_name_is_the_same_in_every_spelling(official, diffusers, underscored):
    assert {official_name(official), official_name(diffusers), official_name(underscored)} == {official}
    assert diffusers_name(official) == diffusers


def test_norms_trade_numbers_between_official_and_diffusers_names():
    assert official_name("blocks.3.norm2") == "blocks.3.norm3" and diffusers_name("blocks.3.norm3") == "blocks.3.norm2"
    assert official_name("scale_shift_table") == "head.modulation"
    assert official_name("blocks.3.scale_shift_table") == "blocks.3.modulation"


@pytest.mark.parametrize("name", ["blocks.0", "blocks.x.ffn.0", "blocks.01.ffn.0", "xblocks.0.ffn.0", "self_attn.q"])
def test_a_name_outside_wan_is_not_guessed(name):
    assert official_name(name) is None


@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize("matrices", MATRICES)
def test_every_spelling_reads_as_the_same_pairs(tmp_path, matrices, with_alpha):
    expected = make_lora(alpha=0.75 if with_alpha else None)
    columns = [(prefix, column) for prefix in PREFIXES for column in (0, 1)] + [("lora_unet_", 2), ("lora_unet__", 2)]
    stems = [{names[0]: prefix + names[column] for names in NAMES} for prefix, column in columns]
    for spelled in stems:
        tensors = {}
        for name, pair in expected.pairs.items():
            tensors |= {f"{spelled[name]}.{matrices[0]}": pair.down, f"{spelled[name]}.{matrices[1]}": pair.up}
            tensors |= {f"{spelled[name]}.alpha": torch.tensor(0.75)} if with_alpha else {}
        found = read_lora(written(tmp_path / "lora.safetensors", tensors))
        assert_same(LoraFile(found.pairs), LoraFile(expected.pairs))


@pytest.mark.parametrize("alpha", [torch.tensor(1.5, dtype=d) for d in (torch.float16, torch.bfloat16, torch.float32)])
def test_alpha_is_the_float_it_is_stored_as_whatever_its_shape(tmp_path, alpha):
    for shape in ((), (1,), (1, 1)):
        path = written(tmp_path / "lora.safetensors", half() | {f"{Q}.alpha": alpha.reshape(shape)})
        assert read_lora(path).pairs["blocks.0.self_attn.q"].alpha == 1.5


def test_the_spelling_is_told_in_words(tmp_path):
    write_lora(tmp_path / "lora.safetensors", make_lora(), "diffusers")
    assert read_lora(tmp_path / "lora.safetensors").spelling == "transformer., lora_A/lora_B.weight, diffusers names"


def test_alpha_is_taken_from_the_metadata_of_diffusers_where_no_tensor_says_it(tmp_path):
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"^blocks.0.attn1.to_q": 5, "ffn.net.2": 6.5}}
    tensors = half("transformer.blocks.0.attn1.to_q") | half("transformer.blocks.0.attn1.to_k")
    tensors |= half("transformer.blocks.0.ffn.net.2") | half("transformer.proj_out")
    tensors |= {"transformer.proj_out.alpha": torch.tensor(1.0)}
    for prefix in ("transformer.", ""):
        said = json.dumps({prefix + key: value for key, value in config.items()})
        lora = read_lora(written(tmp_path / "l.safetensors", tensors, {"lora_adapter_metadata": said, "author": "me"}))
        alphas = {name: pair.alpha for name, pair in lora.pairs.items()}
        wanted = {"blocks.0.self_attn.q": 5.0, "blocks.0.self_attn.k": 8.0, "blocks.0.ffn.2": 6.5, "head.head": 1.0}
        assert alphas == wanted and lora.metadata == {"author": "me"}


def test_rank_stabilised_scaling_becomes_an_alpha(tmp_path):
    said = json.dumps({"transformer.lora_alpha": 8, "transformer.use_rslora": True})
    path = written(
        tmp_path / "l.safetensors",
        half("transformer.blocks.0.attn1.to_q", (4, 5), (6, 4)),
        {"lora_adapter_metadata": said},
    )
    assert read_lora(path).pairs["blocks.0.self_attn.q"].scale == 8 / 4**0.5


def test_a_control_lora_of_the_predecessor_gets_the_shape_that_it_left_unsaid(tmp_path):
    tensors = half("patch_embedding", (2, 32, 1, 2, 2), (6, 2, 1, 1, 1))
    lora = read_lora(written(tmp_path / "l.safetensors", tensors))
    assert lora.input_shapes == {"patch_embedding": (6, 32, 1, 2, 2)} and lora.pairs["patch_embedding"].alpha is None
    prefixed = {f"diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    assert read_lora(written(tmp_path / "l.safetensors", prefixed)).input_shapes == lora.input_shapes
    plain = half("diffusion_model.patch_embedding", (2, 16, 1, 2, 2), (6, 2, 1, 1, 1))
    assert read_lora(written(tmp_path / "l.safetensors", plain)).input_shapes == {}


def test_a_shape_that_an_older_converter_cast_to_bf16_is_mended(tmp_path):
    key = "diffusion_model.patch_embedding"
    tensors = half(key, (2, 32, 1, 2, 2), (5120, 2, 1, 1, 1))
    tensors |= {f"{key}.reshape_weight": torch.tensor([5120, 32, 1, 2, 2], dtype=torch.bfloat16)}
    write_lora(tmp_path / "out.safetensors", read_lora(written(tmp_path / "in.safetensors", tensors)))
    shape = load_file(tmp_path / "out.safetensors")[f"{key}.reshape_weight"]
    assert shape.dtype == torch.int64 and shape.tolist() == [5120, 32, 1, 2, 2]


# ----------------------------------------------------------------------------------------------------- bad content

BAD = {
    "a pair without its up matrix": ({f"{Q}.lora_A.weight": torch.ones(2, 5)}, f"{Q}: half a pair"),
    "a pair without its down matrix": ({f"{Q}.lora_B.weight": torch.ones(6, 2)}, f"{Q}: half a pair"),
    "an alpha alone": ({f"{Q}.alpha": torch.tensor(1.0)}, f"{Q}: half a pair"),
    "a shape alone": ({f"{Q}.reshape_weight": torch.tensor([6, 5])}, f"{Q}: half a pair"),
    "matrices of different rank": (half(down=(3, 5)), "do not fit together"),
    "a rank of zero": (half(down=(0, 5), up=(6, 0)), "do not fit together"),
    "an up matrix with a kernel": (half(up=(6, 2, 1, 2)), "do not fit together"),
    "integer matrices": ({key: tensor.int() for key, tensor in half().items()}, "do not fit together"),
    "an alpha of two numbers": (half() | {f"{Q}.alpha": torch.ones(2)}, f"{Q}.alpha"),
    "an alpha not a number": (half() | {f"{Q}.alpha": torch.tensor(torch.nan)}, f"{Q}.alpha"),
    "a shape that the pair does not make": (half() | {f"{Q}.reshape_weight": torch.tensor([6, 7])}, "reshape_weight"),
    "a shape of fractions": (half() | {f"{Q}.reshape_weight": torch.tensor([6, 5.5])}, "reshape_weight"),
    "a pair and a delta": (half() | {f"{Q}.diff": torch.ones(6, 5)}, "exclude each other"),
    "a key of no Wan module": (half() | half("diffusion_model.blocks.0.nose"), "2 of 4 keys .*nose.lora_A"),
    "a key of no LoRA": ({"blocks.0.self_attn.q.weight": torch.ones(6, 5)}, "1 of 1 keys .*self_attn.q.weight"),
    "a pair on a parameter": (half("diffusion_model.blocks.0.modulation"), "2 of 2 keys"),
    "a text encoder": ({f"lora_te_{i}.alpha": torch.tensor(1.0) for i in range(9)}, "9 of 9 keys .*te_0.*te_1.*te_2"),
    "a DoRA": (half() | {f"{Q}.lora_magnitude_vector": torch.ones(6)}, "lora_magnitude_vector is a DoRA"),
    "a kohya DoRA": (half() | {f"{Q}.dora_scale": torch.ones(6)}, "dora_scale is a DoRA"),
    "a LoHa": ({f"{Q}.hada_w1_a": torch.ones(6, 2)}, "hada_w1_a belongs to a LoHa"),
    "a LoKr": ({f"{Q}.lokr_w1": torch.ones(2, 2)}, "lokr_w1 belongs to a LoKr"),
    "a replaced weight": (half() | {f"{Q}.set_weight": torch.ones(6, 5)}, "set_weight replaces"),
    "an adapter bias": (half() | {f"{Q}.lora_B.bias": torch.ones(6)}, "lora_B.bias is a bias"),
    "one module under two prefixes": (half() | half("blocks.0.self_attn.q"), "self_attn.q is spelled in two ways"),
    "one module under two names": (half() | half("diffusion_model.blocks.0.attn1.to_q"), "spelled in two ways"),
    "one module with two adapters": (half() | {f"{Q}.lora_A.default.weight": torch.ones(2, 5)}, "spelled in two ways"),
    "a pair of two spellings": (
        {f"{Q}.lora_A.weight": torch.ones(2, 5), f"{Q}.lora_up.weight": torch.ones(6, 2)},
        "spelled in two ways",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_content_is_refused_by_key_and_file(tmp_path, what):
    tensors, message = BAD[what]
    path = written(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(LoraError, match=message) as caught:
        read_lora(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("key", ["lora_adapter_metadata", "wan_lora_scaling"])
@pytest.mark.parametrize(
    "value",
    [
        "{",
        "[1]",
        '"x"',
        '{"lora_alpha": "high", "alpha": {"a": "high"}}',
        '{"lora_alpha": [], "alpha": {}, "shapes": {"a": 1}}',
        '{"lora_alpha": 1, "alpha_pattern": {"(": 2}, "alpha": 1}',
    ],
)
def test_metadata_that_cannot_be_understood_is_refused(tmp_path, key, value):
    path = written(tmp_path / "bad.safetensors", half(), {key: value})
    with pytest.raises(LoraError, match=f"the metadata {key}"):
        read_lora(path)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    whole = written(tmp_path / "whole.safetensors", half()).read_bytes()
    contents = {"missing": None, "empty": b"", "text": b"not a LoRA at all", "cut": whole[:-8], "header": whole[:40]}
    for name, content in contents.items():
        path = tmp_path / f"{name}.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(LoraError, match=name):
            read_lora(path)
    with pytest.raises(LoraError, match="folder"):
        (tmp_path / "folder").mkdir()
        read_lora(tmp_path / "folder")
    with pytest.raises(LoraError, match="holds no tensors"):
        read_lora(written(tmp_path / "void.safetensors", {}))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt", "safetensors"])
def test_nothing_is_ever_unpickled(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    torch.save(Trap(), f"trap.{ending}")
    with pytest.raises(LoraError, match="not a whole" if ending == "safetensors" else "can run code"):
        read_lora(f"trap.{ending}")
    assert not os.path.exists("sprung")


# --------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_comfy_to_any_layout_and_back_is_bit_exact(tmp_path, layout, dtype):
    full = layout in ("comfy", "kohya")
    lora = make_lora(control=full or layout == "predecessor", extras=full, alpha=2.7182817459106445, dtype=dtype)
    first, other, back = (tmp_path / f"{name}.safetensors" for name in ("first", "other", "back"))
    write_lora(first, lora)
    write_lora(other, read_lora(first), layout)
    write_lora(back, read_lora(other))
    assert_same(read_lora(back), lora)
    before, after = load_file(first), load_file(back)
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert metadata_of(first) == metadata_of(back) == lora.metadata
    assert has_same_content(back, read_lora(first))


def test_a_pair_without_alpha_stays_without_in_the_predecessors_layout_and_says_its_rank_in_comfys(tmp_path):
    path, lora = tmp_path / "lora.safetensors", LoraFile({"head.head": make_pair(rank=4, alpha=None)})
    write_lora(path, lora, "predecessor")
    assert read_lora(path).pairs["head.head"].alpha is None
    write_lora(path, lora, "comfy")
    assert read_lora(path).pairs["head.head"].alpha == 4.0


def test_keys_are_sorted_and_tensors_are_contiguous_and_apart(tmp_path):
    buffer = torch.randn(40)
    pair = LoraPair(buffer[:10].view(5, 2).T.requires_grad_(), buffer[10:22].view(6, 2), 2.0)
    lora = LoraFile({"head.head": pair, "blocks.0.ffn.0": pair})
    tensors, _ = to_state_dict(lora, "comfy")
    assert list(tensors) == sorted(tensors) and all(tensor.is_contiguous() for tensor in tensors.values())
    write_lora(tmp_path / "lora.safetensors", lora)
    assert torch.equal(read_lora(tmp_path / "lora.safetensors").pairs["head.head"].down, pair.down)


def test_a_cast_touches_matrices_and_deltas_but_no_alpha_and_no_shape(tmp_path):
    write_lora(tmp_path / "lora.safetensors", make_lora(control=True, extras=True, alpha=0.1), dtype=torch.bfloat16)
    for key, tensor in load_file(tmp_path / "lora.safetensors").items():
        role = key.rpartition(".")[2]
        wanted = {"alpha": torch.float32, "reshape_weight": torch.int64}.get(role, torch.bfloat16)
        assert tensor.dtype == wanted and (role != "alpha" or (tensor.ndim == 0 and tensor == torch.tensor(0.1)))


@pytest.mark.parametrize(
    ("lora", "layout", "message"),
    [
        (make_lora(control=True), "diffusers", "cannot load a control LoRA.*patch_embedding"),
        (make_lora(extras=True), "diffusers", "blocks.0.norm3.diff"),
        (make_lora(extras=True), "predecessor", "blocks.0.norm3.diff"),
        (LoraFile({}, {"blocks.0.modulation.diff": torch.ones(6)}), "kohya", "blocks.0.modulation"),
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


def test_a_number_that_overflows_the_asked_dtype_is_refused(tmp_path):
    lora = LoraFile({"head.head": LoraPair(torch.full((2, 5), 1e6), torch.ones(6, 2), 1.0)})
    with pytest.raises(LoraError, match="head.head.down .*float16"):
        write_lora(tmp_path / "lora.safetensors", lora, dtype=torch.float16)


def test_a_write_that_fails_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
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


def test_others_may_read_a_written_file_as_they_may_any_other_new_file(tmp_path):
    write_lora(tmp_path / "lora.safetensors", make_lora())
    (tmp_path / "plain").touch()
    assert (tmp_path / "lora.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_written_file_is_told_from_one_that_differs_in_a_bit_a_dtype_or_a_word(tmp_path):
    path, lora = tmp_path / "lora.safetensors", make_lora()
    assert not has_same_content(path, lora)
    write_lora(path, lora)
    assert has_same_content(path, lora)
    assert not has_same_content(path, lora, "kohya") and not has_same_content(path, lora, dtype=torch.half)
    assert not has_same_content(path, LoraFile(lora.pairs, metadata={"format": "pt"}))
    lora.pairs["head.head"].up[0, 0] *= -1
    assert not has_same_content(path, lora)


# -------------------------------------------------------------------------------------------- the change of weights


def test_delta_is_the_scaled_product_in_fp32():
    pair = make_pair((6, 4, 1, 2, 2), rank=2, alpha=3.0, dtype=torch.bfloat16)
    expected = torch.einsum("or,rithw->oithw", pair.up.double().flatten(1), pair.down.double()) * (0.5 * 3 / 2)
    assert delta(pair, 0.5).dtype == torch.float32
    torch.testing.assert_close(delta(pair, 0.5).double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(delta(LoraPair(torch.ones(2, 5), torch.ones(6, 2), None)), torch.full((6, 5), 2.0))
