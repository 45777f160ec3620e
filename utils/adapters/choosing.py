"""The LoRAs to sample with, and those that they were trained on top of, tried on transformers without weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from utils.adapters.beside import Chosen
from utils.adapters.fusion import Fusion, fit_lora, read_fusion
from utils.adapters.lora_file import LoraError, shown
from utils.adapters.lora_header import lora_metadata_of
from utils.adapters.lora_reader import read_lora
from utils.adapters.pairs import remarks, resolve_also_loras, resolve_experts
from utils.adapters.provenance import (
    DamagedRecordError,
    FusedFile,
    FusedRecord,
    find_fused_files_of_experts,
    read_records,
    readable_records,
)
from utils.common.console import say
from utils.common.errors import UserError
from wan.checkpoints import ModelFiles, build_transformer

ADVICE = "Give it as --fuse_lora FILE, or sample without it: --without_fused."


@dataclass(frozen=True)
class FusedBase:
    """What LoRAs were trained on top of, by the names of the transformers.

    `fusions` put the `files` into the base model. Where these are left out, there are none.
    """

    files: Mapping[str, Sequence[FusedFile]]
    fusions: Mapping[str, Fusion]
    is_left_out: bool = False

    @property
    def reads_control(self) -> bool:
        """Whether the base model needs a control."""
        return any(fusion.reads_control for fusion in self.fusions.values())

    def describe(self, compared: bool) -> str:
        """The end of a sentence about what is sampled, also without the LoRA where it is `compared`; often nothing."""
        names = " and ".join(dict.fromkeys(str(file) for files in self.files.values() for file in files))
        if self.is_left_out:
            return f", without what the LoRA was trained on top of{f': {names}' if names else ''}"
        return f", on top of {names}{', with and without the LoRA' * compared}" if names else ""


PLAIN_BASE = FusedBase({}, {})


def find_fused_base(paths: Sequence[Path], given: Sequence[Path], files: ModelFiles) -> FusedBase:
    """What the LoRAs of `paths` were trained on top of, found by content; `given` are files of it.

    What of it is not used, or not unchanged, is reported. Raises UserError where one is not found, and as
    `resolve_experts` and `read_fusion` do.
    """
    experts = [expert.name for expert in files.family.experts]
    own = resolve_experts(paths, experts)
    try:
        found = find_fused_files_of_experts(own, experts, given, ADVICE)
    except DamagedRecordError as error:
        raise LoraError(f"{error}\nSample without it: --without_fused.") from None
    fusions, notes = dict[str, Fusion](), list[str]()
    for name, transformer in files.transformers.items():
        fusions[name], differences = read_fusion(build_transformer(transformer), found[name])
        notes += differences
    _say_each(notes)
    return FusedBase(found, fusions)


def leave_out_fused_base(paths: Sequence[Path], files: ModelFiles) -> FusedBase:
    """What the LoRAs of `paths` say that they were trained on top of, which is not used, nor looked for.

    What is damaged of it is reported. Raises UserError where none says any, and as `resolve_experts` does.
    """
    own = resolve_experts(paths, [expert.name for expert in files.family.experts])
    recorded, notes = {}, list[str]()
    for name, path in own.items():
        recorded[name], damaged = readable_records(lora_metadata_of(path), path)
        notes += damaged
    _say_each(notes)
    if not notes and not any(recorded.values()):
        raise UserError(f"--without_fused: {next(iter(own.values()))} was not trained on top of a LoRA: leave it out")
    named = {name: [FusedFile(Path(shown(fused.name)), fused) for fused in each] for name, each in recorded.items()}
    return FusedBase(named, {}, is_left_out=True)


def choose_loras(
    paths: Sequence[Path],
    strength: float,
    others: Sequence[str],
    files: ModelFiles,
    base: FusedBase = PLAIN_BASE,
) -> dict[str, list[Chosen]]:
    """The LoRAs of each transformer: those of `paths`, and the `others`, each FILE or FILE:STRENGTH.

    They are added to the `base`. What of them is not used, or not unchanged, is reported. Raises UserError as
    `resolve_experts`, `resolve_also_loras` and `fitting` do, before any weights of the model are read.
    """
    experts = [expert.name for expert in files.family.experts]
    own, further = resolve_experts(paths, experts), resolve_also_loras(others, experts)
    wanted = {name: [*([(own[name], strength)] if name in own else []), *further[name]] for name in experts}
    there = {name: [file.record for file in each] for name, each in base.files.items() if base.fusions}
    notes = [*remarks(own, experts), *_notes_on(further, there)]
    return _read_loras(wanted, files, notes, base.fusions)


def choose_lora_of(path: Path, expert: str, files: ModelFiles) -> Chosen | None:
    """The LoRA of one expert; None where the file, or pair, is not for it. Reports and raises as `choose_loras`."""
    own = resolve_experts((path,), [each.name for each in files.family.experts])
    return _read_loras({expert: [(own[expert], 1.0)]}, files)[expert][0] if expert in own else None


def split_loras(
    loras: Mapping[str, Sequence[Chosen]], paths: Sequence[Path]
) -> tuple[dict[str, list[Chosen]], dict[str, list[Chosen]]]:
    """Of the LoRAs that `choose_loras` has chosen, those of `paths`, and the others."""
    own = {name: [*each[:1]] if name in resolve_experts(paths, [*loras]) else [] for name, each in loras.items()}
    return own, {name: [*each[len(own[name]) :]] for name, each in loras.items()}


def further_loras(
    texts: Sequence[str], files: ModelFiles, facts: Mapping[str, Mapping[str, str]] = MappingProxyType({})
) -> dict[str, list[Chosen]]:
    """The LoRAs of each transformer that act beside those in training, each FILE or FILE:STRENGTH; none for no texts.

    `facts` are what LoRAs say of the base that they are trained on, by the names of its transformers. Reports and
    raises as `choose_loras` does. Raises UserError for a control LoRA too.
    """
    if not texts:
        return {}
    wanted = resolve_also_loras(texts, [expert.name for expert in files.family.experts])
    there = {name: read_records(each, Path(name)) for name, each in facts.items()}
    loras = _read_loras(wanted, files, _notes_on(wanted, there))
    for chosen in chain(*loras.values()):
        if chosen.lora.input_shapes:
            raise UserError(
                f"--also_lora {chosen.path} is a control LoRA: previews show no control but that of --control_lora.\n"
                "Try the LoRAs together with test_wan_control_lora.py."
            )
    return loras


def _notes_on(
    further: Mapping[str, Sequence[tuple[Path, float]]], there: Mapping[str, Sequence[FusedRecord]]
) -> list[str]:
    """A sentence for each further LoRA that was trained on top of one that is not there."""
    notes = []
    for name, loras in further.items():
        known = {fused.sha256 for fused in there.get(name, ())}
        for path, _ in loras:
            said, damaged = readable_records(lora_metadata_of(path), path)
            notes += damaged
            if absent := [fused for fused in said if fused.sha256 not in known]:
                was = " and ".join(map(str, absent))
                notes.append(f"note: --also_lora {path} was trained on top of {was}, which is not added with it")
    return notes


def _read_loras(
    wanted: Mapping[str, Sequence[tuple[Path, float]]],
    files: ModelFiles,
    notes: Sequence[str] = (),
    fusions: Mapping[str, Fusion] = PLAIN_BASE.fusions,
) -> dict[str, list[Chosen]]:
    """The part of each LoRA that its transformer has a place for. Says the notes, and what is left out."""
    notes, loras = [*notes], {name: list[Chosen]() for name in wanted}
    for name, paths in wanted.items():
        layout = build_transformer(files.transformers[name])
        if name in fusions:
            fusions[name].widen(layout)
        for path, strength in paths:
            lora, differences = fit_lora(read_lora(path), layout, path)
            Fusion().with_lora(layout, lora).widen(layout)
            loras[name].append(Chosen(lora, strength, path))
            notes += differences
    _say_each(notes)
    return loras


def _say_each(notes: Sequence[str]) -> None:
    for note in dict.fromkeys(notes):
        say(note)
