"""Weights in 8 and 4 bits: whether the GPU reads them as the CPU does, and what they cost in accuracy and in time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.checks.numbers import compare, measure
from benchmarks.checks.step import timed
from benchmarks.measure import FAILED, Clock, Row, Sizes, skipped
from benchmarks.models import Trainee, fused, random_inputs, with_adapter
from benchmarks.weights import SEED, stored_transformer
from utils.storage.formats import quantise
from utils.storage.linear import QuantisedLinear
from utils.storage.weights import QUANTISED
from wan.checkpoints import Quantised

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCKS = 4  # along the columns of a matrix
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EXACT_CODES = ("fp8", "fp8_scaled")  # no sums are made for them, whose order may differ
EXACT_VALUES = (*EXACT_CODES, "int8")
IN_CODES = ("fp8", "fp8_scaled", "int8")  # formats whose codes can be multiplied themselves
REFERENCE = "bf16"
Scale = Callable[[Tensor], Tensor | None]


def _per_block(weight: Tensor) -> Tensor:
    return weight.abs().view(len(weight), BLOCKS, -1).amax(2, keepdim=True) / torch.finfo(E4M3).max


SCALES: dict[str, Scale] = {
    "plain": lambda weight: None,
    "one scale": lambda weight: weight.abs().amax() / torch.finfo(E4M3).max,
    "a scale for each row": lambda weight: weight.abs().amax(1, keepdim=True) / torch.finfo(E4M3).max,
    "a scale for each block": _per_block,
}


def dequantised(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """Weights of files, every kind of scale, both formats of fp8, and the dtypes of computing: bit for bit as here."""
    weight = _weight(sizes)
    for name, scale_of in SCALES.items():
        for stored_dtype in (E4M3, E5M2):
            scale = scale_of(weight)
            stored = Quantised(_to_fp8(weight, scale, stored_dtype), scale)
            for dtype in DTYPES:
                label = f"{str(stored_dtype)[6:]} to {str(dtype)[6:]}, {name}: numbers unlike the CPU's"
                yield _unlike(label, stored.values(dtype), stored.to(device).values(dtype), exact=True)


def stored(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """The codes of every format as the device makes them, and their values there, against those of the CPU."""
    weight = _weight(sizes)
    layer = nn.Linear(len(weight), len(weight), bias=False, device="meta")
    for format in QUANTISED:
        if not _is_usable(format):
            yield skipped(format, "bitsandbytes is not installed")
            continue
        here, there = quantise(weight, format), quantise(weight.to(device), format)
        label = f"{format}: codes unlike the CPU's"
        yield _unlike(label, here.codes.view(torch.uint8), there.codes.view(torch.uint8), format in EXACT_CODES)
        for dtype in DTYPES:
            values, theirs = (QuantisedLinear(layer, codes).values(dtype) for codes in (here, here.to(device)))
            label = f"{format} to {str(dtype)[6:]}: numbers unlike the CPU's, of the same codes"
            yield _unlike(label, values, theirs, format in EXACT_VALUES)


def accuracy(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """Loss and gradients with the weights of all blocks in each format, against those with bf16 weights."""
    inputs = random_inputs(sizes, sizes.video, device)
    builders = dict(_builders(sizes, device))
    reference = measure(builders.pop(REFERENCE), inputs)
    for name, build in builders.items():
        try:
            yield from compare(name, reference, measure(build, inputs), limited=False, against="bf16 weights")
        except torch.OutOfMemoryError:
            yield skipped(name, "out of memory")


def step(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """Seconds and memory of a step with the weights in each format, against bf16 weights."""
    few = replace(sizes, steps=max(2, sizes.steps // 2), warmups=min(2, sizes.warmups))
    yield from timed(few, dict(_builders(sizes, device)), REFERENCE, device, clock)


def _builders(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Callable[[], Trainee[nn.Module]]]]:
    """Fused blocks that keep their input: with bf16 weights, and with values and products of codes of every format."""
    yield REFERENCE, partial(_build, sizes, device, None)
    for format in filter(_is_usable, QUANTISED):
        yield format, partial(_build, sizes, device, format)
        if format in IN_CODES:
            yield f"{format}, products of codes", partial(_build, sizes, device, format, in_codes=True)


def _build(sizes: Sizes, device: torch.device, format: str | None, in_codes: bool = False) -> Trainee[nn.Module]:
    return with_adapter(stored_transformer(sizes.shape, device, format, in_codes), sizes, fused("full"))


def _is_usable(format: str) -> bool:
    return format != "nf4" or find_spec("bitsandbytes") is not None


def _weight(sizes: Sizes) -> Tensor:
    """A square matrix (D, D) fp32."""
    side = sizes.shape.dim
    return torch.randn(side, side, generator=torch.Generator().manual_seed(SEED)) * side**-0.5


def _unlike(label: str, here: Tensor, there: Tensor, exact: bool) -> Row:
    """How many numbers on the device are not those of the CPU, and how far; it fails where they must be the same."""
    there = there.cpu()
    differ = int((here != there).sum())
    far = (here.float() - there.float()).norm() / here.float().norm() if here.dtype != torch.uint8 else None
    comparison = f"of {here.numel():,}" + ("" if far is None or not differ else f"; {far.item():.2g} of their norm")
    return Row(label, differ, "", comparison, (FAILED if exact else "") if differ else "equal")


def _to_fp8(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight (rows, columns) fp32 -> fp8, in the layout that `Quantised` reads."""
    if scale is None:
        return weight.to(dtype)
    blocks = weight.view(*scale.shape[:2], -1) if scale.ndim == 3 else weight
    return (blocks / scale).view(weight.shape).to(dtype)
