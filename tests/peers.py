"""The same model as other libraries build it."""

from diffusers import WanTransformer3DModel

from wan.modules.model import WanShape


def diffusers_transformer(shape: WanShape) -> WanTransformer3DModel:
    """diffusers' transformer of this shape, with its own random weights, in eval mode."""
    return WanTransformer3DModel(
        num_attention_heads=shape.num_heads,
        attention_head_dim=shape.dim // shape.num_heads,
        text_dim=shape.text_dim,
        freq_dim=shape.freq_dim,
        ffn_dim=shape.ffn_dim,
        num_layers=shape.num_layers,
    ).eval()
