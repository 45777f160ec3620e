"""Convert a Wan LoRA file to the layout that ComfyUI loads, or to another one.

    python convert_lora_to_comfy.py --input_lora wan-lora-00000100.safetensors

A LoRA is the same two matrices per module wherever it was trained, but every program spells their names in its own way,
and a program that does not know a spelling generates as if there were no LoRA. This script reads all of them.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from utils.adapters.average import average, last_checkpoints
from utils.adapters.lora_file import LAYOUTS, LoraFile, has_same_content, read_lora, write_lora
from utils.common.errors import UserError
from utils.common.options import option, parse_options, run_script

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a Wan LoRA file to the layout that ComfyUI loads, or to another one."""

    input_lora: Path | None = option(None, "the LoRA to convert, a .safetensors file in any known spelling")
    output_lora: Path | None = option(None, "where to write (default: <input>_<layout>.safetensors beside the input)")
    to: str = option("comfy", "layout to write", choices=LAYOUTS)
    average: int = option(1, "convert the mean of the last N checkpoints of the input's run up to it", minimum=1)
    alpha: float | None = option(None, "alpha of a LoRA whose file carries none")
    dtype: str | None = option(None, "dtype of the matrices (default: as stored)", choices=tuple(DTYPES))
    overwrite: bool = option(False, "replace an output file of different content")


def main(argv: list[str] | None = None) -> None:
    opts = parse_options(ConvertOptions, argv)
    if opts.input_lora is None:
        raise UserError("no LoRA to convert: give its path with --input_lora FILE")
    source, dtype = opts.input_lora, DTYPES.get(opts.dtype)

    # Whatever the spelling, the file is first read into one form, under the official names of Wan's modules. All that
    # can be wrong with it (an unknown key, half a pair, another kind of adapter) is found here, before any writing:
    # a key passed over in silence would be a module that the LoRA no longer changes.
    # The mean of several checkpoints is smoother than the last, where a run ends on a learning rate that is not small.
    if opts.average > 1:
        taken = last_checkpoints(source, opts.average)
        print("\n".join(f"averaging {path}" for path in taken))
        lora = average([read_lora(path) for path in taken])
        source = source.with_stem(f"{source.stem}_average{len(taken)}")
    else:
        lora = read_lora(source)
    lora = fill_in_alpha(lora, opts.alpha, opts.input_lora)
    print(describe(lora, opts.input_lora))

    # A file that already is what was asked for needs no copy under a second name, unless that name was given.
    output = opts.output_lora or source.with_name(f"{source.stem}_{opts.to}.safetensors")
    if opts.output_lora is None and source.exists() and has_same_content(source, lora, opts.to, dtype):
        print(f"nothing to do: the file already has the layout {opts.to}")
        return

    # Running the same conversion again must be safe, and a LoRA that took days of training must not be lost to a typo.
    # So an equal file is left alone, and a different one, which the input may be, is kept unless the user insists.
    if has_same_content(output, lora, opts.to, dtype):
        print(f"nothing to do: {output} already holds this LoRA")
        return
    if output.exists() and not opts.overwrite:
        what = "is the input itself" if output.samefile(opts.input_lora) else "exists and holds something else"
        raise UserError(f"{output} {what}. Give another --output_lora, or --overwrite to replace it.")

    # The new file appears whole or not at all, so even replacing the input cannot lose it.
    write_lora(output, lora, opts.to, dtype)
    print(f"wrote {output} ({megabytes(output)}, layout {opts.to}, dtype {opts.dtype or 'as stored'})")


def fill_in_alpha(lora: LoraFile, alpha: float | None, source: Path) -> LoraFile:
    """The LoRA with `alpha` where the file says none.

    Raises UserError when the file says another one: whichever is wrong, the strength would be too.
    """
    # The strength of a LoRA is alpha / rank. The predecessor wrote no alpha at all, so for its files only the user
    # knows it; ComfyUI takes a missing one as equal to the rank, which is right for its default and for no other.
    if alpha is None:
        return lora
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha must be a positive number, not {alpha}")
    for name, pair in lora.pairs.items():
        if pair.alpha is not None and not math.isclose(pair.alpha, alpha, rel_tol=1e-6):
            raise UserError(
                f"{source}: {name} has the alpha {pair.alpha:g}, but --alpha says {alpha:g}.\n"
                "Leave --alpha out to keep what the file says."
            )
    return replace(lora, pairs={name: replace(pair, alpha=alpha) for name, pair in lora.pairs.items()})


def describe(lora: LoraFile, source: Path) -> str:
    """A few lines for a human: what the file is, how it was spelled, and how strong it will be."""
    pairs = lora.pairs.values()
    stored = [pair.down for pair in pairs] + list(lora.extras.values())
    widened = ", ".join(f"{name} becomes {shape}" for name, shape in lora.input_shapes.items())
    lines = {
        "file": f"{source} ({megabytes(source)})",
        "spelling": lora.spelling,
        "modules": f"{len(pairs)}" + (f", and {len(lora.extras)} deltas" if lora.extras else ""),
        "rank": listed(pair.rank for pair in pairs),
        "alpha": listed("none, so the scale is 1" if pair.alpha is None else pair.alpha for pair in pairs),
        "dtype": listed(str(tensor.dtype).removeprefix("torch.") for tensor in stored),
        "control": f"yes, {widened}" if widened else "no",
    }
    return "\n".join(f"{name:9} {value}" for name, value in lines.items())


def listed(values: Iterable[float | str]) -> str:
    """The different values, once each: "16", "8, 16"; "-" for none."""
    return ", ".join(sorted({value if isinstance(value, str) else f"{value:g}" for value in values})) or "-"


def megabytes(path: Path) -> str:
    """The size of a file as text, in units of 10^6 bytes."""
    return f"{path.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(run_script(main))
