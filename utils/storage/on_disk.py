"""Weights that wait on disk: dropped, and read again from the model's files when they are needed.

Models take turns, and main memory may be too small for the one that waits. The weights of the linear layers of its
blocks, 97 % of it in bf16, are then in no memory. They are read through the function that they were loaded with, so
that quantised weights and fused LoRAs are the same, bit for bit.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.common.errors import UserError
from utils.storage.linear import QuantisedLinear
from utils.storage.streaming import Stream
from utils.storage.weights import linear_layers
from wan.checkpoints import CheckpointError, Place, Progress, Quantised, TransformerFiles, read_some
from wan.modules.model import WanModel

CPU = torch.device("cpu")


class OnDisk:
    """The weights of the linear layers of one model's blocks, which are in its files whenever they are dropped."""

    def __init__(
        self, model: WanModel, files: TransformerFiles, place: Place, dtype: torch.dtype, stream: Stream | None = None
    ) -> None:
        """`model` has no adapters yet; it may get some later. `place` and `dtype` are those of its `load_weights`.

        `stream` is that of the model, whose memory the weights are read into, if it has one.
        """
        self._layers = {f"{name}.weight": layer for name, layer in linear_layers(model).items()}
        self._last_of_block = {name: int(name.split(".")[1]) for name in _last_of_each_block(self._layers)}
        self._files, self._place, self._dtype, self.stream = files, place, dtype, stream
        self._stamps = {path: _stamp(path) for path in files.files}

    @property
    def tensors(self) -> Iterator[Tensor]:
        """What is dropped and read: the weights, and the scales of those that are quantised."""
        for layer in self._layers.values():
            yield layer.weight
            if isinstance(layer, QuantisedLinear) and layer.scale is not None:
                yield layer.scale

    def drop(self) -> None:
        """Frees the memory of the weights."""
        drop(self._layers.values(), self._dtype)

    def read(self, progress: Progress = iter) -> None:
        """Reads all weights, whether they were dropped or not.

        Raises UserError where files have changed, are gone or cannot be read, and RunError as `Stream.settle` does.
        After that, or an interrupt, some weights are still missing, until a later call returns.
        """
        self._check_files()
        try:
            for name, tensor in read_some(self._files, self._layers, self._place, progress, self._dtype):
                layer = self._layers[name]
                if tensor is not layer.weight:
                    layer.weight = nn.Parameter(tensor, requires_grad=False)
                if self.stream is not None and name in self._last_of_block:
                    self.stream.settle(self._last_of_block[name])
        except CheckpointError as error:
            raise UserError(f"an expert that waited on disk cannot be read: {error}") from None

    def _check_files(self) -> None:
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise UserError(
                    f"{path} has changed or is gone, and --idle_expert disk reads it whenever the experts change\n"
                    "put the file back as it was, or start again with --idle_expert memory"
                )


def drop(layers: Iterable[nn.Linear], dtype: torch.dtype) -> None:
    """Takes the weights of layers. In place of each is a NaN in the shape of the weight: no answer could look right."""
    for layer in layers:
        nothing = torch.full((1, 1), math.nan, dtype=dtype).expand(layer.out_features, layer.in_features)
        if isinstance(layer, QuantisedLinear):
            layer.hold(Quantised(nothing), CPU)
        else:
            layer.weight = nn.Parameter(nothing, requires_grad=False)


def _last_of_each_block(names: Iterable[str]) -> Iterable[str]:
    """Of names that begin with "blocks.7." the last one of each block."""
    return {name.split(".")[1]: name for name in names}.values()


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells a file from one that was written later; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
