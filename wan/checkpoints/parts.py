"""Modules without memory, built for the weights that a model has; what does not fit is refused before it is loaded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from wan.checkpoints.errors import CheckpointError
from wan.checkpoints.tensors import Shape
from wan.checkpoints.transformer import TransformerFiles
from wan.checkpoints.weights import Weights, count_blocks, reading_widths
from wan.modules.clip import VisionShape, official_shapes, used_shapes, vision_shape
from wan.modules.model import WanModel
from wan.modules.t5 import UMT5Encoder
from wan.modules.vae import WanVAE
from wan.modules.vae2_2 import Wan22VAE

Module = TypeVar("Module", bound=nn.Module)


def build_transformer(files: TransformerFiles) -> WanModel:
    """The frozen transformer without weights, on the meta device: it has every name and shape, and costs nothing."""
    with reading_widths(files.path):
        return on_meta(lambda: WanModel(files.shape))


def build_vae(weights: Weights) -> WanVAE:
    """The VAE of the release and the widths of these weights, as `build_transformer` does. Raises CheckpointError."""
    shapes = weights.shapes
    with reading_widths(weights.path):
        (dim, *_), (z_dim, *_) = shapes["encoder.conv1.weight"], shapes["conv2.weight"]
        decoder_dim = shapes["decoder.head.0.gamma"][0]
        if "decoder.upsamples.0.upsamples.0.residual.2.weight" in shapes:
            return on_meta(lambda: Wan22VAE(dim, decoder_dim, z_dim))
        if decoder_dim != dim:
            widths = f"its encoder has the width {dim}, its decoder {decoder_dim}"
            raise CheckpointError(f"{weights.path} is a pruned VAE ({widths}), which is not read here")
        return on_meta(lambda: WanVAE(dim, z_dim))


def build_text_encoder(weights: Weights) -> UMT5Encoder:
    """The UMT5 encoder of the widths of these weights, as `build_transformer` does. Raises CheckpointError."""
    shapes = weights.shapes
    with reading_widths(weights.path):
        vocab_size, dim = shapes["token_embedding.weight"]
        num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        dim_attn, dim_ffn = (shapes[f"blocks.0.{name}.weight"][0] for name in ("attn.q", "ffn.fc1"))
        num_layers = count_blocks(shapes)
        if num_layers > 1 and "blocks.1.pos_embedding.embedding.weight" not in shapes:
            fact = "only its first block has a table of positions"
            raise CheckpointError(f"{weights.path} is a T5 text encoder, not a UMT5 one: {fact}")
        return on_meta(lambda: UMT5Encoder(vocab_size, dim, dim_attn, dim_ffn, num_heads, num_layers, num_buckets))


def shape_of_vision(weights: Weights) -> VisionShape:
    """The widths of a vision encoder. Raises CheckpointError."""
    with reading_widths(weights.path):
        shape = vision_shape(weights.shapes)
    # The last block is not read, so a file may lack it. Counted from there, an earlier one would be left out.
    if shape.dim == VisionShape.dim and shape.num_layers != VisionShape.num_layers:
        raise CheckpointError(f"{weights.path} has {shape.num_layers} blocks, not {VisionShape.num_layers}")
    return shape


def check_vision(weights: Weights, shape: VisionShape) -> None:
    """Raises CheckpointError unless the weights are a vision encoder's, whether all of it or what is read of it."""
    known, needed = official_shapes(shape), used_shapes(shape)
    check_names(needed, (name for name in weights.tensors if name in needed or name not in known), weights.path)
    check_shapes(needed, {name: weights.tensors[name].shape for name in needed}, weights.path)


def on_meta(build: Callable[[], Module]) -> Module:
    """A frozen module in eval mode whose parameters take no memory."""
    with torch.device("meta"):
        return build().eval().requires_grad_(False)


def check_module(module: nn.Module, weights: Weights) -> None:
    """Raises CheckpointError unless the weights have exactly the names and shapes of the module's."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_names(expected, weights.tensors, weights.path)
    check_shapes(expected, weights.shapes, weights.path)


def check_names(expected: Mapping[str, object], names: Iterable[str], path: Path) -> None:
    """Raises CheckpointError for a tensor that is missing or that nothing expects."""
    found = set(names)
    _refuse(path, "lacks", [name for name in expected if name not in found])
    _refuse(path, "has the foreign", [name for name in sorted(found) if name not in expected])


def check_shapes(expected: Mapping[str, Shape], shapes: Mapping[str, Shape], path: Path) -> None:
    """Raises CheckpointError for a tensor that has another shape than expected, with both of the first one."""
    wrong = [name for name in shapes if tuple(shapes[name]) != tuple(expected[name])]
    facts = [f"{name} of shape {list(shapes[name])}, not {list(expected[name])}" for name in wrong]
    _refuse(path, "has the", facts)


def _refuse(path: Path, fault: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(f"{path} {fault} tensor {', '.join(names[:3])}{more}")
