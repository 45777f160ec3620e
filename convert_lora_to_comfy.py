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
from torch import Tensor

from utils.adapters.average import average, last_checkpoints
from utils.adapters.lora_file import LoraFile
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import LAYOUTS, to_state_dict, write_state_dict
from utils.adapters.pairs import find_pair, trained_for, with_expert
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

    input_lora: Path | None = option(
        None, "LoRA file to convert, .safetensors in any known key format; a pair's common name means both of its files"
    )
    output_lora: Path | None = option(None, "file to write (default: <input>_<layout>.safetensors beside the input)")
    to: Layout = option(Layout("comfy"), "layout to write", choices=LAYOUTS)
    average: int = option(1, "convert the mean of the last N checkpoints of the input's run up to it", minimum=1)
    alpha: float | None = option(None, "alpha of a LoRA whose file states none")
    dtype: str | None = option(None, "dtype of the matrices (default: unchanged)", choices=tuple(DTYPES))
    overwrite: bool = option(False, "replace an output file of different content")


@dataclass(frozen=True)
class Conversion:
    """A file that is to be written, with all that it will hold."""

    source: Path
    output: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def main(argv: list[str] | None = None) -> None:
    opts = parse_options(ConvertOptions, argv)
    if opts.input_lora is None:
        raise UserError("no LoRA to convert: give its path with --input_lora FILE")

    # A model with two experts has two LoRAs, in files whose names differ in the expert alone. The name without it means
    # both of them, and each becomes a file of its own: ComfyUI loads one for each expert too.
    pair = find_pair(opts.input_lora)
    outputs = {file: opts.output_lora and with_expert(opts.output_lora, expert) for expert, file in pair.items()}
    conversions = [
        conversion
        for file, output in (outputs or {opts.input_lora: opts.output_lora}).items()
        if (conversion := convert(file, output, opts)) is not None
    ]

    # Running the same conversion again must be safe, and a LoRA that took days of training must not be lost to a typo.
    # So an equal file is left alone, and a different one, which may be the input, is kept unless the user insists. All
    # of this is known before the first file is written: a pair is converted as a whole or not at all.
    unfinished = []
    for each in conversions:
        if has_same_content(each.output, each.tensors, each.metadata):
            print(f"nothing to do: {each.output} already holds this LoRA")
        elif each.output.exists() and not opts.overwrite:
            what = "is the input itself" if each.output.samefile(each.source) else "exists and holds something else"
            raise UserError(f"{each.output} {what}. Give another --output_lora, or --overwrite to replace it.")
        else:
            unfinished.append(each)

    # A new file appears whole or not at all, so the input is safe even where it is replaced.
    for each in unfinished:
        write_state_dict(each.output, each.tensors, each.metadata)
        dtype = opts.dtype or "unchanged"
        print(f"wrote {each.output} ({size_of(each.output)}, layout {opts.to}, dtype {dtype})")


def convert(file: Path, output: Path | None, opts: ConvertOptions) -> Conversion | None:
    """The content of `file` in the chosen layout, for `output` or a name made from the file's own.

    Prints what the file holds. None if no output is given and the file has this layout already.
    """
    # Whatever its key format, the file is first read into one form, under the official names of Wan's modules. All
    # that can be wrong with it (an unknown key, half a pair, NaN, another kind of adapter) is found here, before
    # anything is written: a key that is silently skipped would be a module that the LoRA no longer changes.
    # The mean of several checkpoints is smoother than the last one where a run ends at a high learning rate.
    named = file
    if opts.average > 1:
        taken = last_checkpoints(file, opts.average)
        print("\n".join(f"averaging {path}" for path in taken))
        lora = average([read_lora(path) for path in taken])
        named = file.with_stem(f"{file.stem}_average{len(taken)}")
    else:
        lora = read_lora(file)
    lora = fill_in_alpha(lora, opts.alpha, file)
    print(describe(lora, file))

    # Everything that the new file will hold is made before any file is compared or touched. Here a layout refuses what
    # it cannot hold, and a cast refuses numbers that overflow the new dtype.
    tensors, metadata = to_state_dict(lora, opts.to, DTYPES[opts.dtype] if opts.dtype else None)

    # A file that has the chosen layout already needs no copy under a second name, unless that name was given.
    if output is None and has_same_content(named, tensors, metadata):
        print(f"nothing to do: the file already has the layout {opts.to}")
        return None
    return Conversion(file, output or named.with_name(f"{named.stem}_{opts.to}.safetensors"), tensors, metadata)


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
        "expert": trained_for(source, lora.metadata) or "",
        "modules": f"{len(pairs)}" + (f", and {len(lora.diffs)} diffs" if lora.diffs else ""),
        "rank": listed(pair.rank for pair in pairs),
        "alpha": listed("none, so the scale is 1" if pair.alpha is None else pair.alpha for pair in pairs),
        "dtype": listed(str(tensor.dtype).removeprefix("torch.") for tensor in stored),
        "control": f"yes, {widened}" if widened else "no",
    }
    return "\n".join(f"{name:9} {value}" for name, value in lines.items() if value)


def listed(values: Iterable[float | str]) -> str:
    """The different values, once each: "16", "8, 16"; "-" for none."""
    return ", ".join(sorted({value if isinstance(value, str) else f"{value:g}" for value in values})) or "-"


def size_of(path: Path) -> str:
    return readable_size(path.stat().st_size)


if __name__ == "__main__":
    sys.exit(run_script(main))
