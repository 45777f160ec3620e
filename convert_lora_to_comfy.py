"""Convert a Wan LoRA file to the layout that ComfyUI loads, or to another one.

    python convert_lora_to_comfy.py --input_lora wan-lora-00000100.safetensors

A LoRA is the same two matrices per module wherever it was trained, but every program names the keys in its own way. A
program that does not recognise them generates as if there were no LoRA. This script reads all known formats.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.average import average, last_checkpoints
from utils.adapters.fitting import kinds
from utils.adapters.folding import Read, fold, needs_base
from utils.adapters.lora_file import LoraFile
from utils.adapters.lora_header import WEIGHTS
from utils.adapters.lora_reader import read_experts, read_lora
from utils.adapters.lora_targets import TARGETS, adapt, share, unsupported
from utils.adapters.lora_writer import LAYOUTS, PEFT_LAYOUT, check_path, to_state_dict, write_state_dict
from utils.adapters.pairs import find_pair, trained_for, with_expert
from utils.adapters.peft_folder import check_folder, config_text, find_weights, has_config, to_config, write_folder
from utils.adapters.provenance import readable_records
from utils.common.errors import UserError
from utils.common.formatting import counted, readable_size
from utils.common.options import option, parse_options, run_script
from utils.common.tensor_files import has_same_content
from utils.setup.sharing import EVERYTHING, STANDARD, shareable
from wan.checkpoints import CheckpointError, Weights, cast_to, read_some, read_weights

# The short names are ours. The long ones are those of WanTraining's converter, which people still type.
DTYPES = {
    **{"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16},
    **{"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16},
}
MUCH_LOST = 0.1  # relative residual from which folding deserves another try


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
    fold: int | None = option(None, "write LoHa, LoKr and DoRA as plain LoRA of this rank", minimum=1)
    base: Path | None = option(None, "transformer of the base model, on which DoRA depends", requires="fold")
    drop_unsupported: bool = option(False, "leave out what the program that reads the layout cannot apply")
    metadata: str = option(
        STANDARD,
        "what of the run is kept; full: also all its options, with their paths and prompts",
        choices=(STANDARD, EVERYTHING),
    )
    overwrite: bool = option(False, "replace an output file of different content")


@dataclass(frozen=True)
class Conversion:
    """A file, or a PEFT folder, that is to be written, with all that it will hold."""

    source: Path
    output: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: str | None = None  # of a PEFT folder

    @property
    def weights(self) -> Path:
        """The file of the tensors."""
        return self.output if self.config is None else self.output / WEIGHTS

    def is_done(self) -> bool:
        """Whether the output holds this already."""
        same = has_same_content(self.weights, self.tensors, self.metadata)
        return same and (self.config is None or has_config(self.output, self.config))

    def write(self) -> None:
        """Raises LoraError for a path that cannot be written."""
        if self.config is None:
            write_state_dict(self.output, self.tensors, self.metadata)
        else:
            write_folder(self.output, self.tensors, self.metadata, self.config)


def main(argv: list[str] | None = None) -> None:
    opts = parse_options(ConvertOptions, argv)
    if opts.input_lora is None:
        raise UserError("no LoRA to convert: give its path with --input_lora FILE")

    if opts.output_lora is not None:
        check_output(opts.output_lora, opts.to)

    # A model with two experts has two LoRAs, in files whose names differ in the expert alone. The name without it means
    # both of them, and each becomes a file of its own: ComfyUI loads one for each expert too. diffusers writes both
    # into one file, which becomes two in the same way.
    conversions = [
        conversion
        for expert, file in (find_pair(opts.input_lora) or {"": opts.input_lora}).items()
        for part, lora in read(file, opts).items()
        if (conversion := convert(lora, file, expert, part, opts)) is not None
    ]

    # Running the same conversion again must be safe, and a LoRA that took days of training must not be lost to a typo.
    # So an equal file is left alone, and a different one, which may be the input, is kept unless the user insists. All
    # of this is known before the first file is written: a pair is converted as a whole or not at all.
    unfinished = []
    for each in conversions:
        if each.is_done():
            print(f"nothing to do: {each.output} already holds this LoRA")
        elif each.output.exists() and not opts.overwrite:
            what = "is the input itself" if each.output.samefile(each.source) else "exists and holds something else"
            raise UserError(f"{each.output} {what}. Give another --output_lora, or --overwrite to replace it.")
        else:
            unfinished.append(each)

    # A new file appears whole or not at all, so the input is safe even where it is replaced.
    for each in unfinished:
        each.write()
        dtype = opts.dtype or "unchanged"
        print(f"wrote {each.output} ({size_of(each.weights)}, layout {opts.to}, dtype {dtype})")


def read(file: Path, opts: ConvertOptions) -> dict[str, LoraFile]:
    """What a file holds, under official names: of each expert, or the only LoRA under "".

    All that can be wrong with it (an unknown key, half a pair, NaN, another kind of adapter) is found here, before
    anything is written: a key that is silently skipped would be a module that the LoRA no longer changes.
    """
    if opts.average == 1:
        return read_experts(file)
    # The mean of several checkpoints is smoother than the last one where a run ends at a high learning rate.
    taken = last_checkpoints(file, opts.average)
    print("\n".join(f"averaging {path}" for path in taken))
    return {"": average([read_lora(path) for path in taken])}


def convert(lora: LoraFile, file: Path, expert: str, part: str, opts: ConvertOptions) -> Conversion | None:
    """A LoRA of `file` in the chosen layout, for the output that is given or a name made from the file's own.

    `expert` is whose file of a pair it is, `part` whose LoRA of a file that holds two. Prints what the LoRA is. None if
    no output is given and the file has this layout already.
    """
    lora = fill_in_alpha(lora, opts.alpha, file)
    print(describe(lora, file))
    if opts.metadata == STANDARD:
        lora = replace(lora, metadata=shared_metadata(lora.metadata, file))
    if opts.fold is not None:
        lora = folded(lora, opts.fold, opts.base)

    # Everything that the new file will hold is made before any file is compared or touched. Here a layout refuses what
    # it cannot hold, and a cast refuses numbers that overflow the new dtype.
    lora = applicable(lora, opts.to, opts.drop_unsupported)
    tensors, metadata = to_state_dict(lora, opts.to, DTYPES[opts.dtype] if opts.dtype else None)

    # A file that has the chosen layout already needs no copy under a second name, unless that name was given.
    named = file.with_stem(f"{file.stem}_average{opts.average}") if opts.average > 1 else file
    if opts.output_lora is None and has_same_content(named, tensors, metadata):
        print(f"nothing to do: the file already has the layout {opts.to}")
        return None
    output = opts.output_lora or named.with_name(f"{named.stem}_{opts.to}.safetensors")
    if part or (expert and opts.output_lora):
        output = with_expert(output, part or expert)
    if "ss_output_name" in metadata:  # by which programs tell files apart
        metadata = metadata | {"ss_output_name": output.stem}
    if opts.to != PEFT_LAYOUT:
        return Conversion(file, output, tensors, metadata)
    return Conversion(file, as_folder(output), tensors, metadata, config_text(to_config(lora)))


def check_output(path: Path, layout: str) -> None:
    """Raises LoraError where the output cannot have this path."""
    if layout == PEFT_LAYOUT:
        check_folder(as_folder(path))
    else:
        check_path(path)


def as_folder(path: Path) -> Path:
    """The folder of PEFT for an output that may be named as a file is."""
    return path.with_suffix("") if path.suffix == ".safetensors" else path


def shared_metadata(metadata: dict[str, str], file: Path) -> dict[str, str]:
    """The metadata without the options of the run and the path of the base model, and a line where it had some."""
    kept = shareable(metadata, file)
    if kept != metadata:
        print("metadata  without the options of its run and the path of its base: --metadata full keeps them")
    return kept


def folded(lora: LoraFile, rank: int, base: Path | None) -> LoraFile:
    """The LoRA with plain pairs alone, and a line about what that loses. Raises UserError where a base is missing."""
    if not lora.lycoris and not lora.magnitudes:
        print("folded    nothing: this is plain LoRA, and --fold does not change its rank")
        return lora
    if base is None and needs_base(lora):
        raise UserError("DoRA depends on the weights of the base model: give its transformer with --base FILE")
    progress = partial(tqdm, desc="folding", unit="module", leave=False)
    lora, loss = fold(lora, rank, None if base is None else read_base(base), progress)
    name, worst = loss.worst
    residual = f"relative residual {loss.residual:.2%}, at most {worst:.2%} ({name})"
    lost = f"{loss.residual**2:.2%} of their squared change is lost"
    print(f"folded    {counted(len(loss.whole), 'module')} to rank {rank}: {lost}, {residual}")
    if loss.residual > MUCH_LOST:
        print("          a higher --fold loses less")
    return lora


def read_base(path: Path) -> Read:
    """Reads weights of a transformer in any layout, one after another.

    Raises CheckpointError, and UserError if there is none.
    """
    if not path.exists():
        raise UserError(f"--base {path}: there is no such file or folder")
    return partial(weights_of, read_weights(path, "transformer"))


def weights_of(base: Weights, modules: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Each of these modules with its weight, in fp32. Raises UserError for one that the base lacks."""
    if missing := [name for name in modules if f"{name}.weight" not in base.tensors]:
        raise UserError(f"{base.path} has no {missing[0]}, which the LoRA adapts. Was it made for another Wan?")
    names = [f"{name}.weight" for name in modules]
    for name, weight in read_some(base, names, cast_to(torch.float32)):
        yield name.removesuffix(".weight"), weight


def applicable(lora: LoraFile, layout: str, drop: bool) -> LoraFile:
    """What the program that reads a layout can apply. Raises UserError where that is not all, unless `drop`."""
    target = TARGETS[layout]
    lora = adapt(lora, target)
    left = unsupported(lora, target)
    if not left:
        return lora
    rest = lora.part(lambda key: key not in left)
    if not rest.modules:
        raise UserError(f"{target.program} can apply nothing of this LoRA ({kinds(set(left))})")
    part = share(lora, left)
    what = f"{target.program} cannot apply {counted(len(left), 'change')} of this LoRA ({kinds(set(left))})"
    what += "." if part is None else f". They are {part:.2%} of the squared change of all weights."
    if not drop:
        raise UserError(f"{what}\nLeave them out with --drop_unsupported.")
    print(f"left out: {what}")
    return rest


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
    for name, factors in lora.factors.items():
        if factors.rank and factors.alpha is not None and not math.isclose(factors.alpha, alpha, rel_tol=1e-6):
            raise UserError(
                f"{source}: {name} has the alpha {factors.alpha:g}, but --alpha is {alpha:g}.\n"
                "Leave --alpha out to keep that of the file."
            )
    pairs = {name: replace(pair, alpha=alpha) for name, pair in lora.pairs.items()}
    lycoris = {name: replace(each, alpha=alpha) if each.rank else each for name, each in lora.lycoris.items()}
    return replace(lora, pairs=pairs, lycoris=lycoris)


def describe(lora: LoraFile, source: Path) -> str:
    """A few lines for people: what the file is, how its keys were named, and how strong the LoRA will be."""
    factors = lora.factors.values()
    stored = [tensor for each in factors for tensor in each.tensors.values()] + list(lora.diffs.values())
    widened = ", ".join(f"{name} becomes {shape}" for name, shape in lora.input_shapes.items())
    special = {each.kind for each in lora.lycoris.values()} | {f"DoRA of {m.rule}" for m in lora.magnitudes.values()}
    scaled = [each.alpha for each in factors if each.rank]
    alpha = listed(each for each in scaled if each is not None)
    if unstated := scaled.count(None):
        few = f"{alpha}; not stated in {counted(unstated, 'module')}, whose scale is 1"
        alpha = "not stated, so the scale is 1" if unstated == len(scaled) else few
    on_top, damaged = readable_records(lora.metadata, source)
    lines = {
        "file": f"{source} ({size_of(find_weights(source)[0])})",
        "format": lora.key_format,
        "expert": trained_for(source, lora.metadata) or "",
        "kind": ", ".join(sorted(special)),
        "modules": f"{len(factors)}" + (f", and {counted(len(lora.diffs), 'full change')}" if lora.diffs else ""),
        "rank": listed(each.rank for each in factors if each.rank),
        "alpha": alpha,
        "dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored})),
        "control": f"yes, {widened}" if widened else "no",
        "on top of": " and ".join(map(str, on_top)),
    }
    return "\n".join([*(f"{name:9} {value}" for name, value in lines.items() if value), *lora.notes, *damaged])


def listed(values: Iterable[float]) -> str:
    """The different numbers, once each, from the smallest: "16", "8, 16"; "-" for none."""
    return ", ".join(f"{value:g}" for value in sorted(set(values))) or "-"


def size_of(path: Path) -> str:
    return readable_size(path.stat().st_size)


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))
