"""Weights from fp8 files: whether the GPU reads them as the CPU does, and what rounding to fp8 costs in accuracy.

Storing weights in fp8 on the device does not exist yet: they are read into the dtype of computing.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.checks.numbers import compare, measure
from benchmarks.measure import FAILED, Clock, Row, Sizes, skipped
from benchmarks.models import Trainee, fused, our_trainee, random_inputs
from benchmarks.weights import SEED
from wan.checkpoints import Quantised
from wan.modules.model import WanModel, is_fp32

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCKS = 4  # along the columns of a matrix
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
    """Every kind of scale, both formats of fp8, and the dtypes of computing: bit for bit as on the CPU."""
    side = sizes.shape.dim
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(SEED)) * side**-0.5
    for name, scale_of in SCALES.items():
        for stored_dtype in (E4M3, E5M2):
            scale = scale_of(weight)
            stored = _quantise(weight, scale, stored_dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                here = Quantised(stored, scale).values(dtype)
                there = Quantised(stored, scale).to(device).values(dtype).cpu()
                differ = int((here != there).sum())
                label = f"{str(stored_dtype)[6:]} to {str(dtype)[6:]}, {name}: numbers unlike the CPU's"
                yield Row(label, differ, "", f"of {weight.numel():,}", FAILED if differ else "equal")
    yield skipped("weights stored in fp8 on the device", "this does not exist yet")


def rounded(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """Loss and gradients with the weights of all blocks rounded to e4m3, against those with bf16 weights."""
    inputs = random_inputs(sizes, sizes.video, device)
    build = partial(our_trainee, sizes.shape, sizes, device, memory=fused("full"))
    reference = measure(build, inputs)
    for name in ("plain", "one scale", "a scale for each row"):
        measured = measure(lambda scale_of=SCALES[name]: _rounded(build(), scale_of), inputs)  # type: ignore[misc]
        yield from compare(f"e4m3, {name}", reference, measured, limited=False, against="bf16 weights")


@torch.no_grad()
def _rounded(trainee: Trainee[WanModel], scale_of: Scale) -> Trainee[WanModel]:
    """The trainee with the frozen matrices of its blocks as they come back from a file in fp8."""
    for name, parameter in trainee.model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2 and not parameter.requires_grad and not is_fp32(name):
            scale = scale_of(parameter.float())
            parameter.copy_(Quantised(_quantise(parameter.float(), scale, E4M3), scale).values(parameter.dtype))
    return trainee


def _quantise(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight (rows, columns) fp32 -> fp8, in the layout that `Quantised` reads."""
    if scale is None:
        return weight.to(dtype)
    blocks = weight.view(*scale.shape[:2], -1) if scale.ndim == 3 else weight
    return (blocks / scale).view(weight.shape).to(dtype)
