"""Small LoRA files for tests."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.adapters.dora import PEFT, Magnitude
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lycoris import Lycoris

# official, diffusers, underscored: written out by hand, so that the code's tables can be wrong
TABLE = """
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
NAMES = [line.split() for line in TABLE.strip().splitlines()]
Q = "diffusion_model.blocks.0.self_attn.q"
COMFY_ROLES = [
    *("lora_up.weight", "lora_down.weight", "lora_A.weight", "lora_B.weight", "alpha", "reshape_weight", "dora_scale"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("diff", "diff_b", "w_norm", "b_norm"),
]
COMFY_SUFFIXES = ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight"))


def make_pair(
    shape: tuple[int, ...] = (6, 5), rank: int = 2, alpha: float | None = 3.0, dtype: torch.dtype = torch.float32
) -> LoraPair:
    down, up = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
    return LoraPair(down.to(dtype), up.to(dtype), alpha)


def make_lora(
    control: bool = False, diffs: bool = False, alpha: float | None = 3.0, dtype: torch.dtype = torch.float32
) -> LoraFile:
    """A pair for every module, with ranks 2 to 4."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {official: (6, 5) for official, *_ in NAMES}
    shapes["patch_embedding"] = (6, 4, 1, 2, 2)
    pairs = {name: make_pair(shape, 2 + i % 3, alpha, dtype) for i, (name, shape) in enumerate(shapes.items())}
    changes = {"blocks.0.norm3.diff": torch.randn(6), "blocks.0.self_attn.q.diff_b": torch.randn(6)}
    wide = {"patch_embedding": (6, 4, 1, 2, 2)}
    return LoraFile(pairs, changes if diffs else {}, wide if control else {}, {"format": "pt", "ss_steps": "100"})


def assert_same(found: LoraFile, expected: LoraFile) -> None:
    assert found.pairs.keys() == expected.pairs.keys() and found.diffs.keys() == expected.diffs.keys()
    assert (found.input_shapes, found.metadata) == (expected.input_shapes, expected.metadata)
    for name, pair in expected.pairs.items():
        other = found.pairs[name]
        assert other.alpha == pair.alpha and other.down.dtype == pair.down.dtype
        assert torch.equal(other.down, pair.down) and torch.equal(other.up, pair.up)
    assert all(torch.equal(found.diffs[key], tensor) for key, tensor in expected.diffs.items())


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def written(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    return path


def half(key: str = Q, down: tuple[int, ...] = (2, 5), up: tuple[int, ...] = (6, 2)) -> dict[str, Tensor]:
    """The matrices of one module, all ones."""
    return {f"{key}.lora_A.weight": torch.ones(down), f"{key}.lora_B.weight": torch.ones(up)}


def comfy_merge(
    weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], strength: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """ComfyUI's own rule, as it merges a file into weights; whatever it would not apply is left in the second result.

    Bare parameters of modules that contain others (modulation, img_emb.emb_pos) have keys, but are never patched. Only
    pairs widen a weight.
    """
    merged, left = dict(weights), dict(tensors)
    for key, weight in weights.items():
        if not key.endswith(".weight"):
            continue
        name = key.removesuffix(".weight")
        for stem in (f"diffusion_model.{name}", "lora_unet_" + name.replace(".", "_")):
            own = {role: left.pop(f"{stem}.{role}") for role in COMFY_ROLES if f"{stem}.{role}" in left}
            if own:
                merged[key] = _comfy_weight(weight, own, strength)
            if (bias := own.get("diff_b", own.get("b_norm"))) is not None:
                merged[f"{name}.bias"] = _comfy_add(weights[f"{name}.bias"], bias, strength)
    return merged, left


def _comfy_add(weight: Tensor, change: Tensor, strength: float) -> Tensor:
    assert change.shape == weight.shape, "ComfyUI logs a mismatch of shapes and leaves the weight"
    return weight + strength * change.float()


def _comfy_weight(weight: Tensor, own: Mapping[str, Tensor], strength: float) -> Tensor:
    for role in ("diff", "w_norm"):
        if role in own:
            return _comfy_add(weight, own[role], strength)
    change, rank = _comfy_change(own)
    if change is None:
        return weight
    scale = own["alpha"].item() / rank if "alpha" in own and rank is not None else 1.0
    if (shape := own.get("reshape_weight")) is not None and any(up[1:] in own for up, _ in COMFY_SUFFIXES):
        assert not shape.is_floating_point(), "ComfyUI raises a TypeError for sizes that are floats"
        padded = torch.zeros(shape.tolist())
        padded[tuple(slice(size) for size in weight.shape)] = weight
        weight = padded
    change = change.reshape(weight.shape)
    if "dora_scale" not in own:
        return weight + strength * scale * change
    changed, ones = weight + scale * change, [1] * (weight.ndim - 1)
    if own["dora_scale"].shape[0] == len(weight):
        norm = weight.reshape(len(weight), -1).norm(dim=1).reshape(-1, *ones)
    else:
        columns = changed.transpose(0, 1)
        norm = columns.reshape(len(columns), -1).norm(dim=1).reshape(-1, *ones).transpose(0, 1)
    result = changed * (own["dora_scale"].float() / (norm + torch.finfo(torch.float32).eps))
    assert result.shape == weight.shape, "ComfyUI cannot multiply in place by what would broadcast the weight"
    return weight + strength * (result - weight)


def _comfy_change(own: Mapping[str, Tensor]) -> tuple[Tensor | None, int | None]:
    """The unscaled change, not yet in the weight's shape, and the rank by which alpha is divided, if by any."""
    own = {role: tensor.float() for role, tensor in own.items()}
    for up, down in COMFY_SUFFIXES:
        if up[1:] in own:
            return torch.mm(own[up[1:]].flatten(1), own[down[1:]].flatten(1)), len(own[down[1:]])
    if "hada_w1_a" in own:
        sides = [_comfy_product(own, f"hada_w{n}", f"hada_t{n}") for n in (1, 2)]
        return sides[0] * sides[1], len(own["hada_w1_b"])
    if any(role.startswith("lokr") for role in own):
        rank = None
        for name in ("lokr_w1", "lokr_w2"):
            rank = rank if name in own else len(own[f"{name}_b"])
        w1 = own["lokr_w1"] if "lokr_w1" in own else torch.mm(own["lokr_w1_a"], own["lokr_w1_b"])
        w2 = own["lokr_w2"] if "lokr_w2" in own else _comfy_product(own, "lokr_w2", "lokr_t2")
        return torch.kron(w1[:, :, None, None] if w2.ndim == 4 else w1, w2), rank
    return None, None


def _comfy_product(own: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    if core in own:
        return torch.einsum("ijkl,jr,ip->prkl", own[core], own[f"{name}_b"], own[f"{name}_a"])
    return torch.mm(own[f"{name}_a"], own[f"{name}_b"])


# -------------------------------------------------------------------------------------------------- LoHa, LoKr, DoRA


def make_loha(shape: tuple[int, ...] = (6, 8), rank: int = 2, alpha: float | None = 3.0, core: bool = False) -> Lycoris:
    """For a weight of this shape (out, in, ...), as LyCORIS stores it: a kernel is flattened, or in cores."""
    factors = {}
    for n in (1, 2):
        if core:
            factors[f"hada_t{n}"] = torch.randn(rank, rank, *shape[2:])
            factors[f"hada_w{n}_a"], factors[f"hada_w{n}_b"] = torch.randn(rank, shape[0]), torch.randn(rank, shape[1])
        else:
            inputs = math.prod(shape[1:])
            factors[f"hada_w{n}_a"], factors[f"hada_w{n}_b"] = torch.randn(shape[0], rank), torch.randn(rank, inputs)
    return Lycoris(factors, alpha)


def make_lokr(
    shape: tuple[int, ...] = (6, 8), kind: str = "whole", rank: int = 1, alpha: float | None = 3.0
) -> Lycoris:
    """For a weight of this shape, whose first factor is (2, 2): `kind` says what is a product.

    "whole": nothing; "second"; "both"; "core": the second, with a core between; "kernel": the second, whose kernel is
    not flattened.
    """
    out, inputs = shape[0] // 2, shape[1] // 2
    factors = {"lokr_w1": torch.randn(2, 2)}
    if kind == "both":
        factors = {"lokr_w1_a": torch.randn(2, rank), "lokr_w1_b": torch.randn(rank, 2)}
    if kind == "whole":
        return Lycoris(factors | {"lokr_w2": torch.randn(out, inputs, *shape[2:])}, alpha)
    if kind == "core":
        factors |= {"lokr_t2": torch.randn(rank, rank, *shape[2:])}
        return Lycoris(factors | {"lokr_w2_a": torch.randn(rank, out), "lokr_w2_b": torch.randn(rank, inputs)}, alpha)
    second = torch.randn(rank, inputs, *shape[2:])
    return Lycoris(
        factors | {"lokr_w2_a": torch.randn(out, rank), "lokr_w2_b": second if kind == "kernel" else second.flatten(1)},
        alpha,
    )


def change_of(factors: LoraPair | Lycoris, shape: tuple[int, ...]) -> Tensor:
    """The change of a weight of this shape in fp64, by the formulas of the papers, written out by hand."""
    if isinstance(factors, LoraPair):
        product = factors.up.double().flatten(1) @ factors.down.double().flatten(1)
        return (product * (1.0 if factors.alpha is None else factors.alpha / len(factors.down))).reshape(shape)
    given = {name: factor.double() for name, factor in factors.factors.items()}
    ranks = [len(given[name]) for name in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b") if name in given]
    scale = factors.alpha / ranks[0] if ranks and factors.alpha is not None else 1.0

    def whole(name: str) -> Tensor:
        core = given.get(name.replace("w", "t"))
        if name in given:
            return given[name]
        if core is not None:
            return torch.einsum("ijthw,jr,ip->prthw", core, given[f"{name}_b"], given[f"{name}_a"])
        return torch.einsum("or,r...->o...", given[f"{name}_a"], given[f"{name}_b"])

    if "hada_w1_a" in given:
        return scale * (whole("hada_w1") * whole("hada_w2")).reshape(shape)
    w1, w2 = whole("lokr_w1"), whole("lokr_w2")
    return scale * torch.einsum("ab,cd->acbd", w1, w2.reshape(len(w2), -1)).reshape(shape)


def dora_weight(weight: Tensor, change: Tensor, magnitude: Magnitude) -> Tensor:
    """A whole weight after DoRA, in fp64, by the rule of the program that wrote the magnitude."""
    weight, changed = weight.double(), weight.double() + change.double()
    lengths = magnitude.values.double().flatten()
    ones = [1] * (weight.ndim - 2)
    if magnitude.values.shape[0] == 1 and len(weight) > 1:  # one for each input
        norms = torch.stack([changed[:, i].norm() for i in range(weight.shape[1])])
        return changed * (lengths / norms).reshape(1, -1, *ones)
    divisor = changed if magnitude.rule == PEFT else weight
    norms = torch.stack([row.norm() for row in divisor])
    return changed * (lengths / norms).reshape(-1, 1, *ones)


def save_all(path: Path, lora: LoraFile) -> Path:
    """Writes pairs and full changes under ComfyUI's names: changes of the modulation, too, which it does not apply."""
    tensors: dict[str, Tensor] = {f"diffusion_model.{key}": diff for key, diff in lora.diffs.items()}
    for name, pair in lora.pairs.items():
        stem = f"diffusion_model.{name}"
        tensors |= {f"{stem}.lora_A.weight": pair.down, f"{stem}.lora_B.weight": pair.up}
        tensors |= {} if pair.alpha is None else {f"{stem}.alpha": torch.tensor(pair.alpha)}
    return written(path, tensors, lora.metadata)
