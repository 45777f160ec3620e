"""From files to modules: built without memory on the meta device, filled tensor by tensor, frozen, in eval mode."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from wan.checkpoints.errors import CheckpointError
from wan.checkpoints.find import ModelFiles, clip_weights
from wan.checkpoints.parts import (
    build_text_encoder,
    build_transformer,
    build_vae,
    check_module,
    check_names,
    check_shapes,
    check_vision,
    on_meta,
    shape_of_vision,
)
from wan.checkpoints.stored import Stored, values_of
from wan.checkpoints.tensors import open_tensors
from wan.checkpoints.transformer import TransformerFiles
from wan.checkpoints.weights import Weights
from wan.modules.clip import VisionEncoder, used_shapes
from wan.modules.model import WanModel, is_fp32
from wan.modules.t5 import TextEncoder, UMT5Encoder
from wan.modules.tokenizers import Tokenizer
from wan.modules.vae import WanVAE

Device = torch.device | str
Place = Callable[[str, Stored], Tensor]  # from a tensor's official name and its content to what the model holds
Progress = Callable[[Sequence[str]], Iterable[str]]  # may wrap the names of the tensors in a bar
Module = TypeVar("Module", bound=nn.Module)


def load_weights(
    model: WanModel,
    files: TransformerFiles,
    place: Place,
    progress: Progress = iter,
    dtype: torch.dtype = torch.float32,
    unread: Collection[str] = (),
) -> WanModel:
    """Gives a model from `build_transformer` its weights; returns it.

    Each tensor is read and passed to `place` before the next one is read, so that memory never holds a second copy of
    the model. It is a view of the file, in main memory: moved to a device before it is cast, it leaves no copy there.
    `place` returns what the model will hold: the tensor in another dtype, on another device, quantised, with a LoRA
    added. The model may have been changed before, such as by wider inputs or layers of another class. What the file has
    quantised is passed on as it is stored; `dtype` is that of the model's computation, in which several parts of one
    tensor are joined. Of the tensors `unread` only the shapes are compared, with those of what the model has in their
    place and keeps; `read_some` reads them later. Raises CheckpointError unless its names are those of the file and its
    shapes those `place` returns.
    """
    check_names(model.state_dict(), files.tensors, files.path)
    return _fill(model, files, place, progress, dtype, unread)


def read_some(
    weights: Weights,
    names: Collection[str],
    place: Place,
    progress: Progress = iter,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Tensor]]:
    """These tensors of a file, one after another: each name, and what `place` returns, as `load_weights` has it.

    Raises CheckpointError for a file that cannot be read.
    """
    with open_tensors({name: weights.tensors[name] for name in names}, dtype) as read:
        for name in progress(list(names)):
            yield name, place(name, read(name))


def cast_to(dtype: torch.dtype, device: Device = "cpu") -> Place:
    """A `place` that moves to `device` and casts to `dtype`, in which what is quantised has its values.

    The parameters that `is_fp32` names become fp32.
    """
    return lambda name, stored: values_of(stored.to(device), dtype).to(torch.float32 if is_fp32(name) else dtype)


def load_transformer(
    files: TransformerFiles, dtype: torch.dtype, device: Device = "cpu", progress: Progress = iter
) -> WanModel:
    """The frozen transformer on `device`: its linear layers in `dtype`, and in fp32 what `is_fp32` names.

    Raises CheckpointError for a missing, unexpected or misshapen tensor, and for a file that cannot be read.
    """
    return load_weights(build_transformer(files), files, cast_to(dtype, device), progress, dtype)


def load_vae(files: ModelFiles, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> WanVAE:
    """The frozen VAE of the release that the file is of, fp32 as in official use. Raises CheckpointError."""
    return _load(build_vae(files.vae), files.vae, device, dtype)


def load_text_encoder(
    files: ModelFiles, dtype: torch.dtype, device: Device, place_in: Callable[[UMT5Encoder], Place] | None = None
) -> TextEncoder:
    """The frozen UMT5 encoder with its tokenizer, which truncates to the text length. Raises CheckpointError.

    `place_in` may change the encoder before it has weights, and returns what is done to each of them (`load_weights`).
    """
    try:
        tokenizer = Tokenizer(files.tokenizer, files.text_len)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{files.tokenizer} is not a tokenizer: {error}") from None
    weights = files.text_encoder
    return TextEncoder(_load(build_text_encoder(weights), weights, device, dtype, place_in), tokenizer)


def load_vision_encoder(files: ModelFiles, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> VisionEncoder:
    """The frozen vision encoder, without its last block. Raises CheckpointError as `load_transformer` does.

    What else is in the file, such as the text encoder of the CLIP, stays on disk.
    """
    weights = clip_weights(files)
    shape = shape_of_vision(weights)
    check_vision(weights, shape)
    encoder = on_meta(lambda: VisionEncoder(shape))
    read_only = {name: weights.tensors[name] for name in used_shapes(shape)}
    with open_tensors(read_only, dtype) as read:
        encoder.load_official({name: values_of(read(name).to(device), dtype).to(dtype) for name in read_only})
    return encoder.to(device, dtype)


def all_to(dtype: torch.dtype, device: Device = "cpu") -> Place:
    """A `place` that moves and casts every tensor."""
    return lambda _, stored: values_of(stored.to(device), dtype).to(dtype)


def _load(
    module: Module,
    weights: Weights,
    device: Device,
    dtype: torch.dtype,
    place_in: Callable[[Module], Place] | None = None,
) -> Module:
    """The module with its weights, all of them in one dtype unless `place_in` says otherwise."""
    check_module(module, weights)
    return _fill(module, weights, place_in(module) if place_in else all_to(dtype, device), iter, dtype)


def _fill(
    module: Module,
    weights: Weights,
    place: Place,
    progress: Progress,
    dtype: torch.dtype,
    unread: Collection[str] = (),
) -> Module:
    names = [name for name in weights.tensors if name not in unread]
    state = dict(read_some(weights, names, place, progress, dtype))
    own = module.state_dict()
    shapes = {name: weights.tensors[name].shape for name in unread}
    shapes |= {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_shapes({name: tuple(tensor.shape) for name, tensor in own.items()}, shapes, weights.path)
    module.load_state_dict({name: own[name] for name in unread} | state, assign=True)
    return module
