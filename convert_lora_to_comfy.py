"""Convert a Wan LoRA file to the layout that ComfyUI loads, or to another one.

    python convert_lora_to_comfy.py --input_lora wan-lora-00000100.safetensors

A LoRA is the same two matrices per module wherever it was trained, but every program names the keys in its own way. A
program that does not recognise them generates as if there were no LoRA. This script reads all known formats.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from utils.adapters.average import average, last_checkpoints
from utils.adapters.lora_file import LoraFile
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import LAYOUTS, to_state_dict, write_state_dict
from utils.common.errors import UserError
from utils.common.formatting import readable_size
from utils.common.options import option, parse_options, run_script
from utils.common.tensor_files import has_same_content

# The short names are ours. The long ones are those of WanTraining's converter, which people still type.
DTYPES = {
    **{"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16},
    **{"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16},
}


class Layout(str):
    """The name of a layout. WanTraining's was called "predecessor" in version 0.1, and that word is still accepted."""

    def __new__(cls, name: str) -> "Layout":
        return super().__new__(cls, "wantraining" if name == "predecessor" else name)


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a Wan LoRA file to the layout that ComfyUI loads, or to another one."""

    input_lora: Path | None = option(None, "LoRA file to convert, .safetensors in any known key format")
    output_lora: Path | None = option(None, "file to write (default: <input>_<layout>.safetensors beside the input)")
    to: Layout = option(Layout("comfy"), "layout to write", choices=LAYOUTS)
    average: int = option(1, "convert the mean of the last N checkpoints of the input's run up to it", minimum=1)
    alpha: float | None = option(None, "alpha of a LoRA whose file states none")
    dtype: str | None = option(None, "dtype of the matrices (default: unchanged)", choices=tuple(DTYPES))
    overwrite: bool = option(False, "replace an output file of different content")


def main(argv: list[str] | None = None) -> None:
    opts = parse_options(ConvertOptions, argv)
    if opts.input_lora is None:
        raise UserError("no LoRA to convert: give its path with --input_lora FILE")
    source = opts.input_lora

    # Whatever its key format, the file is first read into one form, under the official names of Wan's modules. All
    # that can be wrong with it (an unknown key, half a pair, NaN, another kind of adapter) is found here, before
    # anything is written: a key that is silently skipped would be a module that the LoRA no longer changes.
    # The mean of several checkpoints is smoother than the last one where a run ends at a high learning rate.
    if opts.average > 1:
        taken = last_checkpoints(source, opts.average)
        print("\n".join(f"averaging {path}" for path in taken))
        lora = average([read_lora(path) for path in taken])
        source = source.with_stem(f"{source.stem}_average{len(taken)}")
    else:
        lora = read_lora(source)
    lora = fill_in_alpha(lora, opts.alpha, opts.input_lora)
    print(describe(lora, opts.input_lora))

    # Everything that the new file will hold is made before any file is compared or touched. Here a layout refuses what
    # it cannot hold, and a cast refuses numbers that overflow the new dtype.
    tensors, metadata = to_state_dict(lora, opts.to, DTYPES[opts.dtype] if opts.dtype else None)

    # A file that has the chosen layout already needs no copy under a second name, unless that name was given.
    output = opts.output_lora or source.with_name(f"{source.stem}_{opts.to}.safetensors")
    if opts.output_lora is None and has_same_content(source, tensors, metadata):
        print(f"nothing to do: the file already has the layout {opts.to}")
        return

    # Running the same conversion again must be safe, and a LoRA that took days of training must not be lost to a typo.
    # So an equal file is left alone, and a different one, which may be the input, is kept unless the user insists.
    if has_same_content(output, tensors, metadata):
        print(f"nothing to do: {output} already holds this LoRA")
        return
    if output.exists() and not opts.overwrite:
        what = "is the input itself" if output.samefile(opts.input_lora) else "exists and holds something else"
        raise UserError(f"{output} {what}. Give another --output_lora, or --overwrite to replace it.")

    # The new file appears whole or not at all, so the input is safe even where it is replaced.
    write_state_dict(output, tensors, metadata)
    print(f"wrote {output} ({size_of(output)}, layout {opts.to}, dtype {opts.dtype or 'unchanged'})")


def fill_in_alpha(lora: LoraFile, alpha: float | None, source: Path) -> LoraFile:
    """The LoRA with `alpha` where the file states none.

    Raises UserError if the file states another one: whichever is wrong, the strength would be too.
    """
    # The strength of a LoRA is alpha / rank. WanTraining writes no alpha at all, so for its files only the user knows
    # it. ComfyUI takes a missing one as equal to the rank, which is right for WanTraining's default and for no other.
    if alpha is None:
        return lora
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha must be a positive number, not {alpha}")
    for name, pair in lora.pairs.items():
        if pair.alpha is not None and not math.isclose(pair.alpha, alpha, rel_tol=1e-6):
            raise UserError(
                f"{source}: {name} has the alpha {pair.alpha:g}, but --alpha is {alpha:g}.\n"
                "Leave --alpha out to keep that of the file."
            )
    return replace(lora, pairs={name: replace(pair, alpha=alpha) for name, pair in lora.pairs.items()})


def describe(lora: LoraFile, source: Path) -> str:
    """A few lines for people: what the file is, how its keys were named, and how strong the LoRA will be."""
    pairs = lora.pairs.values()
    stored = [pair.down for pair in pairs] + list(lora.diffs.values())
    widened = ", ".join(f"{name} becomes {shape}" for name, shape in lora.input_shapes.items())
    lines = {
        "file": f"{source} ({size_of(source)})",
        "format": lora.key_format,
        "modules": f"{len(pairs)}" + (f", and {len(lora.diffs)} diffs" if lora.diffs else ""),
        "rank": listed(pair.rank for pair in pairs),
        "alpha": listed("none, so the scale is 1" if pair.alpha is None else pair.alpha for pair in pairs),
        "dtype": listed(str(tensor.dtype).removeprefix("torch.") for tensor in stored),
        "control": f"yes, {widened}" if widened else "no",
    }
    return "\n".join(f"{name:9} {value}" for name, value in lines.items())


def listed(values: Iterable[float | str]) -> str:
    """The different values, once each: "16", "8, 16"; "-" for none."""
    return ", ".join(sorted({value if isinstance(value, str) else f"{value:g}" for value in values})) or "-"


def size_of(path: Path) -> str:
    return readable_size(path.stat().st_size)


if __name__ == "__main__":
    sys.exit(run_script(main))
