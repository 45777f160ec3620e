"""How the frozen weights of a transformer are held: in which format, and which layers stay as they are."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from utils.common.decisions import Decisions
from utils.common.device import compute_dtype
from utils.common.errors import UserError
from utils.common.options import option
from utils.storage.formats import need_bitsandbytes, quantise, stored_bytes
from utils.storage.linear import QuantisedLinear
from utils.storage.products import PRODUCTS
from utils.storage.timing import faster_matmul, time_products
from wan.checkpoints import FP8, Place, Quantised, Stored
from wan.modules.model import WanShape, is_fp32

Cast = Callable[[torch.dtype, torch.device], Place]

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in PLAIN.items()}
QUANTISED = ("fp8", "fp8_scaled", "int8", "nf4")
FORMATS = (*PLAIN, *QUANTISED)
# In these formats some layers of the transformer are stored in int8: rounded more coarsely, they alone would turn the
# gradients of LoRAs further away than is allowed (benchmarks/RECORDS.md).
IN_INT8 = {"fp8_scaled": ("*_attn.*", "*.ffn.2"), "nf4": ("*_attn.*",)}
# What these are called in diffusion-pipe and in OneTrainer.
SPELLINGS = {
    "float32": "fp32", "bfloat16": "bf16", "float8": "fp8", "float8_e4m3fn": "fp8", "fp8_e4m3fn": "fp8",
    "float_32": "fp32", "bfloat_16": "bf16", "float_8": "fp8", "int_8": "int8", "nfloat_4": "nf4",
}  # fmt: skip


@dataclass(frozen=True)
class StorageOptions:
    """base weights"""

    weight_dtype: str = option(
        "auto",
        "how the base model is stored; auto: bf16 on a GPU, fp32 on the CPU, in which it then computes too; of the "
        "quantised ones int8 is the most exact, and nf4 the smallest",
        choices=("auto", *FORMATS),
        aliases=("transformer_dtype",),
        spellings=SPELLINGS,
    )
    text_encoder_dtype: str = option(
        "auto",
        "the same for the text encoder, which is loaded only if an embedding is not cached yet",
        choices=("auto", *FORMATS),
        spellings=SPELLINGS,
    )
    keep_end_blocks: bool = option(False, "do not quantise the first and the last block")
    quantised_matmul: str = option(
        "auto",
        "multiply with fp8 and int8 weights as they are stored, which rounds what is multiplied to 8 bits too; "
        "auto: on a GPU, where that is faster",
        choices=("auto", "on", "off"),
    )
    blocks_to_swap: int | None = option(
        None,
        "number of blocks whose weights are in main memory, and are copied to the GPU when they run (default: "
        "chosen by --vram when training, otherwise 0)",
        minimum=0,
        affects_training=False,
    )
    layer_offload_fraction: float | None = option(
        None, "as --blocks_to_swap, as a share of all blocks: 0 to 1", minimum=0, maximum=1, affects_training=False
    )

    @property
    def storage_flags(self) -> str:
        """The options, as typed, with which the test script holds weights as the run does; none for the defaults."""
        names = [spec.name for spec in fields(StorageOptions)]
        changed = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(StorageOptions, name)}
        return "".join(f" --{name}" if value is True else f" --{name} {value}" for name, value in changed.items())

    def check_storage(self, num_blocks: int) -> None:
        """Raises UserError for options that contradict each other or would be ignored, and for a missing library."""
        if "nf4" in (self.weight_dtype, self.text_encoder_dtype):
            need_bitsandbytes()
        if self.keep_end_blocks and self.weight_dtype not in QUANTISED:
            raise UserError(f"--keep_end_blocks is for a quantised --weight_dtype: give {', '.join(QUANTISED)}")
        if self.quantised_matmul == "on" and self.weight_dtype not in PRODUCTS:
            raise UserError(f"--quantised_matmul on is for --weight_dtype {', '.join(PRODUCTS)}")
        self.count_streamed(num_blocks)

    def count_streamed(self, num_blocks: int) -> int:
        """How many blocks have their weights in main memory. Raises UserError for more blocks than there are."""
        if self.blocks_to_swap is not None and self.layer_offload_fraction is not None:
            raise UserError("--blocks_to_swap and --layer_offload_fraction say the same: give one of them")
        count = self.blocks_to_swap or 0
        if count > num_blocks:
            raise UserError(f"--blocks_to_swap {count}: the model has {num_blocks} blocks")
        return math.ceil(self.layer_offload_fraction * num_blocks) if self.layer_offload_fraction else count

    @property
    def says_what_is_swapped(self) -> bool:
        """Whether the user has decided how many blocks are."""
        return self.blocks_to_swap is not None or self.layer_offload_fraction is not None

    def storage(self, device: torch.device, shape: WanShape, tokens: int, decisions: Decisions) -> "Storage":
        """How the weights of a model of this shape are held, for batches of about so many tokens.

        Raises UserError where a library is missing, for more blocks than there are, and where the device does not
        multiply what it is to multiply.
        """
        name, matmul = self.weight_dtype, self.quantised_matmul
        if name == "auto":
            name = decisions.take("weight_dtype", lambda: NAMES[compute_dtype(device)], FORMATS.__contains__)
        held = hold_as(name, device)
        if matmul != "off" and held.format in PRODUCTS and device.type == "cuda":
            measure = partial(time_products, held.format, (shape.ffn_dim, shape.dim), tokens, device, held.dtype)
            if matmul == "auto":
                matmul = decisions.take("quantised_matmul", lambda: faster_matmul(measure()))
            elif measure().in_codes is None:
                raise UserError(f"--quantised_matmul on: this GPU does not multiply {held.format}")
        num_streamed = self.count_streamed(shape.num_layers)
        return replace(
            held,
            keeps_ends=self.keep_end_blocks,
            num_streamed=num_streamed,
            in_codes=matmul == "on",
        )


def hold_as(name: str, device: torch.device) -> "Storage":
    """What `--weight_dtype` and `--text_encoder_dtype` mean. Raises UserError where a library is missing."""
    if name == "nf4":
        need_bitsandbytes()
    return Storage(device, PLAIN.get(name, compute_dtype(device)), name if name in QUANTISED else None)


@dataclass(frozen=True)
class Storage:
    """On which device and in which dtype a model with blocks computes, and how its weights are held."""

    device: torch.device
    dtype: torch.dtype
    format: str | None = None  # of QUANTISED: that of the blocks' linear layers
    keeps_ends: bool = False  # whether those of the first and the last block are not quantised
    num_streamed: int = 0  # blocks whose weights wait in main memory
    in_codes: bool = False  # whether products are made of the codes themselves
    idle_on_disk: bool = False  # of models that take turns: whether the one that waits is read again for its turn

    @property
    def is_plain(self) -> bool:
        """Whether all weights are values on the device."""
        return self.format is None and not self.num_streamed

    def prepare(self, model: nn.Module) -> dict[str, QuantisedLinear]:
        """Makes room for codes in a model without weights. The layers that will hold them, by their weights' names."""
        layers = dict[str, QuantisedLinear]()
        if self.format is not None:
            for name, layer in linear_layers(model, self.keeps_ends).items():
                parent, _, own = name.rpartition(".")
                stand_in = QuantisedLinear(layer, Quantised(layer.weight.detach()), self.in_codes)
                layers[f"{name}.weight"] = stand_in
                setattr(model.get_submodule(parent), own, stand_in)
        return layers

    def place(
        self,
        layers: Mapping[str, QuantisedLinear],
        cast: Cast,
        home: Callable[[str], torch.device],
        changed: Collection[str] = (),
    ) -> Place:
        """What is done to each tensor of a model while it is loaded; `layers` as `prepare` returned them.

        `cast` gives the values of a tensor in a dtype on a device, and may change those of the names `changed`. What
        the file has in the wanted format is kept as it is. `home` is where a tensor is to be.
        """

        def place(name: str, stored: Stored) -> Tensor:
            layer, device = layers.get(name), home(name)
            if layer is None or tuple(stored.shape) != (layer.out_features, layer.in_features):
                # What is computed is computed on one device: the numbers are the same wherever the tensor waits.
                is_computed = name in changed or isinstance(stored, Quantised)
                return cast(self.dtype, self.device if is_computed else device)(name, stored).to(device)
            if isinstance(stored, Quantised) and name not in changed and self._is_kept(stored):
                layer.hold(stored.to(device), self.device, is_as_read=True)
            else:
                assert self.format is not None
                # Codes are made of fp32: of what the file says, not of what is left of it in bf16.
                values = cast(torch.float32, self.device)(name, stored)
                quantised = quantise(values, format_of(name.removesuffix(".weight"), self.format))
                layer.hold(quantised.to(device), self.device)
            return layer.weight

        return place

    def sizes(self, model: nn.Module, stays_fp32: Callable[[str], bool] = is_fp32) -> dict[str, int]:
        """The bytes that each parameter of a model without weights will take, by its name."""
        quantised = set(linear_layers(model, self.keeps_ends)) if self.format else set()
        return {
            name: stored_bytes(parameter.shape[0], parameter.shape[1], format_of(layer, self.format))
            if self.format and name != layer and layer in quantised
            else parameter.numel() * (torch.float32 if stays_fp32(name) else self.dtype).itemsize
            for name, parameter in model.named_parameters()
            for layer in [name.removesuffix(".weight")]
        }

    def streamed_sizes(self, model: nn.Module) -> dict[str, int]:
        """As `sizes`, of blocks in a `Stream`, which gives each row of fp8 a scale where the format has none."""
        return (replace(self, format="fp8_scaled") if self.format == "fp8" else self).sizes(model)

    def _is_kept(self, stored: Quantised) -> bool:
        """Whether codes of a file are kept: int8 as int8, and any fp8 as fp8, which could only lose."""
        if self.format == "int8":
            return stored.codes.dtype == torch.int8
        return self.format in ("fp8", "fp8_scaled") and stored.codes.dtype in FP8


def format_of(layer: str, format: str) -> str:
    """The format of a layer, by its name, in a model that is stored in `format`."""
    return "int8" if any(fnmatchcase(layer, pattern) for pattern in IN_INT8.get(format, ())) else format


def linear_layers(model: nn.Module, keeps_ends: bool = False) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by their names, where it is so, without those of the first and the last block."""
    blocks = model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    last = len(blocks) - 1
    return {
        f"blocks.{index}.{name}": module
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and not (keeps_ends and index in (0, last))
    }
