"""What it costs in accuracy to store the frozen weights in 8 or 4 bits: loss and LoRA gradients of one step.

    python -m benchmarks.quantised                      every format, on one thread of a CPU
    python -m benchmarks.quantised --keep *.ffn.2       these layers are not quantised; with --keep_end_blocks
    python -m benchmarks.quantised --only nf4 int8      some of the rows
    python -m benchmarks.quantised --no-outliers        plain random weights

A model of a few blocks of the width of Wan2.1-T2V-1.3B has random weights, with what makes trained ones hard to round:
every linear layer of the blocks has a column of weights that is 30 times as large, and reads another channel that is 50
times as large. The reference is fp32 in fp32. Prints a table for benchmarks/RECORDS.md; the exit code is 1 where a
limit is missed.
"""

import gc
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check import ROOT, commit
from benchmarks.measure import Sizes, cosine
from benchmarks.models import random_inputs, with_adapter
from benchmarks.weights import hold_in_codes, random_transformer, to_bf16
from utils.adapters.lora import adapter_parameters
from utils.common.errors import RunError
from utils.common.formatting import readable_size
from utils.common.options import option, parse_options, run_script
from utils.storage import formats
from utils.storage.formats import ROTATED, Quantised, quantise, values
from utils.storage.linear import QuantisedLinear
from utils.storage.products import PRODUCTS
from utils.storage.weights import format_of, linear_layers
from utils.training.memory import Memory
from wan.checkpoints import rotate_columns, rotation
from wan.modules.model import Block, WanModel, WanShape

HEAVY_WEIGHT, HEAVY_INPUT = 30.0, 50.0
SIZES = Sizes(shape=WanShape(num_layers=4), video=(2, 24, 32))  # 384 tokens
CPU = torch.device("cpu")
LIMITS = {"int8": 0.999, "fp8_scaled": 0.998, "nf4": 0.99}  # of both cosines
TARGETS = ("attn", "all-linear")
HEADER = ("weights", "computed in", "bytes of the blocks", "LoRA on", "relative loss difference",
          "cosine, all LoRA gradients", "cosine, worst matrix", "which", "limit")  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How the frozen weights are held and multiplied."""

    format: str
    dtype: torch.dtype  # of computing
    in_codes: bool = False  # whether codes themselves are multiplied, in the forward pass

    @property
    def computed_in(self) -> str:
        return f"{'bf16' if self.dtype == torch.bfloat16 else 'fp32'}{', products of codes' * self.in_codes}"


@dataclass(frozen=True)
class Outcome:
    """One step."""

    loss: float
    gradients: dict[str, Tensor]  # of the LoRA matrices, by their names
    size: int  # bytes of the blocks' linear layers


def _unrotated(weight: Tensor) -> Quantised:
    with patch.object(formats, "ROTATED", ()):
        return quantise(weight, "int8")


def _rotated_nf4(weight: Tensor) -> Quantised:
    group = next((group for group in ROTATED if weight.shape[1] % group == 0), 0)
    if not group:
        return quantise(weight, "nf4")
    codes = quantise(rotate_columns(weight, rotation(group, weight.device)), "nf4")
    return Quantised(codes.codes, codes.scale, group)


def _as_trained(format: str) -> Callable[[str, Tensor], Quantised]:
    return lambda layer, weight: quantise(weight, format_of(layer, format))


def _everywhere(quantise_weight: Callable[[Tensor], Quantised]) -> Callable[[str, Tensor], Quantised]:
    return lambda _, weight: quantise_weight(weight)


# As the trainer stores them, and as it does not.
QUANTISE: dict[str, Callable[[str, Tensor], Quantised] | None] = {
    "bf16": None,
    "fp8": _as_trained("fp8"),
    "fp8_scaled": _as_trained("fp8_scaled"),
    "fp8_scaled, all layers": _everywhere(partial(quantise, format="fp8_scaled")),
    "int8, not rotated": _everywhere(_unrotated),
    "int8": _as_trained("int8"),
    "nf4": _as_trained("nf4"),
    "nf4, all layers": _everywhere(partial(quantise, format="nf4")),
    "nf4, all layers, rotated": _everywhere(_rotated_nf4),
}


@dataclass(frozen=True)
class Options:
    """Measure what 8 and 4 bits for the frozen weights cost in accuracy."""

    only: tuple[str, ...] = option((), "the rows to measure (default: all)", choices=tuple(QUANTISE))
    keep: tuple[str, ...] = option((), "patterns of layers that are not quantised, like *.ffn.2 or blocks.0.*")
    keep_end_blocks: bool = option(False, "do not quantise the first and the last block")
    outliers: bool = option(True, "make some columns of weights, and some channels that are read, large")


def main(argv: Sequence[str] | None = None) -> None:
    """Raises RunError where a limit is missed."""
    opts = parse_options(Options, argv)
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not searched after each step
    print(f"### {date.today().isoformat()}, commit {commit(ROOT)}\n")
    print(f"`{shlex.join(['python', '-m', 'benchmarks.quantised', *(sys.argv[1:] if argv is None else argv)])}`\n")
    print(_line(HEADER), _line(["---"] * len(HEADER)), sep="\n", flush=True)
    missed = []
    for name, cells, failed in measure(opts, SIZES):
        print(_line(cells), flush=True)
        missed += [name] if failed else []
    if missed:
        raise RunError(f"these miss their limits: {'; '.join(missed)}\nsee the table above")


def measure(opts: Options, sizes: Sizes) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """The rows of the table: a name, the cells below HEADER, and whether a limit was missed."""
    model = random_transformer(sizes.shape, CPU)
    if opts.outliers:
        add_outliers(model)
    quantised = linear_layers(model, opts.keep_end_blocks)
    base = Base(model, sizes, [name for name in quantised if not any(fnmatchcase(name, p) for p in opts.keep)])
    for targets in TARGETS:
        reference = base.take_step(Way("fp32", torch.float32), targets)
        for way in _ways(opts.only):
            outcome = base.take_step(way, targets)
            name = f"{way.format} in {way.computed_in}, LoRA on {targets}"
            yield name, *_row(way, targets, reference, outcome)


def _ways(only: Sequence[str]) -> Iterator[Way]:
    """All that is measured."""
    for format in only or tuple(QUANTISE):
        for dtype in (torch.float32, torch.bfloat16):
            if format != "bf16" or dtype == torch.bfloat16:
                yield Way(format, dtype)
        if format in PRODUCTS:
            yield Way(format, torch.bfloat16, in_codes=True)


class Base:
    """A model with outliers, in fp32, of which every way gets a copy; codes are made once."""

    def __init__(self, model: WanModel, sizes: Sizes, quantised: Sequence[str]) -> None:
        """`quantised` names the layers that are."""
        self.model, self.sizes, self.quantised = model, sizes, quantised
        self._codes = dict[tuple[str, str], Quantised]()  # by format and layer

    def take_step(self, way: Way, targets: str) -> Outcome:
        """Loss and gradients of one step, with weights held so."""
        model = self._held(way)
        size = sum(map(_size, linear_layers(model).values()))
        trainee = with_adapter(model, self.sizes, Memory(), (targets,))
        with multiplying(way):
            loss = trainee.loss(random_inputs(self.sizes, self.sizes.video, CPU))
            gradients = torch.autograd.grad(loss, trainee.parameters)
        names = [name.removesuffix(".default.weight") for name in adapter_parameters(model)]
        outcome = Outcome(loss.item(), dict(zip(names, gradients, strict=True)), size)
        del model, trainee, loss
        gc.collect()  # replaced forwards and their modules refer to each other
        return outcome

    def _held(self, way: Way) -> WanModel:
        model = deepcopy(self.model)
        if (quantise_weight := QUANTISE.get(way.format)) is not None:
            for name in self.quantised:
                if (way.format, name) not in self._codes:
                    weight = model.get_parameter(f"{name}.weight").detach()
                    self._codes[way.format, name] = quantise_weight(name, weight)
            hold_in_codes(model, {name: self._codes[way.format, name] for name in self.quantised})
        for module in model.modules():
            if isinstance(module, QuantisedLinear):
                module.in_codes = way.in_codes
        return to_bf16(model) if way.dtype == torch.bfloat16 else model


def _size(layer: nn.Linear) -> int:
    return layer.nbytes if isinstance(layer, QuantisedLinear) else layer.weight.nbytes


@torch.no_grad()
def add_outliers(model: WanModel) -> WanModel:
    """Makes a column of each linear layer of the blocks heavy, and another channel of what each of them reads."""
    for layer in linear_layers(model).values():
        layer.weight[:, layer.in_features // 3] *= HEAVY_WEIGHT
    _make_heavy(model.text_embedding[2])  # what cross_attn.k and v read
    for block in model.blocks:
        assert isinstance(block, Block)
        _, scale1, _, _, scale2, _ = block.modulation[0]
        for scale in (scale1, scale2):  # what self_attn.q, k and v read, and what ffn.0 reads
            scale[_heavy_channel(len(scale))] = HEAVY_INPUT - 1
        block.norm3.weight[_heavy_channel(model.shape.dim)] *= HEAVY_INPUT  # what cross_attn.q reads
        for source in (block.self_attn.v, block.cross_attn.v, block.ffn[0]):  # what self_attn.o, ... and ffn.2 read
            _make_heavy(source)
    return model


def _make_heavy(layer: nn.Module) -> None:
    """One channel of what a linear layer gives."""
    assert isinstance(layer, nn.Linear)
    channel = _heavy_channel(layer.out_features)
    layer.weight[channel] *= HEAVY_INPUT
    layer.bias[channel] *= HEAVY_INPUT


def _heavy_channel(width: int) -> int:
    return 2 * width // 3


@contextmanager
def multiplying(way: Way) -> Iterator[None]:
    """Inside, products are those of a GPU, and a format that the trainer does not have is known."""
    with ExitStack() as patches:
        if way.format == "nf4, all layers, rotated":
            patches.enter_context(patch("utils.storage.linear.values", _values_of_rotated))
        patches.enter_context(Products())
        yield


def _values_of_rotated(
    codes: Tensor, scale: Tensor | None, mixed_by: Tensor | None, rows: int, dtype: torch.dtype
) -> Tensor:
    rotated = values(codes, scale, None, rows, dtype)
    return rotated if mixed_by is None else rotate_columns(rotated, mixed_by)


class Products(TorchDispatchMode):
    """Products of bf16 and int8 numbers by the CPU's fp32 and fp64, for few CPUs multiply these themselves.

    As on a GPU: bf16 products are summed in fp32 and rounded once, those of int8 are exact.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        if func == aten._int_mm.default:
            return (args[0].double() @ args[1].double()).int()
        is_product = func in (aten.mm.default, aten.addmm.default, aten.addmm_.default, aten.bmm.default)
        if not is_product or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        wide = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        if func == aten.addmm_.default:
            return args[0].copy_(aten.addmm(*wide, **kwargs))
        return func(*wide, **kwargs).bfloat16()


def _row(way: Way, targets: str, reference: Outcome, outcome: Outcome) -> tuple[tuple[str, ...], bool]:
    """The cells below HEADER, and whether the limit was missed."""
    cosines = {name: cosine(gradient, reference.gradients[name]) for name, gradient in outcome.gradients.items()}
    worst = min(cosines, key=cosines.__getitem__)
    together = cosine(*(torch.cat([g.flatten() for g in side.gradients.values()]) for side in (outcome, reference)))
    limit = LIMITS.get(way.format)
    failed = limit is not None and not min(together, cosines[worst]) >= limit
    cells = (
        way.format,
        way.computed_in,
        readable_size(outcome.size),
        targets,
        f"{abs(outcome.loss / reference.loss - 1):.2e}",
        f"{together:.6f}",
        f"{cosines[worst]:.6f}",
        worst,
        "" if limit is None else f"{limit:g}{', missed' if failed else ''}",
    )
    return cells, failed


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(run_script(main))
