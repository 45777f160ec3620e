"""The vision encoder through which Wan 2.1 I2V and FLF2V see the frames they are given: the ViT-H/14 of a CLIP.

CLIP is Radford et al., 2021 (arXiv 2103.00020), the ViT is Dosovitskiy et al., 2020 (arXiv 2010.11929). transformers'
`CLIPVisionModel` computes it; the names of the weights and the preprocessing are Wan's.

N pictures, H W height and width in pixels, L tokens (one for the class, one per patch), D width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PREFIX = "visual."  # of the official names; the text encoder and a scale are in the same file
HEAD_SIZE = 80
EPS = 1e-5
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of red, green and blue in 0..1

# Name in transformers -> official name without its prefix.
_OUTSIDE = {
    "embeddings.class_embedding": "cls_embedding",
    "embeddings.position_embedding.weight": "pos_embedding",
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "pre_layrnorm.weight": "pre_norm.weight",
    "pre_layrnorm.bias": "pre_norm.bias",
    "post_layernorm.weight": "post_norm.weight",
    "post_layernorm.bias": "post_norm.bias",
}
_IN_BLOCK = {
    "layer_norm1": "norm1",
    **{f"self_attn.{x}_proj": "attn.to_qkv" for x in "qkv"},
    "self_attn.out_proj": "attn.proj",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_QKV = re.compile(r"\.([qkv])_proj\.")


@dataclass(frozen=True)
class VisionShape:
    """The widths of one vision encoder; the defaults are those of the released one.

    Raises ValueError for a width that is not that of whole heads.
    """

    dim: int = 1280
    mlp_dim: int = 5120
    num_layers: int = 32  # in the checkpoint; the last one is not used
    patch_size: int = 14
    image_size: int = 224  # height and width in pixels
    projection_dim: int = 1024  # of the head, which is not used

    def __post_init__(self) -> None:
        if self.dim > HEAD_SIZE and self.dim % HEAD_SIZE:
            raise ValueError(f"the width {self.dim} is not a multiple of {HEAD_SIZE}, the size of a head")

    @property
    def num_heads(self) -> int:
        """Heads of 80 channels, or a single smaller one."""
        return max(1, self.dim // HEAD_SIZE)

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


def vision_shape(shapes: Mapping[str, tuple[int, ...]]) -> VisionShape:
    """The shape of the encoder with tensors of these official names and shapes.

    No tensor tells the size of a head, the activation or the epsilon of the norms: they are those of the released
    encoder. Raises KeyError for a missing tensor, and ValueError or IndexError for one with other axes or widths.
    """
    dim, _, patch_size, _ = shapes["visual.patch_embedding.weight"]
    _, num_tokens, _ = shapes["visual.pos_embedding"]
    _, projection_dim = shapes.get("visual.head", (dim, VisionShape.projection_dim))
    return VisionShape(
        dim=dim,
        mlp_dim=shapes["visual.transformer.0.mlp.0.weight"][0],
        num_layers=len({name.split(".")[2] for name in shapes if name.startswith("visual.transformer.")}),
        patch_size=patch_size,
        image_size=isqrt(num_tokens - 1) * patch_size,
        projection_dim=projection_dim,
    )


def official_shapes(shape: VisionShape) -> dict[str, tuple[int, ...]]:
    """The official name and the shape of every tensor of the encoder's checkpoint, those that are not used included."""
    dim, mlp_dim, patch_size = shape.dim, shape.mlp_dim, shape.patch_size
    outside = {
        "cls_embedding": (1, 1, dim),
        "pos_embedding": (1, shape.num_tokens, dim),
        "head": (dim, shape.projection_dim),
        "patch_embedding.weight": (dim, 3, patch_size, patch_size),
    }
    layers: dict[str, tuple[int, ...]] = {"pre_norm": (dim,), "post_norm": (dim,)}
    for block in range(shape.num_layers):
        layers |= {
            f"transformer.{block}.norm1": (dim,),
            f"transformer.{block}.attn.to_qkv": (3 * dim, dim),
            f"transformer.{block}.attn.proj": (dim, dim),
            f"transformer.{block}.norm2": (dim,),
            f"transformer.{block}.mlp.0": (mlp_dim, dim),
            f"transformer.{block}.mlp.2": (dim, mlp_dim),
        }
    weights = {f"{name}.weight": size for name, size in layers.items()}
    biases = {f"{name}.bias": size[:1] for name, size in layers.items()}
    return {PREFIX + name: size for name, size in (outside | weights | biases).items()}


def used_shapes(shape: VisionShape) -> dict[str, tuple[int, ...]]:
    """What the encoder reads of `official_shapes`: neither the last block, nor the norm and the projection after it."""
    unread = f"{PREFIX}transformer.{shape.num_layers - 1}.", f"{PREFIX}post_norm.", f"{PREFIX}head"
    return {name: size for name, size in official_shapes(shape).items() if not name.startswith(unread)}


def official_name(name: str) -> str:
    """The official name of what transformers' CLIPVisionModel calls `name`; q, k and v are one tensor there.

    Raises KeyError for a name of anything else.
    """
    if block := _BLOCK.fullmatch(name):
        return f"{PREFIX}transformer.{block[1]}.{_IN_BLOCK[block[2]]}.{block[3]}"
    return PREFIX + _OUTSIDE[name]


def preprocess(frames: Tensor, image_size: int) -> Tensor:
    """Frames (N, 3, H, W) in -1..1 of any size -> what the encoder reads, (N, 3, image_size, image_size) fp32.

    As Wan's own code does it: a bicubic resize to a square, whatever the aspect ratio, without antialiasing, a crop,
    clamping or rounding; then the mean and standard deviation of CLIP. The image processors of CLIP give other pixels:
    they resize the shorter side with antialiasing and crop the centre.
    """
    squares = F.interpolate(frames.float(), (image_size, image_size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (MEAN, STD))
    return (squares * 0.5 + 0.5 - mean) / std


class VisionEncoder(nn.Module):
    """The ViT up to its last but one block, which gives the tokens that Wan was trained on.

    Exact GELU, a norm before the first block, no bias in the patch embedding. The last block is not built.
    """

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        # Only here, because the import takes seconds, and most models have no vision encoder.
        from transformers import CLIPVisionConfig, CLIPVisionModel

        config = CLIPVisionConfig(
            hidden_size=shape.dim,
            intermediate_size=shape.mlp_dim,
            num_hidden_layers=shape.num_layers - 1,
            num_attention_heads=shape.num_heads,
            image_size=shape.image_size,
            patch_size=shape.patch_size,
            hidden_act="gelu",
            layer_norm_eps=EPS,
        )
        model = CLIPVisionModel(config)
        self.shape = shape
        self.visual = getattr(model, "vision_model", model)  # the first releases of transformers 5 have one module more
        self.visual.post_layernorm = nn.Identity()  # of a pooled output that nothing reads
        # Not in the checkpoint, so they have values even if the module is built on the meta device.
        self.visual.embeddings.position_ids = torch.arange(shape.num_tokens, device="cpu")[None]

    def load_official(self, weights: Mapping[str, Tensor]) -> None:
        """Takes over, without copies, the weights of these official names and of `used_shapes`."""
        state = {}
        for name, parameter in self.visual.state_dict().items():
            tensor = weights[official_name(name)]
            if letter := _QKV.search(name):
                tensor = tensor.chunk(3)["qkv".index(letter[1])]
            state[name] = tensor.view(parameter.shape)
        self.visual.load_state_dict(state, assign=True)

    @property
    def device(self) -> torch.device:
        return self.visual.embeddings.class_embedding.device

    def encode(self, frames: Tensor) -> Tensor:
        """frames (N, 3, H, W) in -1..1, of any size -> tokens (N, L, D) fp32: as released, 257 of width 1280.

        They are the output of the last but one block, class token first, with neither the last norm nor the projection.
        """
        pixels = preprocess(frames.to(self.device), self.shape.image_size)
        return self.visual(pixels).last_hidden_state.float()
