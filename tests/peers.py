"""The same model as other libraries build it."""

from diffusers import AutoencoderKLWan, WanTransformer3DModel

from tests.layouts import to_diffusers as to_diffusers
from tests.layouts import vae22_to_diffusers
from wan.modules.model import WanShape
from wan.modules.vae2_2 import Wan22VAE


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


def diffusers_vae22(vae: Wan22VAE) -> AutoencoderKLWan:
    """diffusers' VAE of Wan 2.2 with the weights of ours, frozen; its statistics are those of Wan 2.1."""
    reference = AutoencoderKLWan(
        base_dim=len(vae.encoder.conv1.weight),
        decoder_base_dim=len(vae.get_parameter("decoder.head.0.gamma")),
        z_dim=vae.z_dim,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )
    state = {vae22_to_diffusers(name): tensor for name, tensor in vae.state_dict().items()}
    reference.load_state_dict(state, assign=True)
    return reference.eval().requires_grad_(False)
