"""What the modules of a Wan model are called: officially, in diffusers, and with dots turned to underscores."""

import re

PATCH = "patch_embedding"  # the first layer, which a control widens

# Official name -> diffusers name. The norms are numbered differently: norm3 here, before cross attention, is norm2.
_IN_BLOCK = {
    **{f"self_attn.{x}": f"attn1.to_{x}" for x in "qkv"},
    **{f"cross_attn.{x}": f"attn2.to_{x}" for x in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
    "modulation": "scale_shift_table",
}
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}


def _flat_spellings(names: dict[str, str]) -> dict[str, str]:
    """Underscored official and diffusers spellings -> official name; no two of them collide."""
    return {spelling.replace(".", "_"): official for official, other in names.items() for spelling in (official, other)}


_FLAT_IN_BLOCK, _FLAT_OUTSIDE = _flat_spellings(_IN_BLOCK), _flat_spellings(_OUTSIDE)
_FLAT_BLOCK = re.compile(r"((?:vace_)?blocks)_(0|[1-9]\d*)_(.+)")
_OFFICIAL_BLOCK = re.compile(r"((?:vace_)?blocks\.\d+)\.(.+)")


def official_name(name: str) -> str | None:
    """The official Wan name of a module or parameter spelled officially, as in diffusers, or with underscores."""
    flat = name.replace(".", "_")
    if block := _FLAT_BLOCK.fullmatch(flat):
        inner = _FLAT_IN_BLOCK.get(block[3])
        return inner and f"{block[1]}.{block[2]}.{inner}"
    return _FLAT_OUTSIDE.get(flat)


def diffusers_name(name: str) -> str:
    """The diffusers name of an official Wan module or parameter; KeyError for any other name."""
    if block := _OFFICIAL_BLOCK.fullmatch(name):
        return f"{block[1]}.{_IN_BLOCK[block[2]]}"
    return _OUTSIDE[name]


def is_parameter(name: str) -> bool:
    """Whether an official name is a bare parameter's: a delta may change it, a pair of matrices cannot."""
    return name.endswith(("modulation", "emb_pos"))
