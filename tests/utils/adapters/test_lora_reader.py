import os
import struct

import pytest
import torch
from safetensors.torch import load_file

from tests.loras import NAMES, Q, assert_same, half, make_lora, written
from utils.adapters.lora_file import LoraError, LoraFile, delta
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import write_lora

PREFIXES = ("diffusion_model.", "model.diffusion_model.", "base_model.model.", "transformer.", "")
MATRICES = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A", "lora_B"),
    ("lora_A.default", "lora_B.default"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
)

# ----------------------------------------------------------------------------------------------------- key formats


@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize("matrices", MATRICES)
def test_every_key_format_reads_as_the_same_pairs(tmp_path, matrices, with_alpha):
    expected = make_lora(alpha=0.75 if with_alpha else None)
    columns = [(prefix, column) for prefix in PREFIXES for column in (0, 1)] + [("lora_unet_", 2), ("lora_unet__", 2)]
    stems = [{names[0]: prefix + names[column] for names in NAMES} for prefix, column in columns]
    for stem in stems:
        tensors = {}
        for name, pair in expected.pairs.items():
            tensors |= {f"{stem[name]}.{matrices[0]}": pair.down, f"{stem[name]}.{matrices[1]}": pair.up}
            tensors |= {f"{stem[name]}.alpha": torch.tensor(0.75)} if with_alpha else {}
        found = read_lora(written(tmp_path / "lora.safetensors", tensors))
        assert_same(LoraFile(found.pairs), LoraFile(expected.pairs))


@pytest.mark.parametrize("alpha", [torch.tensor(1.5, dtype=d) for d in (torch.float16, torch.bfloat16, torch.float32)])
def test_alpha_is_the_float_it_is_stored_as_whatever_its_shape(tmp_path, alpha):
    for shape in ((), (1,), (1, 1)):
        path = written(tmp_path / "lora.safetensors", half() | {f"{Q}.alpha": alpha.reshape(shape)})
        assert read_lora(path).pairs["blocks.0.self_attn.q"].alpha == 1.5


def test_the_key_format_is_described_in_words(tmp_path):
    write_lora(tmp_path / "lora.safetensors", make_lora(), "diffusers")
    assert read_lora(tmp_path / "lora.safetensors").key_format == "transformer., lora_A/lora_B.weight, diffusers names"


def test_a_state_of_a_run_is_told_from_a_lora(tmp_path):
    tensors = {"trainables/lora/blocks.0.self_attn.q.lora_A.default.weight": torch.ones(2, 5)}
    with pytest.raises(LoraError, match="state-00000002.safetensors: is a state, from which a run resumes, and not a"):
        read_lora(written(tmp_path / "state-00000002.safetensors", tensors))
    with pytest.raises(LoraError, match="fox.safetensors: none of its keys names a module of Wan"):
        read_lora(written(tmp_path / "fox.safetensors", tensors))


def test_a_control_lora_of_wantraining_gets_the_shape_that_its_file_does_not_state(tmp_path):
    tensors = half("patch_embedding", (2, 32, 1, 2, 2), (6, 2, 1, 1, 1))
    lora = read_lora(written(tmp_path / "l.safetensors", tensors))
    assert lora.input_shapes == {"patch_embedding": (6, 32, 1, 2, 2)} and lora.pairs["patch_embedding"].alpha is None
    prefixed = {f"diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    assert read_lora(written(tmp_path / "l.safetensors", prefixed)).input_shapes == lora.input_shapes
    plain = half("diffusion_model.patch_embedding", (2, 16, 1, 2, 2), (6, 2, 1, 1, 1))
    assert read_lora(written(tmp_path / "l.safetensors", plain)).input_shapes == {}


def test_a_shape_that_wantrainings_converter_has_cast_to_bf16_becomes_integers_again(tmp_path):
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
    "a rank of zero": (half(down=(0, 5), up=(6, 0)), f"{Q}.lora_A.weight: has the shape .0, 5., which is empty"),
    "an up matrix with a kernel": (half(up=(6, 2, 1, 2)), "do not fit together"),
    "integer matrices": (
        {key: tensor.int() for key, tensor in half().items()},
        f"{Q}.lora_A.weight: stored as torch.int32",
    ),
    "an alpha of two numbers": (half() | {f"{Q}.alpha": torch.ones(2)}, f"{Q}.alpha"),
    "an alpha not a number": (half() | {f"{Q}.alpha": torch.tensor(torch.nan)}, f"{Q}.alpha"),
    "a shape that the pair does not make": (half() | {f"{Q}.reshape_weight": torch.tensor([6, 7])}, "stated shape"),
    "a shape of fractions": (half() | {f"{Q}.reshape_weight": torch.tensor([6, 5.5])}, "stated shape"),
    "a pair and a delta": (half() | {f"{Q}.diff": torch.ones(6, 5)}, "exclude each other"),
    "a key of no Wan module": (half() | half("diffusion_model.blocks.0.nose"), "2 of 4 keys .*nose.lora_A"),
    "a key of no LoRA": (
        {"blocks.0.self_attn.q.weight": torch.ones(6, 5)},
        "holds the weights of a model .blocks.0.self_attn.q.weight",
    ),
    "a pair on a parameter": (half("diffusion_model.blocks.0.modulation"), "2 of 2 keys"),
    "a text encoder": (
        {f"lora_te_{i}.alpha": torch.tensor(1.0) for i in range(9)},
        "none of its keys names a module of Wan .*te_0.*te_1.*te_2",
    ),
    "a DoRA of another width": (half() | {f"{Q}.lora_magnitude_vector": torch.ones(5)}, "DoRA magnitude has the shape"),
    "a DoRA of two programs": (
        half() | {f"{Q}.dora_scale": torch.ones(6, 1), f"{Q}.lora_magnitude_vector": torch.ones(6)},
        "DoRA magnitudes of two programs",
    ),
    "a DoRA of a vector": (
        half(f"{Q[:-1]}norm_q", (2, 1), (6, 2)) | {f"{Q[:-1]}norm_q.dora_scale": torch.ones(6, 1)},
        "norm_q: a DoRA of a vector",
    ),
    "a magnitude alone": ({f"{Q}.dora_scale": torch.ones(6, 1)}, "half a pair"),
    "a part of a LoHa": ({f"{Q}.hada_w1_a": torch.ones(6, 2)}, f"{Q} has only a part of a LoHa: hada_w1_a"),
    "a part of a LoKr": ({f"{Q}.lokr_w1": torch.ones(2, 2)}, f"{Q} has only a part of a LoKr: lokr_w1"),
    "a LoHa of two widths": (
        {
            f"{Q}.hada_{role}": torch.ones(shape)
            for role, shape in {"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (6, 2), "w2_b": (2, 4)}.items()
        },
        "factors that do not fit together",
    ),
    "a LoKr and a LoHa": (
        {f"{Q}.{role}": torch.ones(2, 2) for role in ("hada_w1_a", "lokr_w1", "lokr_w2")},
        "factors of both LoHa and LoKr",
    ),
    "a LoKr and a pair": (
        half() | {f"{Q}.lokr_w1": torch.ones(2, 1), f"{Q}.lokr_w2": torch.ones(3, 5)},
        "two changes of one weight",
    ),
    "Stand-In": ({f"{Q}_loras.down.weight": torch.ones(2, 5)}, "q_loras.down.weight belongs to Stand-In"),
    "a GLoRA": ({f"{Q}.a1.weight": torch.ones(2, 5)}, "a1.weight belongs to a GLoRA"),
    "a replaced weight": (half() | {f"{Q}.set_weight": torch.ones(6, 5)}, "set_weight replaces"),
    "a bias twice": (
        half() | {f"{Q}.lora_B.bias": torch.ones(6), f"{Q}.diff_b": torch.ones(6)},
        "a .diff_b exclude each other",
    ),
    "a bias of no pair": ({f"{Q}.lora_B.bias": torch.ones(6)}, "half a pair"),
    "one module under two prefixes": (half() | half("blocks.0.self_attn.q"), "self_attn.q has keys of two formats"),
    "one module under two names": (half() | half("diffusion_model.blocks.0.attn1.to_q"), "keys of two formats"),
    "one module with two adapters": (half() | {f"{Q}.lora_A.default.weight": torch.ones(2, 5)}, "keys of two formats"),
    "a pair of two key formats": (
        {f"{Q}.lora_A.weight": torch.ones(2, 5), f"{Q}.lora_up.weight": torch.ones(6, 2)},
        "keys of two formats",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_content_is_refused_by_key_and_file(tmp_path, what):
    tensors, message = BAD[what]
    path = written(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(LoraError, match=message) as caught:
        read_lora(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) <= 3


NAN, INFINITE = torch.tensor(torch.nan), torch.tensor(torch.inf)
NORM = "diffusion_model.blocks.0.norm3"


def spoiled(number, dtype=torch.float32, role="lora_B.weight"):
    """A pair in which one number of one matrix is `number`."""
    tensors = {key: tensor.to(dtype) for key, tensor in half().items()}
    tensors[f"{Q}.{role}"].view(-1)[3] = number
    return tensors


UNSAFE = {
    "NaN in a matrix": (spoiled(torch.nan), f"{Q}.lora_B.weight: holds NaN"),
    "infinity in a matrix": (spoiled(torch.inf, role="lora_A.weight"), f"{Q}.lora_A.weight: holds NaN"),
    "minus infinity in fp16": (spoiled(-torch.inf, torch.float16), f"{Q}.lora_B.weight: holds NaN"),
    "NaN in bf16": (spoiled(torch.nan, torch.bfloat16), f"{Q}.lora_B.weight: holds NaN"),
    "NaN in fp8": (spoiled(torch.nan, torch.float8_e4m3fn), f"{Q}.lora_B.weight: holds NaN"),
    "infinity in fp8": (spoiled(torch.inf, torch.float8_e5m2), f"{Q}.lora_B.weight: holds NaN"),
    "fp64 beyond fp32": (spoiled(1e39, torch.float64), f"{Q}.lora_B.weight: holds NaN or infinite"),
    "a product beyond fp32": ({key: tensor * 1e20 for key, tensor in half().items()}, f"{Q}: the change of the weight"),
    "an alpha that makes it so": (spoiled(1e20) | {f"{Q}.alpha": torch.tensor(1e20)}, f"{Q}: the change of the weight"),
    "NaN in a diff": ({f"{NORM}.diff": NAN.repeat(6)}, f"{NORM}.diff: holds NaN"),
    "NaN in the bias of a pair": (half() | {f"{Q}.lora_B.bias": NAN.repeat(6)}, f"{Q}.lora_B.bias: holds NaN"),
    "infinity in the diff of a bias": ({f"{NORM}.diff_b": INFINITE.repeat(6)}, f"{NORM}.diff_b: holds NaN"),
    "an infinite alpha": (half() | {f"{Q}.alpha": INFINITE}, f"{Q}.alpha: must be one finite number"),
    "an alpha beyond fp32": (half() | {f"{Q}.alpha": torch.tensor(1e39, dtype=torch.float64)}, f"{Q}.alpha: must be"),
    "an alpha of yes or no": (half() | {f"{Q}.alpha": torch.tensor(True)}, f"{Q}.alpha: must be one finite number"),
    "a complex alpha": (half() | {f"{Q}.alpha": torch.tensor(1j)}, f"{Q}.alpha: must be one finite number"),
    "no number as alpha": (half() | {f"{Q}.alpha": torch.ones(0)}, f"{Q}.alpha: must be one finite number"),
    "a shape with NaN": (half() | {f"{Q}.reshape_weight": NAN.repeat(2)}, "self_attn.q: the stated shape"),
    "an infinite shape": (half() | {f"{Q}.reshape_weight": INFINITE.repeat(2)}, "self_attn.q: the stated shape"),
    "a negative shape": (half() | {f"{Q}.reshape_weight": torch.tensor([-6, -5])}, "self_attn.q: the stated shape"),
    "an empty shape": (half() | {f"{Q}.reshape_weight": torch.ones(0)}, "self_attn.q: the stated shape"),
    "a flat shape": (half(down=(2, 1)) | {f"{Q}.reshape_weight": torch.tensor([6])}, "self_attn.q: the stated shape"),
    "a complex shape": (half() | {f"{Q}.reshape_weight": torch.tensor([6j, 5])}, f"{Q}.reshape_weight: is no shape"),
    "a shape of a million": (half() | {f"{Q}.reshape_weight": torch.ones(10**6)}, f"{Q}.reshape_weight: is no shape"),
    "matrices of yes and no": ({key: t.bool() for key, t in half().items()}, "lora_A.weight: stored as torch.bool"),
    "complex matrices": ({key: t.to(torch.complex64) for key, t in half().items()}, "stored as torch.complex64"),
    "matrices of scales": ({key: t.to(torch.float8_e8m0fnu) for key, t in half().items()}, "stored as .*e8m0fnu"),
    "an integer diff": ({f"{NORM}.diff": torch.ones(6, dtype=torch.int64)}, f"{NORM}.diff: stored as torch.int64"),
    "no inputs": (half(down=(2, 0)), r"lora_A.weight: has the shape \(2, 0\), which is empty"),
    "an empty diff": ({f"{NORM}.diff": torch.ones(0)}, r"norm3.diff: has the shape \(0,\), which is empty"),
    "scalars": (half(down=(), up=()), "lora_A.weight: has 0 dimensions"),
    "a matrix of 100 dimensions": (half(down=(2, *[1] * 99)), "lora_A.weight: has 100 dimensions"),
    "a key that breaks the line": (
        half() | {"a\n\x1b[2Jb.dora_scale": torch.ones(1)},
        r"a\\n\\x1b\[2Jb.dora_scale",
    ),
    "a key of a million letters": (half() | {"a" * 10**6: torch.ones(1)}, r"model: a{100}\.\.\.\."),
}


@pytest.mark.parametrize("what", UNSAFE)
def test_numbers_that_nothing_can_be_computed_with_are_refused_by_key_and_file(tmp_path, what):
    tensors, message = UNSAFE[what]
    path = written(tmp_path / "unsafe.safetensors", tensors)
    with pytest.raises(LoraError, match=message) as caught:
        read_lora(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600 + len(str(path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("alpha", [0.0, -8.0])
def test_a_zero_or_negative_alpha_is_kept(tmp_path, alpha):
    """ComfyUI and diffusers compute with it as with any other."""
    path = written(tmp_path / "lora.safetensors", half() | {f"{Q}.alpha": torch.tensor(alpha)})
    pair = read_lora(path).pairs["blocks.0.self_attn.q"]
    assert pair.alpha == alpha and torch.equal(delta(pair), torch.full((6, 5), alpha))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_matrices_of_an_unusual_float_dtype_are_read_and_written_unchanged(tmp_path, dtype):
    tensors = {key: (tensor * 1.5).to(dtype) for key, tensor in half().items()}
    tensors |= {f"{Q}.alpha": torch.tensor(4, dtype=torch.int64)}
    lora = read_lora(written(tmp_path / "lora.safetensors", tensors))
    assert torch.equal(delta(lora.pairs["blocks.0.self_attn.q"]), torch.full((6, 5), 9.0))
    write_lora(tmp_path / "copy.safetensors", lora)
    copy = load_file(tmp_path / "copy.safetensors")[f"{Q}.lora_A.weight"]
    assert copy.dtype == dtype and torch.equal(copy.double(), torch.full((2, 5), 1.5).double())


def raw(header, size=0):
    """The bytes of a file with this text as its header, and so many bytes of data."""
    return struct.pack("<Q", len(header)) + header.encode() + b"\0" * size


def entry(key, shape, start, end, dtype="F32"):
    return f'"{key}": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{start}, {end}]}}'


RAW = {
    "a header larger than the file": struct.pack("<Q", 2**40) + b"{}",
    "a header length of all ones": b"\xff" * 64,
    "a header of nested lists": raw("[" * 10**5),
    "one key with two contents": raw(f"{{{entry(Q, [1], 0, 4)}, {entry(Q, [1], 4, 8)}}}", 8),
    "two keys with one content": raw(f"{{{entry(Q, [1], 0, 4)}, {entry('b', [1], 0, 4)}}}", 4),
    "a dimension beyond 64 bits": raw(f"{{{entry(Q, [2**63, 0], 0, 0)}}}"),
    "a size beyond 64 bits": raw(f"{{{entry(Q, [2**40, 2**40], 0, 0)}}}"),
    "a negative size": raw(f"{{{entry(Q, [-1, 0], 0, 0)}}}"),
    "an unknown dtype": raw(f"{{{entry(Q, [1], 0, 4, 'F7')}}}", 4),
    "metadata of numbers": raw(f'{{"__metadata__": {{"alpha": 1}}, {entry(Q, [1], 0, 4)}}}', 4),
}


@pytest.mark.parametrize("what", RAW)
def test_a_hostile_header_is_refused(tmp_path, what):
    path = tmp_path / "raw.safetensors"
    path.write_bytes(RAW[what])
    with pytest.raises(LoraError, match="not a complete safetensors file") as caught:
        read_lora(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        (entry(f"{Q}.lora_A.weight", [2**62, 0], 0, 0), entry(f"{Q}.lora_B.weight", [0, 2**62], 0, 0), "is empty"),
        (entry(f"{Q}.lora_A.weight", [2, 4], 0, 4, "F4"), entry(f"{Q}.lora_B.weight", [4, 2], 4, 8, "F4"), "float4"),
    ],
    ids=["a huge rank", "four bits a number"],
)
def test_matrices_that_only_a_header_can_state_are_refused(tmp_path, down, up, message):
    path = tmp_path / "raw.safetensors"
    path.write_bytes(raw(f"{{{down}, {up}}}", 8 if "F4" in down else 0))
    with pytest.raises(LoraError, match=f"{Q}.lora_A.weight: .*{message}"):
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


MISTAKEN = {
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a pointer of Git LFS"),
    "a page": (b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>", "is a web page"),
    "a page in small letters": (b"\n  <!doctype html>", "is a web page"),
    "a page without a type": (b"<html lang=en><body>" + b" " * 400, "is a web page"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file, which is not read here"),
}


@pytest.mark.parametrize("what", MISTAKEN)
def test_what_is_found_in_place_of_a_lora_is_named(tmp_path, what):
    content, message = MISTAKEN[what]
    (tmp_path / "l.safetensors").write_bytes(content)
    with pytest.raises(LoraError, match=f"l.safetensors {message}") as caught:
        read_lora(tmp_path / "l.safetensors")
    assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/adapter_model.safetensors").write_bytes(content)
    with pytest.raises(LoraError, match=f"adapter_model.safetensors {message}"):
        read_lora(tmp_path / "folder")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt", "safetensors"])
def test_nothing_is_ever_unpickled(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    torch.save(Trap(), f"trap.{ending}")
    with pytest.raises(LoraError, match="not a complete" if ending == "safetensors" else "can run code"):
        read_lora(f"trap.{ending}")
    assert not os.path.exists("sprung")
