"""Transformers loaded as the options want them: in which format, and which blocks wait in main memory."""

from collections.abc import Collection, Iterator, Mapping

import psutil
import torch
from torch import nn

from utils.common.console import say
from utils.common.device import compute_dtype
from utils.common.errors import UserError
from utils.common.formatting import counted, readable_size
from utils.storage.arena import return_memory_at_once
from utils.storage.linear import QuantisedLinear
from utils.storage.streaming import SLOTS, Ring, Stream, assign_slots
from utils.storage.weights import Cast, Storage, linear_layers
from wan.checkpoints import Progress, TransformerFiles, load_weights
from wan.modules.model import WanModel

CPU = torch.device("cpu")


class Store:
    """Loads the transformers of a run, which compute on one device, in turns where there are several."""

    def __init__(self, storage: Storage, takes_turns: bool = False) -> None:
        self.storage, self.takes_turns = storage, takes_turns
        self._ring = Ring(storage.device)
        self._is_described = False

    def load(
        self,
        model: WanModel,
        files: TransformerFiles,
        cast: Cast,
        changed: Collection[str] = (),
        progress: Progress = iter,
        waits: bool = False,
    ) -> Stream | None:
        """Gives a model its weights. The stream of its blocks, where any have their weights in main memory.

        `cast` and `changed` as `Storage.place` takes them. All of a model that `waits` is in main memory. What was done
        is printed of the first model. Raises CheckpointError as `load_weights` does, and UserError where main memory is
        too small.
        """
        storage, slots = self.storage, dict[int, int]()
        if storage.num_streamed:
            slots = assign_slots(len(model.blocks), storage.num_streamed, self.takes_turns)
        streamed = {f"{name}.weight" for name in linear_layers(model) if int(name.split(".")[1]) in slots}
        sizes = storage.sizes(model)
        waiting = sizes.keys() if waits else streamed
        if storage.device != CPU:
            self._check_room(sum(sizes[name] for name in waiting))

        def home(name: str) -> torch.device:
            return CPU if name in waiting else storage.device

        layers = storage.prepare(model)
        if waiting or layers:
            return_memory_at_once()
        load_weights(model, files, storage.place(layers, cast, home, changed), progress, storage.dtype)
        stream = Stream(model, slots, self._ring) if slots else None
        if not self._is_described:
            self._is_described = True
            for line in self._describe(model, layers, stream):
                say(line)
        return stream

    def _check_room(self, needed: int) -> None:
        """Raises UserError where so many bytes do not fit into what is free of main memory."""
        free = psutil.virtual_memory().available
        if needed <= free:
            return
        sizes = f"{readable_size(needed)}, and {readable_size(free)} are free"
        if not self.storage.num_streamed:
            raise UserError(
                f"one of the two experts is in main memory at any time: it takes {sizes}\n"
                "train one at a time: --expert high, then --expert low, without previews; or see --weight_dtype"
            )
        fewer = "train one at a time (--expert)" if self.takes_turns else "swap fewer with --blocks_to_swap"
        raise UserError(f"the blocks in main memory take {sizes}\n{fewer}, or store them in less with --weight_dtype")

    def _describe(self, model: WanModel, layers: Mapping[str, QuantisedLinear], stream: Stream | None) -> Iterator[str]:
        storage = self.storage
        if storage.format is not None:
            linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
            quantised = readable_size(sum(layer.nbytes for layer in layers.values()))
            others = readable_size(sum(each.weight.nbytes for each in linear if not isinstance(each, QuantisedLinear)))
            as_read = sum(layer.is_as_read for layer in layers.values())
            in_int8 = sum(layer.weight.dtype == torch.int8 for layer in layers.values())
            kept = f", {in_int8} of them in int8" if in_int8 and storage.format != "int8" else ""
            kept += f", {as_read} as the file has them" if as_read else ""
            ends = ", the first and the last block" if storage.keeps_ends else ""
            yield (
                f"{storage.format}: {len(layers)} of {len(linear)} linear layers are quantised, {quantised}{kept}; the "
                f"others take {others}: embeddings, head{ends}"
            )
        elif storage.dtype != compute_dtype(storage.device):
            yield f"the model computes in {str(storage.dtype).removeprefix('torch.')}"
        if stream is not None:
            whose = " of each expert" if self.takes_turns else ""
            waiting = readable_size(stream.nbytes * (2 if self.takes_turns else 1))
            buffers = f"{counted(min(SLOTS, storage.num_streamed), 'buffer')} of {readable_size(stream.block_bytes)}"
            yield (
                f"{storage.num_streamed} of {len(model.blocks)} blocks{whose} are swapped: main memory holds {waiting} "
                f"of weights, and the GPU has {buffers} for them"
            )
