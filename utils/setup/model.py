"""Which model a run is for: its folder, and single files beside the folder or instead of it."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.adapters.pairs import expert_of
from utils.common.console import say
from utils.common.errors import UserError
from utils.common.formatting import counted, format_table
from utils.common.options import option
from utils.setup.download import suggest_download
from wan.checkpoints import (
    PARTS,
    TRANSFORMERS,
    CheckpointError,
    MissingPartsError,
    ModelFiles,
    ModelNotFoundError,
    find_family,
    find_model,
    find_tokenizer,
    open_model,
    surplus_bytes,
)
from wan.configs import FAMILIES, Family, named_family
from wan.modules.model import WanShape

DOWNLOAD_TOKENIZER = "python train_wan_lora.py --download_tokenizer"
BASE_MODEL = "base_model"  # in a LoRA's metadata: its base model by name
BASE_FILES = "base_files"  # in a LoRA's metadata: the options that its base model was given by, with file names alone

_TASKS = {"t2v", "i2v", "flf2v", "ti2v", "fun", "vace"}
_SIZE = re.compile(r"(?<![a-z0-9])(480p|720p)(?![a-z0-9])")
_PARAMETERS = re.compile(r"(?<![a-z0-9.])a?(1[._]3|5|14)b(?![a-z0-9])")
_RELEASE = re.compile(r"wan[ ._-]?2[._-]?([12])(?!\d)")
# What files are called that have their name from their folder.
_GENERIC = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?:bf16|fp16))?(?:-\d{5}-of-\d{5})?")


@dataclass(frozen=True)
class SingleFiles:
    """single files of a model"""

    transformer: Path | None = option(None, "the transformer, for models with a single one: a file or a folder")
    high_noise: Path | None = option(None, "the high-noise expert of Wan 2.2 A14B")
    low_noise: Path | None = option(None, "the low-noise expert of Wan 2.2 A14B")
    vae: Path | None = option(None, "the VAE")
    text_encoder: Path | None = option(None, "the UMT5 text encoder")
    clip: Path | None = option(None, "the CLIP vision encoder, for Wan 2.1 I2V and FLF2V")
    tokenizer: Path | None = option(None, "folder with the tokenizer.json of UMT5")
    family: str | None = option(None, "which model it is, if several have the same tensors", choices=tuple(FAMILIES))

    @property
    def given(self) -> dict[str, Path]:
        """The given files by the names of the parts that they are."""
        paths = {name: getattr(self, name) for name in PARTS}
        return {name: path for name, path in paths.items() if path is not None}

    @property
    def given_transformers(self) -> dict[str, Path]:
        """Those of them that are transformers."""
        return {name: path for name, path in self.given.items() if name in TRANSFORMERS}

    def flags(self, files: ModelFiles) -> str:
        """The options, as typed, with which the test script opens these files; none for a folder alone."""
        options: dict[str, object] = {**self.given} | ({"family": self.family} if self.family else {})
        if options and files.source != str(next(iter(files.transformers.values())).path):
            options = {"pretrained_model_name_or_path": files.source} | options
        typed = [f" --{name} {shlex.quote(str(value))}" for name, value in options.items()]
        return "".join(typed + [f" --{name} ..." for name in _missing_experts(files)])

    def base(self, name: str) -> dict[str, str]:
        """What the metadata of a LoRA says of its base model: a hub name, or the names of a folder or of transformers.

        Where a folder is stays private.
        """
        if not (given := self.given_transformers):
            return {BASE_MODEL: _own_name(name) if os.path.isdir(name) else name}
        flags = " ".join(f"--{part} {_own_name(path)}" for part, path in given.items())
        return {BASE_MODEL: " + ".join(_own_name(path) for path in given.values()), BASE_FILES: flags}


def open_given(opts: SingleFiles, name: str | None, is_default: bool = False) -> ModelFiles:
    """The model of a folder or hub name and of the given files; what they are taken for is printed.

    A folder that `is_default` need not be there where transformers are given. Raises UserError where parts are missing,
    and CheckpointError as `open_model` does.
    """
    with suggest_download(opts.family if is_default else None):
        try:
            files = open_model(_present(opts, name, is_default), opts.family or "", **opts.given)
        except MissingPartsError as error:
            raise UserError(f"{error}\n{_advice(error.parts)}") from None
    if opts.given:
        say(format_table(("part", "file"), list(_parts(files))))
    reason = ", as --family says" if opts.family else "".join(alternatives(files, bool(opts.given_transformers)))
    if opts.given or reason:
        say(f"model: {files.family.name}{reason}")
    for remark in (*contradictions(opts.given_transformers, files.family), *surpluses(files)):
        say(remark)
    if opts.given:
        say("")
    return files


def find_given_family(opts: SingleFiles, name: str, is_default: bool = False) -> Family:
    """The family of the same model, for which only its transformers are needed, and none for a release."""
    with suggest_download():
        return find_family(_present(opts, name, is_default), opts.family or "", **opts.given)


def given_shape(opts: SingleFiles, name: str, family: Family) -> WanShape:
    """The shape of the transformers of this model; of a release that is not there, the released one."""
    try:
        files = open_model(name, opts.family or "", **opts.given)
    except (ModelNotFoundError, MissingPartsError):
        return family.shape
    return files.shape


def find_given_tokenizer(opts: SingleFiles, name: str) -> tuple[Path, int] | None:
    """The folder of this model's tokenizer, and how many tokens the model reads; None where it is not there yet."""
    try:
        return find_tokenizer(name, **opts.given)
    except CheckpointError:
        return None


def need_experts(files: ModelFiles, trained: Sequence[str], needed_for: Sequence[str]) -> None:
    """Raises UserError where an expert is not given that is trained, or any, if `needed_for` says what they are for."""
    for name in _missing_experts(files):
        if name in trained:
            (there,) = files.transformers
            other = f"train the other one alone: --expert {there.removesuffix('_noise')}"
            raise UserError(f"the {name} expert is not given: --{name} FILE, or {other}")
        if needed_for:
            raise UserError(f"the {name} expert is not given, but needed for {' and '.join(needed_for)}: --{name} FILE")


def alternatives(files: ModelFiles, is_given: bool) -> Iterator[str]:
    """What else the transformers could be by their tensors, and what would say so.

    A folder is in doubt only where its name is not that of the family's release; given transformers, whatever they are
    called.
    """
    traits = next(iter(files.transformers.values())).traits
    same_tensors = [row for row in FAMILIES.values() if row.agrees(traits) and row.shape.dim == traits.dim]
    same_option = [row for row in same_tensors if row.allows_transformers(files.transformers)]
    others = [row.name for row in same_option if row is not files.family]
    if others and (is_given or named_family(str(Path(files.source).absolute())) is not files.family):
        yield f"; if it is another: --family {' or '.join(others)}"
    other_option = [row for row in same_tensors if row not in same_option]
    if other_option and is_given:
        options = " and ".join(f"--{expert.name}" for expert in other_option[0].experts)
        yield f" (the same tensors as {' or '.join(row.name for row in other_option)}, which is given with {options})"


def contradictions(transformers: Mapping[str, Path], family: Family) -> Iterator[str]:
    """A sentence for each transformer whose file name says something else than what it is used as.

    Names decide nothing: anyone may rename a file.
    """
    swapped = []
    for part, path in transformers.items():
        name = _telling_name(path)
        said = []
        if (expert := expert_of(Path(f"{name}.safetensors"), {})) not in (None, part):
            said.append(str(expert))
            swapped.append(part)
        words, kind = name.lower(), family.name.lower()
        said += sorted((set(re.split(r"[^a-z0-9]+", words)) & _TASKS) - set(re.split(r"[^a-z0-9]+", kind)))
        for pattern in (_SIZE, _PARAMETERS, _RELEASE):
            ours, theirs = pattern.search(f" {kind}"), pattern.search(words)
            if ours and theirs and ours[1] != theirs[1].replace("_", "."):
                said.append(theirs[0].replace("_", "."))
        if said:
            facts = f"its name says {' and '.join(said)}, but it is used as {part} of {family.name}"
            yield f"note: {path.name}: {facts}"
    if len(swapped) == 2:
        yield "note: the files of the two experts seem to be swapped"


def surpluses(files: ModelFiles) -> Iterator[str]:
    """A sentence for each file that is longer than its tensors: it may be one of several that were joined."""
    for path in files.weights:
        if count := surplus_bytes(path):
            yield f"note: {path} has {counted(count, 'byte')} after its last tensor: read by its header, without them"


def _telling_name(path: Path) -> str:
    """The name of a file without its ending, or that of its folder where all files of this kind have the same."""
    name = path.name.removesuffix(".safetensors").removesuffix(".pth")
    if _GENERIC.fullmatch(name):
        name = path.absolute().parent.name
    return "low_noise" if name == "transformer_2" else name


def _present(opts: SingleFiles, name: str | None, is_default: bool) -> str | None:
    """The folder's name; None for a default that is not there and need not be, since transformers are given."""
    if name is None or not is_default:
        return name
    try:
        find_model(name)
    except CheckpointError:
        return None if opts.given_transformers else name
    return name


def _own_name(path: str | Path) -> str:
    """The name of a file or folder without those above it, also of "." and ".."."""
    return os.path.basename(os.path.abspath(path)) or "model"


def _missing_experts(files: ModelFiles) -> list[str]:
    return [expert.name for expert in files.family.experts if expert.name not in files.transformers]


def _advice(parts: Sequence[str]) -> str:
    flags = [f"--{part}" for part in parts]
    listed = f"{', '.join(flags[:-1])} and {flags[-1]}" if len(flags) > 1 else flags[0]
    advice = f"give {listed}, or a folder that has them as --pretrained_model_name_or_path"
    return f"{advice}; the tokenizer alone: {DOWNLOAD_TOKENIZER}" if "tokenizer" in parts else advice


def _parts(files: ModelFiles) -> Iterator[tuple[str, Path]]:
    for name, transformer in files.transformers.items():
        yield name, transformer.path
    yield "vae", files.vae.path
    yield "text_encoder", files.text_encoder.path
    if files.clip is not None:
        yield "clip", files.clip.path
    yield "tokenizer", files.tokenizer
