"""Small LoRA files for tests."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.adapters.lora_file import LoraFile, LoraPair

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
    """ComfyUI's own rule, as it merges a file into weights; whatever it would not load is left in the second result."""
    merged, left = dict(weights), dict(tensors)
    for key, weight in weights.items():
        name = key.removesuffix(".weight")
        for stem in (f"diffusion_model.{name}", "lora_unet_" + name.replace(".", "_")):
            for up_suffix, down_suffix in COMFY_SUFFIXES:
                if stem + up_suffix not in left:
                    continue
                up, down = left.pop(stem + up_suffix).float(), left.pop(stem + down_suffix).float()
                alpha = left.pop(stem + ".alpha", None)
                scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
                shape = left.pop(stem + ".reshape_weight", None)
                if shape is not None:
                    assert not shape.is_floating_point(), "ComfyUI raises a TypeError for sizes that are floats"
                    padded = torch.zeros(shape.tolist())
                    padded[tuple(slice(size) for size in weight.shape)] = weight
                    weight = padded
                change = torch.mm(up.flatten(start_dim=1), down.flatten(start_dim=1)).reshape(weight.shape)
                merged[key] = weight + strength * scale * change
    return merged, left


def save_all(path: Path, lora: LoraFile) -> Path:
    """Writes pairs and full changes under ComfyUI's names: changes of the modulation, too, which it does not apply."""
    tensors: dict[str, Tensor] = {f"diffusion_model.{key}": diff for key, diff in lora.diffs.items()}
    for name, pair in lora.pairs.items():
        stem = f"diffusion_model.{name}"
        tensors |= {f"{stem}.lora_A.weight": pair.down, f"{stem}.lora_B.weight": pair.up}
        tensors |= {} if pair.alpha is None else {f"{stem}.alpha": torch.tensor(pair.alpha)}
    return written(path, tensors, lora.metadata)
