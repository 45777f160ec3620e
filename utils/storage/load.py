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
from utils.storage.on_disk import OnDisk, drop
from utils.storage.streaming import SLOTS, Ring, Stream, assign_slots
from utils.storage.weights import Cast, Storage, linear_layers
from wan.checkpoints import Progress, TransformerFiles, load_weights
from wan.modules.model import WanModel

CPU = torch.device("cpu")


class Store:
    """Loads the transformers of a run, which compute on one device, in turns where there are several."""

    def __init__(self, storage: Storage, takes_turns: bool = False) -> None:
        self.storage, self.takes_turns = storage, takes_turns
        self.on_disk: list[OnDisk] = []  # of the models in the order of loading, where those that wait are on disk
        self._idle_on_disk = takes_turns and storage.idle_on_disk
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

        `cast` and `changed` as `Storage.place` takes them. All of a model that `waits` is in main memory, or of its
        blocks nothing is read yet (`on_disk`). What was done is printed of the first model. Raises CheckpointError as
        `load_weights` does, and UserError where main memory is too small.
        """
        storage, slots = self.storage, dict[int, int]()
        if storage.num_streamed:
            slots = assign_slots(len(model.blocks), storage.num_streamed, self.takes_turns)
        inner = {f"{name}.weight" for name in linear_layers(model)}
        streamed = {name for name in inner if int(name.split(".")[1]) in slots}
        unread = inner if waits and self.on_disk else set[str]()
        in_stream = storage.streamed_sizes(model)
        sizes = storage.sizes(model) | {name: in_stream[name] for name in streamed}
        waiting = (sizes.keys() if waits else streamed) - unread
        if storage.device != CPU:
            self._check_room(sum(sizes[name] for name in waiting), waits)

        def home(name: str) -> torch.device:
            return CPU if name in waiting or name in streamed else storage.device

        layers = storage.prepare(model)
        if waiting or layers:
            return_memory_at_once()
        if unread:
            drop(linear_layers(model).values(), storage.dtype)
        place = storage.place(layers, cast, home, changed)
        load_weights(model, files, place, progress, storage.dtype, unread)
        sharing = self.on_disk[0].stream if unread else None
        stream = Stream(model, slots, self._ring, sharing) if slots else None
        if self._idle_on_disk:
            self.on_disk.append(OnDisk(model, files, place, storage.dtype, stream))
        if not self._is_described:
            self._is_described = True
            for line in self._describe(model, layers, stream):
                say(line)
        return stream

    def _check_room(self, needed: int, waits: bool) -> None:
        """Raises UserError where so many bytes do not fit into what is free of main memory."""
        free = psutil.virtual_memory().available
        if needed <= free:
            return
        sizes = f"{readable_size(needed)}, and {readable_size(free)} are free"
        alone = "train one at a time: --expert high, then --expert low, without previews"
        if waits and self._idle_on_disk:
            raise UserError(f"what the expert that waits on disk has in main memory takes {sizes}\n{alone}")
        to_disk = "let one of them wait on disk with --idle_expert disk, " if waits else ""
        if not self.storage.num_streamed:
            raise UserError(
                f"one of the two experts is in main memory at any time: it takes {sizes}\n"
                f"{to_disk}{alone}; or see --weight_dtype"
            )
        fewer = "train one at a time (--expert)" if self.takes_turns else "swap fewer with --blocks_to_swap"
        raise UserError(
            f"the blocks in main memory take {sizes}\n{to_disk}{fewer}, or store them in less with --weight_dtype"
        )

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
            waiting = readable_size(stream.nbytes * (2 if self.takes_turns and not self._idle_on_disk else 1))
            buffers = f"{counted(min(SLOTS, storage.num_streamed), 'buffer')} of {readable_size(stream.block_bytes)}"
            yield (
                f"{storage.num_streamed} of {len(model.blocks)} blocks{whose} are swapped: main memory holds {waiting} "
                f"of weights, and the GPU has {buffers} for them"
            )
        if self._idle_on_disk:
            size = readable_size(sum(tensor.nbytes for tensor in self.on_disk[0].tensors))
            yield f"the expert that waits is on disk: {size} are read again whenever the experts change"
