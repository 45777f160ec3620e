"""The same model as other libraries build it."""

from diffusers import WanTransformer3DModel

from wan.modules.model import WanShape


def diffusers_transformer(shape: WanShape) -> WanTransformer3DModel:
    """diffusers' transformer of this shape, with its own random weights, in eval mode."""
    return WanTransformer3DModel(
        num_attention_heads=shape.num_heads,
        attention_head_dim=shape.dim // shape.num_heads,
        in_channels=shape.in_dim,
        out_channels=shape.out_dim,
        text_dim=shape.text_dim,
        freq_dim=shape.freq_dim,
        ffn_dim=shape.ffn_dim,
        num_layers=shape.num_layers,
        image_dim=shape.image_dim or None,
        added_kv_proj_dim=shape.dim if shape.image_dim else None,
        pos_embed_seq_len=shape.image_positions or None,
    ).eval()
