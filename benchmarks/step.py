"""One training step of one family, against diffusers and PEFT: counted, and timed.

    python -m benchmarks.step                                 on a GPU: Wan2.1-T2V-1.3B at 9,360 tokens
    python -m benchmarks.step --family wan2.1-t2v-14B --layers 8 --tokens 32760 --checkpointing full
    python -m benchmarks.step --strategies --no-lines         the ledger of every strategy; --compile: compiled, too
    python -m benchmarks.step --seconds --tokens 1024 --no-peer_checkpointing      on the CPU: one block, one thread

Random weights of the real shape, so nothing is downloaded. The ledger of a block comes first: what it keeps and moves,
which is the same on every machine. Steps are timed on a GPU, or on the CPU where --seconds asks for it, after loss and
LoRA gradients agree with the peer's. Prints tables for benchmarks/RECORDS.md; the exit code is 1 where a limit is
missed.
"""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from benchmarks.checks.environment import attention_rate, copy_rate
from benchmarks.contest import Contestant, admit, agreement, ratio_rows, speed_rows, take_turns
from benchmarks.gpu_check import cells, format_record
from benchmarks.launches import launches
from benchmarks.ledger import (
    BACKWARD,
    ELEMENTWISE,
    FORWARD,
    RECOMPUTE,
    Ledger,
    format_lines,
    format_totals,
    per_block,
    total,
)
from benchmarks.measure import Clock, Row, Sizes, count_tokens, gemm_rate
from benchmarks.models import (
    Trainee,
    attention_flops,
    compiled,
    diffusers_trainee,
    fused,
    our_trainee,
    random_inputs,
    step_flops,
)
from utils.common.errors import UserError
from utils.common.options import option, parse_options, run_script
from utils.training.checkpointing import STRATEGIES
from utils.training.memory import Memory
from wan.configs import FAMILIES
from wan.modules.model import WanShape

OURS, PEER = "ours", "diffusers + PEFT"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CPU_GEMM_SIDE = 1024
NO_LIMIT = Clock(float("inf"))
Build = Callable[[Sizes], Trainee[nn.Module]]


@dataclass(frozen=True)
class Options:
    """Count what a training step keeps and moves, and time it against diffusers and PEFT."""

    family: str = option("wan2.1-t2v-1.3B", "the released model that has the shape", choices=tuple(FAMILIES))
    layers: int | None = option(None, "blocks that are timed (default: all on a GPU, 1 on the CPU)", minimum=1)
    tokens: int | None = option(None, "video tokens (default: 9360)", minimum=1)
    grid: tuple[int, ...] = option((), "frames, height and width of the latents, instead of --tokens", minimum=1)
    checkpointing: str = option("none", "what our blocks recompute", choices=STRATEGIES)
    compile: bool = option(False, "compile our blocks")
    plain: bool = option(False, "run the model's own operations, as on the CPU, not the fused ones of a GPU")
    fp32_stream: bool = option(False, "do not round our residual stream")
    dtype: str = option("bf16", "of the frozen weights", choices=tuple(DTYPES))
    rank: int = option(16, "of the LoRA on attention", minimum=1)
    steps: int = option(20, "steps that are timed, of each", minimum=2)
    warmups: int = option(3, "steps before them", minimum=1)
    peer_checkpointing: bool = option(True, "gradient checkpointing in diffusers")
    seconds: bool = option(False, "time steps on the CPU too: processor time, one thread")
    lines: bool = option(True, "the ledger by source line")
    strategies: bool = option(False, "the ledger of every strategy; with --compile that of compiled blocks, too")

    @property
    def memory(self) -> Memory:
        stream = torch.float32 if self.fp32_stream else DTYPES[self.dtype]
        return Memory(self.checkpointing, self.compile, not self.compile and not self.plain, stream)


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with 1 if a row failed."""
    opts = parse_options(Options, argv)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    if not on_gpu:
        torch.set_num_threads(1)
    sizes = sizes_of(opts, on_gpu)
    ledgers = count(opts, sizes, device)
    print("A block: bytes per token and unit of width, and ops\n")
    print(format_totals(ledgers), end="\n\n")
    if opts.strategies:
        print(format_totals(count_strategies(opts, sizes, device)), end="\n\n")
    if opts.lines:
        print(format_lines(ledgers[OURS]), end="\n\n")
    if not on_gpu and not opts.seconds:
        print("no CUDA GPU here: nothing was timed (--seconds times steps on the CPU)")
        return
    rows = []
    for row in timed(opts, sizes, device, ledgers[OURS]):
        print(" | ".join(cells("step", row)), file=sys.stderr)
        rows.append(("step", row))
    where = torch.cuda.get_device_name(device) if on_gpu else "CPU, one thread"
    print(format_record(rows, where, shlex.join(["python", "-m", "benchmarks.step", *(argv or sys.argv[1:])])))
    if any(row.failed for _, row in rows):
        sys.exit(1)


def sizes_of(opts: Options, on_gpu: bool) -> Sizes:
    """What the options ask for. Raises UserError for a family that cannot be measured, and for a grid that is none."""
    shape = FAMILIES[opts.family].shape
    if opts.grid and opts.tokens:
        raise UserError("--grid and --tokens say the same: give one of them")
    if opts.grid and (len(opts.grid) != 3 or opts.grid[1] % 2 or opts.grid[2] % 2):
        raise UserError("--grid needs three numbers: frames, and an even height and width, of the latents")
    frames, height, width = opts.grid or (grid_of(opts.tokens) if opts.tokens else Sizes().video)
    layers = opts.layers or (shape.num_layers if on_gpu else 1)
    return Sizes(
        shape=replace(shape, num_layers=layers),
        rank=opts.rank,
        video=(frames, height, width),
        gemm_side=Sizes().gemm_side if on_gpu else CPU_GEMM_SIDE,
        warmups=opts.warmups,
        steps=opts.steps,
    )


def grid_of(tokens: int) -> tuple[int, int, int]:
    """Latents F, H, W of exactly so many tokens: one frame, as near to a square as possible."""
    height = next(side for side in range(int(tokens**0.5), 0, -1) if tokens % side == 0)
    return 1, 2 * height, 2 * tokens // height


def builders(opts: Options, device: torch.device) -> dict[str, Build]:
    """How ours and the peer are made, for sizes."""
    dtype = DTYPES[opts.dtype]
    return {
        OURS: lambda sizes: our_trainee(sizes.shape, sizes, device, dtype, opts.memory),
        PEER: lambda sizes: diffusers_trainee(sizes.shape, sizes, device, dtype, opts.peer_checkpointing),
    }


def count(opts: Options, sizes: Sizes, device: torch.device) -> dict[str, Ledger]:
    """The ledgers of a block of ours and of the peer, where it is installed."""
    ledgers = {}
    for name, build in builders(opts, device).items():
        try:
            is_compiled = opts.compile and name == OURS
            ledgers[name] = per_block(partial(_of_shape, build, sizes), sizes.shape, device, is_compiled)
        except ModuleNotFoundError as error:
            print(f"{name}: {error.name} is not installed", file=sys.stderr)
    return ledgers


def count_strategies(opts: Options, sizes: Sizes, device: torch.device) -> dict[str, Ledger]:
    """The ledgers of a block of ours: the model's own operations, fused, and where that is asked for compiled."""
    memories = {"plain": Memory(), **{f"fused, {strategy}": fused(strategy) for strategy in STRATEGIES}}
    if opts.compile:
        memories |= {f"compiled, {strategy}": compiled(strategy) for strategy in STRATEGIES}
    return {name: _ledger(memory, sizes, device) for name, memory in memories.items()}


def _ledger(memory: Memory, sizes: Sizes, device: torch.device) -> Ledger:
    def build(shape: WanShape) -> Trainee[nn.Module]:
        return our_trainee(shape, sizes, device, memory=memory)

    return per_block(build, sizes.shape, device, memory.compile)


def _of_shape(build: Build, sizes: Sizes, shape: WanShape) -> Trainee[nn.Module]:
    return build(replace(sizes, shape=shape))


def timed(opts: Options, sizes: Sizes, device: torch.device, ledger: Ledger) -> Iterator[Row]:
    """Agreement with the peer, then seconds, use of the device and memory; ends early where they disagree."""
    inputs = random_inputs(sizes, sizes.video, device)
    contestants: list[Contestant] = []
    makers = {name: partial(build, sizes) for name, build in builders(opts, device).items()}
    # By default, convolutions would compute in TF32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for admitted in admit(makers, inputs, sizes, device):
            if isinstance(admitted, Row):
                yield admitted
            else:
                contestants.append(admitted)
        if len(contestants) == 2:
            ours, peer = contestants
            rows = list(agreement(ours, peer, DTYPES[opts.dtype]))
            yield from rows
            if any(row.failed for row in rows):
                return
        yield from take_turns(contestants, inputs, sizes.steps, device, NO_LIMIT)
        tokens = count_tokens(sizes.video)
        flops, ceiling = step_flops(sizes.shape, tokens, sizes.rank), gemm_rate(sizes.gemm_side, device)
        for contestant in contestants:
            yield from speed_rows(contestant, flops, tokens, ceiling)
            yield Row(f"{contestant.name}: first pass", contestant.first, "s", "compiles" if opts.compile else "")
        yield from ratio_rows(contestants, PEER)
        for contestant in contestants:
            yield from launches(contestant, partial(contestant.step, inputs), device)
        if contestants and contestants[0].name == OURS:
            yield from _reach(sizes, contestants[0].median, ledger, device)


def _reach(sizes: Sizes, median: float, ledger: Ledger, device: torch.device) -> Iterator[Row]:
    """The step against what the device does at most: its products, its attention and its memory, one after another.

    Products and attention without what is recomputed, bytes with it.
    """
    tokens, shape = count_tokens(sizes.video), sizes.shape
    attended = attention_flops(shape, tokens)
    product, copy = gemm_rate(sizes.gemm_side, device), copy_rate(sizes, device)
    attention, kernel = attention_rate(shape, tokens, device)
    per_token = sum(total(ledger, ELEMENTWISE, phase) for phase in (FORWARD, RECOMPUTE, BACKWARD))
    moved = per_token * tokens * shape.dim * shape.num_layers
    parts = {
        "matrix products": ((step_flops(shape, tokens, sizes.rank) - attended) / product, product / 1e12, "TFLOP/s"),
        f"attention ({kernel})": (attended / attention, attention / 1e12, "TFLOP/s"),
        "elementwise bytes of the ledger": (moved / copy, copy / 1e9, "GB/s"),
    }
    for name, (least, rate, unit) in parts.items():
        yield Row(f"{OURS}: {name}", least, "s", f"at {rate:.4g} {unit}")
    floor = sum(least for least, _, _ in parts.values())
    yield Row(f"{OURS}: share of the step that these take", 100 * floor / median, "%", "the three at their full speed")


if __name__ == "__main__":
    sys.exit(run_script(main))
