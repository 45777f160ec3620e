"""From files to modules: built without memory on the meta device, filled tensor by tensor, frozen, in eval mode."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from wan.checkpoints.errors import CheckpointError
from wan.checkpoints.find import ModelFiles, clip_file
from wan.checkpoints.headers import TransformerFiles, count_blocks, reading_widths
from wan.checkpoints.tensors import Shape, open_tensors, read_pth
from wan.modules.clip import PREFIX, VisionEncoder, official_shapes, vision_shape
from wan.modules.model import WanModel, is_fp32
from wan.modules.t5 import TextEncoder, UMT5Encoder
from wan.modules.tokenizers import Tokenizer
from wan.modules.vae import WanVAE
from wan.modules.vae2_2 import Wan22VAE

Device = torch.device | str
Place = Callable[[str, Tensor], Tensor]  # from a tensor's official name and its content to what the model holds
Progress = Callable[[Sequence[str]], Iterable[str]]  # may wrap the names of the tensors in a bar
Module = TypeVar("Module", bound=nn.Module)


def build_transformer(files: TransformerFiles) -> WanModel:
    """The frozen transformer without weights, on the meta device: it has every name and shape, and costs nothing."""
    return _on_meta(lambda: WanModel(files.shape))


def load_weights(
    model: WanModel, files: TransformerFiles, place: Place, progress: Progress = iter, device: Device = "cpu"
) -> WanModel:
    """Gives a model from `build_transformer` its weights; returns it.

    Each tensor is read straight to `device` and passed to `place` before the next one is read, so that memory never
    holds a second copy of the model. `place` returns what the model will hold: the tensor in another dtype, on another
    device, quantised, with a LoRA added. The model may have been changed before, such as by wider inputs or layers of
    another class. Raises CheckpointError unless its names are those of the file and its shapes those `place` returns.
    """
    _check_names(model.state_dict(), files.tensors, files.path)
    with open_tensors(files.tensors, device) as read:
        state = {name: place(name, read(name)) for name in progress(list(files.tensors))}
    return _assign(model, state, files.path)


def cast_to(dtype: torch.dtype, device: Device = "cpu") -> Place:
    """A `place` that casts to `dtype` on `device`, except for the parameters that stay fp32 (`is_fp32`)."""
    # Moved first, so that the cast runs on the device and makes no copy in host memory.
    return lambda name, tensor: tensor.to(device).to(torch.float32 if is_fp32(name) else dtype)


def load_transformer(
    files: TransformerFiles, dtype: torch.dtype, device: Device = "cpu", progress: Progress = iter
) -> WanModel:
    """The frozen transformer on `device`: its linear layers in `dtype`, and in fp32 what `is_fp32` names.

    Raises CheckpointError for a missing, unexpected or misshapen tensor, and for a file that cannot be read.
    """
    return load_weights(build_transformer(files), files, cast_to(dtype, device), progress, device)


def load_vae(files: ModelFiles, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> WanVAE:
    """The frozen VAE of the release that the file is of, fp32 as in official use.

    Raises CheckpointError as `load_transformer` does, and for a VAE whose latents the model cannot read.
    """
    state = read_pth(files.vae)
    return _fill(_build_vae(files, state), state, files.vae).to(device, dtype)


def check_vae(files: ModelFiles) -> None:
    """Raises CheckpointError for a VAE whose latents the model cannot read. Loads no weights."""
    _build_vae(files, read_pth(files.vae))


def _build_vae(files: ModelFiles, state: Mapping[str, Tensor]) -> WanVAE:
    """The VAE of these tensors without weights. Raises CheckpointError for one of another release than the model's."""
    with reading_widths(files.vae):
        vae = _on_meta(lambda: _vae_like(state))
    if vae.z_dim != (needed := files.family.out_dim):
        kind = f"the {vae.release} VAE, which has {vae.z_dim} latent channels"
        raise CheckpointError(f"{files.vae} is {kind}; the model has {needed}: give it {files.family.vae}")
    return vae


def _vae_like(state: Mapping[str, Tensor]) -> WanVAE:
    """A VAE of the release and the widths of these tensors."""
    dim, z_dim = len(state["encoder.conv1.weight"]), len(state["conv2.weight"])
    if "decoder.upsamples.0.upsamples.0.residual.2.weight" in state:
        return Wan22VAE(dim, len(state["decoder.head.0.gamma"]), z_dim)
    return WanVAE(dim, z_dim)


def load_text_encoder(files: ModelFiles, dtype: torch.dtype, device: Device) -> TextEncoder:
    """The frozen UMT5 encoder with its tokenizer, which truncates to the text length. Raises CheckpointError."""
    try:
        tokenizer = Tokenizer(files.tokenizer, files.text_len)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{files.tokenizer} is not a tokenizer: {error}") from None
    path, state = files.text_encoder, read_pth(files.text_encoder)
    with reading_widths(path):
        vocab_size, dim = state["token_embedding.weight"].shape
        num_buckets, num_heads = state["blocks.0.pos_embedding.embedding.weight"].shape
        dim_attn, dim_ffn = (len(state[f"blocks.0.{name}.weight"]) for name in ("attn.q", "ffn.fc1"))
        num_layers = count_blocks(state)
        encoder = _on_meta(lambda: UMT5Encoder(vocab_size, dim, dim_attn, dim_ffn, num_heads, num_layers, num_buckets))
    return TextEncoder(_fill(encoder, state, path).to(device, dtype), tokenizer)


def load_vision_encoder(files: ModelFiles, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> VisionEncoder:
    """The frozen vision encoder, without its last block. Raises CheckpointError as `load_transformer` does.

    The official file also holds the text encoder of the CLIP, which stays on disk.
    """
    path = clip_file(files)
    weights = {name: tensor for name, tensor in read_pth(path).items() if name.startswith(PREFIX)}
    with reading_widths(path):
        shape = vision_shape(weights)
        encoder = _on_meta(lambda: VisionEncoder(shape))
    expected = official_shapes(shape)
    _check_names(expected, weights, path)
    _check_shapes(expected, weights, path)
    encoder.load_official(weights)
    return encoder.to(device, dtype)


def _on_meta(build: Callable[[], Module]) -> Module:
    with torch.device("meta"):
        return build().eval().requires_grad_(False)


def _fill(module: Module, state: Mapping[str, Tensor], path: Path) -> Module:
    _check_names(module.state_dict(), state, path)
    return _assign(module, state, path)


def _assign(module: Module, state: Mapping[str, Tensor], path: Path) -> Module:
    _check_shapes({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, state, path)
    module.load_state_dict(state, assign=True)
    return module


def _check_names(expected: Mapping[str, object], names: Iterable[str], path: Path) -> None:
    found = set(names)
    _refuse(path, "lacks", [name for name in expected if name not in found])
    _refuse(path, "has the foreign", [name for name in names if name not in expected])


def _check_shapes(expected: Mapping[str, Shape], state: Mapping[str, Tensor], path: Path) -> None:
    _refuse(path, "has a wrong shape of", [name for name in state if state[name].shape != expected[name]])


def _refuse(path: Path, fault: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(f"{path} {fault} tensor {', '.join(names[:3])}{more}")
