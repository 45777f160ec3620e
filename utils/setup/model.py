"""Which model a run is for: its folder, and single files beside the folder or instead of it."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.common.console import say
from utils.common.errors import UserError
from utils.common.formatting import format_table
from utils.common.options import option
from utils.setup.download import suggest_download
from wan.checkpoints import PARTS, ModelFiles, ModelNotFoundError, find_family, find_model, open_model
from wan.configs import FAMILIES, Family, named_family

_TASKS = {"t2v", "i2v", "flf2v", "ti2v", "fun", "vace"}
_SIDES = {"high": "high_noise", "low": "low_noise", "highnoise": "high_noise", "lownoise": "low_noise"}
_RELEASE = re.compile(r"wan[ ._-]?2[._-]?([12])(?!\d)", re.IGNORECASE)


@dataclass(frozen=True)
class SingleFiles:
    """single files of a model"""

    transformer: Path | None = option(None, "transformer of a model that has one: a file, such as ComfyUI's, or folder")
    high_noise: Path | None = option(None, "high-noise expert of Wan 2.2 A14B, likewise")
    low_noise: Path | None = option(None, "low-noise expert, likewise")
    vae: Path | None = option(None, "VAE")
    text_encoder: Path | None = option(None, "UMT5 text encoder")
    clip: Path | None = option(None, "CLIP vision encoder, for Wan 2.1 I2V and FLF2V")
    tokenizer: Path | None = option(None, "folder with the tokenizer.json of UMT5")
    family: str | None = option(None, "which model it is, where tensors do not tell", choices=tuple(FAMILIES))

    @property
    def files(self) -> dict[str, Path]:
        """The given files by the names of the parts that they are."""
        given = {name: getattr(self, name) for name in PARTS}
        return {name: path for name, path in given.items() if path is not None}

    def flags(self, found: ModelFiles) -> str:
        """The options, as typed, with which another script opens the same files; none for a folder alone."""
        given: dict[str, object] = {**self.files} | ({"family": self.family} if self.family else {})
        if given and found.source != str(next(iter(found.transformers.values())).path):
            given = {"pretrained_model_name_or_path": found.source} | given
        return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in given.items())

    def open_model(self, name: str | None, is_default: bool = False) -> ModelFiles:
        """The model of a folder or hub name and of the given files; what they are taken for is printed.

        With files, a name that `is_default` may be of a folder that does not exist. Raises UserError where it is not
        there, and CheckpointError as `wan.checkpoints.open_model` does.
        """
        name = self._present(name, is_default)
        with suggest_download():
            found = open_model(name, self.family or "", **self.files)
        if self.files:
            say(format_table(("part", "file"), list(_parts(found))))
        reason = "as --family says" if self.family else "; ".join(doubts(found, bool(self.files)))
        if self.files or reason:
            say(f"model: {found.family.name}{reason and ', '}{reason}")
        for remark in contradictions(self.files, found.family):
            say(remark)
        return found

    def find_family(self, name: str | None, is_default: bool = False) -> Family:
        """The family of the same model, for which only its transformers are needed, and none for a release."""
        with suggest_download():
            return find_family(self._present(name, is_default), self.family or "", **self.files)

    def base_name(self, name: str) -> str:
        """What a LoRA names its base model by: the folder, or the file names of the transformers that are given."""
        transformers = [path.name for part, path in self.files.items() if part in PARTS[:3]]
        return " + ".join(transformers) or name

    def _present(self, name: str | None, is_default: bool) -> str | None:
        if name is not None and is_default and (self.files or self.family):
            try:
                find_model(name)
            except ModelNotFoundError:
                return None if self.files else name
        return name


def doubts(found: ModelFiles, is_given: bool) -> Iterator[str]:
    """What else the transformers could be by their tensors, and what would say so.

    A folder is in doubt only where its name is not that of a release; files that are given, whatever they are called.
    """
    traits = next(iter(found.transformers.values())).traits
    alike = [row for row in FAMILIES.values() if row.agrees(traits) and row.shape == found.family.shape]
    others = [row for row in alike if row.has_transformers(found.transformers) and row is not found.family]
    if others and (is_given or named_family(str(Path(found.source).absolute())) is None):
        yield f"unless --family says {' or '.join(row.name for row in others)}"
    otherwise = [row for row in alike if not row.has_transformers(found.transformers)]
    if otherwise and is_given:
        options = " and ".join(f"--{expert.name}" for expert in otherwise[0].experts)
        yield f"because it is given so; by {options} it is {' or '.join(row.name for row in otherwise)}"


def contradictions(files: Mapping[str, Path], family: Family) -> Iterator[str]:
    """A sentence for each transformer whose file name says something else than what it is used as.

    Names decide nothing: anyone may rename a file.
    """
    for part, path in files.items():
        if part not in PARTS[:3]:
            continue
        words = set(re.split(r"[^a-z0-9]+", path.stem.lower()))
        said = [word for word, side in _SIDES.items() if word in words and side != part]
        kind = set(re.split(r"[^a-z0-9]+", family.name.lower()))
        said += sorted((words & _TASKS) - kind)
        release = _RELEASE.search(path.name)
        if release and f"2.{release[1]}" not in family.name:
            said.append(f"2.{release[1]}")
        if said:
            facts = f"its name says {' and '.join(said)}, but it is used as {part} of {family.name}"
            yield f"note: {path.name}: {facts}"


def refuse_missing_base(name: str) -> None:
    """Raises UserError for a LoRA whose base model was given as single files: their places are not known."""
    if name.endswith(".safetensors"):
        raise UserError(
            f"the LoRA was trained on {name}: give the file with --transformer, or two with --high_noise and "
            "--low_noise, and the other parts with --vae, --text_encoder and --tokenizer"
        )


def _parts(found: ModelFiles) -> Iterator[tuple[str, Path]]:
    for name, transformer in found.transformers.items():
        yield name, transformer.path
    yield "vae", found.vae.path
    yield "text_encoder", found.text_encoder.path
    if found.clip is not None:
        yield "clip", found.clip.path
    yield "tokenizer", found.tokenizer
