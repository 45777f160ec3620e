"""From conditions to latents: the LoRAs to sample with, the transformers that answer, and the sampling itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.beside import Chosen, beside, split_patch
from utils.adapters.fitting import fitting
from utils.adapters.fusion import Fusion, fuse_on
from utils.adapters.lora import fuse_lora
from utils.adapters.lora_file import shown
from utils.adapters.lora_header import lora_metadata_of
from utils.adapters.lora_reader import read_lora
from utils.adapters.pairs import remarks, resolve_also_loras, resolve_experts
from utils.adapters.provenance import Fused, FusedFile, find_for_experts, fused_as_said, fused_in
from utils.common.console import say
from utils.common.errors import UserError
from utils.diffusion.flow import Predict
from utils.encoding.conditioning import Cond, make_predict, replace_text
from utils.storage.load import Store
from utils.storage.weights import Storage
from wan.checkpoints import ModelFiles, Place, build_transformer, cast_to
from wan.image2video import hold_first
from wan.modules.model import WanModel
from wan.text2video import Sampler, part_at


@dataclass(frozen=True)
class Underneath:
    """What the LoRAs that are sampled with were trained on top of, by the names of the transformers."""

    files: Mapping[str, Sequence[FusedFile]]
    fusions: Mapping[str, Fusion]
    is_left_out: bool = False

    @property
    def reads_control(self) -> bool:
        """Whether the model needs a control also without the LoRAs that are sampled with."""
        return any(fusion.reads_control for fusion in self.fusions.values())

    def describe(self, compared: bool) -> str:
        """The end of a sentence about what is sampled, also without the LoRA where it is `compared`; often nothing."""
        names = " and ".join(dict.fromkeys(str(file) for files in self.files.values() for file in files))
        if self.is_left_out:
            return f", without what the LoRA was trained on top of{f': {names}' if names else ''}"
        return f", on top of {names}{', with and without the LoRA' * compared}" if names else ""


NOTHING = Underneath({}, {})


def find_underneath(paths: Sequence[Path], given: Sequence[Path], is_left_out: bool, files: ModelFiles) -> Underneath:
    """What the LoRAs of `paths` were trained on top of, found by content, or only named where it `is_left_out`.

    `given` are files of it. What of them is not used, or not unchanged, is reported. Raises UserError where one is not
    found, and as `resolve_experts` and `fuse_on` do.
    """
    experts = [expert.name for expert in files.family.experts]
    own = resolve_experts(paths, experts)
    if is_left_out:
        if given:
            raise UserError("--fuse_lora and --without_fused exclude each other: give one of them")
        return _left_out(own)
    advice = "Give it as --fuse_lora FILE, or sample without it: --without_fused."
    found, fusions, notes = find_for_experts(own, experts, given, advice), dict[str, Fusion](), list[str]()
    for name, transformer in files.transformers.items():
        fusions[name], left_out = fuse_on(build_transformer(transformer), found[name])
        notes += left_out
    for note in dict.fromkeys(notes):
        say(note)
    return Underneath(found, fusions)


def _left_out(own: Mapping[str, Path]) -> Underneath:
    """What these LoRAs say that they were trained on top of. Says what is damaged of it; raises where none says any."""
    recorded, notes = {}, list[str]()
    for name, path in own.items():
        recorded[name], damaged = fused_as_said(lora_metadata_of(path), path)
        notes += damaged
    for note in dict.fromkeys(notes):
        say(note)
    if not notes and not any(recorded.values()):
        raise UserError(f"--without_fused: {next(iter(own.values()))} was trained on top of no LoRA, leave it out")
    named = {name: [FusedFile(Path(shown(fused.name)), fused) for fused in each] for name, each in recorded.items()}
    return Underneath(named, {}, is_left_out=True)


def choose_loras(
    paths: Sequence[Path],
    strength: float,
    others: Sequence[str],
    files: ModelFiles,
    underneath: Underneath = NOTHING,
) -> dict[str, list[Chosen]]:
    """The LoRAs of each transformer: those of `paths`, and the `others`, each FILE or FILE:STRENGTH.

    They are added to what is `underneath`. What of them is not used, or not unchanged, is reported. Raises UserError
    as `resolve_experts`, `resolve_also_loras` and `fitting` do, before any weights of the model are read.
    """
    experts = [expert.name for expert in files.family.experts]
    own, further = resolve_experts(paths, experts), resolve_also_loras(others, experts)
    wanted = {name: [*([(own[name], strength)] if name in own else []), *further[name]] for name in experts}
    there = {name: [file.record for file in each] for name, each in underneath.files.items() if underneath.fusions}
    notes = [*remarks(own, experts), *_notes_on(further, there)]
    return _read_loras(wanted, files, notes, underneath.fusions)


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
    there = {name: fused_in(each, Path(name)) for name, each in facts.items()}
    loras = _read_loras(wanted, files, _notes_on(wanted, there))
    for (path, _), chosen in zip(chain(*wanted.values()), chain(*loras.values()), strict=True):
        if chosen.lora.input_shapes:
            raise UserError(
                f"--also_lora {path} is a control LoRA: previews show no control but that of --control_lora.\n"
                "Try the LoRAs together with test_wan_control_lora.py."
            )
    return loras


def _notes_on(further: Mapping[str, Sequence[tuple[Path, float]]], there: Mapping[str, Sequence[Fused]]) -> list[str]:
    """A sentence for each further LoRA that was trained on top of one that is not there."""
    notes = []
    for name, loras in further.items():
        known = {fused.sha256 for fused in there.get(name, ())}
        for path, _ in loras:
            said, damaged = fused_as_said(lora_metadata_of(path), path)
            notes += damaged
            if absent := [fused for fused in said if fused.sha256 not in known]:
                was = " and ".join(map(str, absent))
                notes.append(f"note: --also_lora {path} was trained on top of {was}, which is not added with it")
    return notes


def _read_loras(
    wanted: Mapping[str, Sequence[tuple[Path, float]]],
    files: ModelFiles,
    notes: Sequence[str] = (),
    fusions: Mapping[str, Fusion] = NOTHING.fusions,
) -> dict[str, list[Chosen]]:
    """The part of each LoRA that its transformer has a place for. Says the notes, and what is left out."""
    notes, loras = [*notes], {name: list[Chosen]() for name in wanted}
    for name, paths in wanted.items():
        layout = build_transformer(files.transformers[name])
        if name in fusions:
            fusions[name].widen(layout)
        for path, strength in paths:
            lora, left_out = fitting(read_lora(path), layout, path)
            try:
                fuse_lora(layout, lora)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            loras[name].append(Chosen(lora, strength))
            notes += left_out
    for note in dict.fromkeys(notes):
        say(note)
    return loras


class Transformers:
    """The transformers of a model, one of which is in memory: that of the noise level that is asked for.

    They answer as the base model, with the LoRAs of `fusions` in it as in training, until `fuse` is called, and then
    with `loras` too. Where weights are quantised or wait in main memory, these act beside them: added to codes, they
    would be rounded away.
    """

    def __init__(
        self,
        files: ModelFiles,
        loras: Mapping[str, Sequence[Chosen]],
        storage: Storage,
        fusions: Mapping[str, Fusion] = NOTHING.fusions,
    ) -> None:
        self.files, self.loras, self.storage, self.fusions = files, loras, storage, fusions
        self._loaded: tuple[str, WanModel] | None = None
        self._fused = False
        self._store = Store(storage)
        self._undo = ExitStack()  # of LoRAs beside the loaded model

    def fuse(self) -> None:
        """Adds the LoRAs, now and whenever a transformer is loaded again."""
        self._fused = True
        if self._loaded is not None and len(self.files.transformers) == 1:
            self._fuse(*self._loaded)
        else:
            self.unload()  # of two experts the one in memory is the low one, and the high one is asked next

    def predict(self, latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """The velocity at a timestep (B,), which all samples share."""
        name = list(self.files.transformers)[part_at(self.files.family.boundaries, timestep)]
        if self._loaded is None or self._loaded[0] != name:
            self.unload()  # the other expert leaves memory first
            self._loaded = name, self._load(name)
        return make_predict(self._loaded[1])(latents, timestep, cond)

    def unload(self) -> None:
        """Frees what is loaded."""
        self._undo.close()
        self._loaded = None

    def _load(self, name: str) -> WanModel:
        label = "the transformer" if len(self.files.transformers) == 1 else f"the {name} expert"
        progress = partial(tqdm, desc=f"loading {label}", unit="tensor", leave=False)
        model = build_transformer(self.files.transformers[name])
        fusion = self.fusions.get(name, Fusion())
        fusion.widen(model)

        def cast(dtype: torch.dtype, device: torch.device) -> Place:
            return fusion.place(cast_to(dtype, device))

        stream = self._store.load(model, self.files.transformers[name], cast, fusion.targets, progress)
        if stream is not None:
            self._undo.enter_context(stream.followed(model))
        if self._fused:
            self._fuse(name, model)
        return model

    def _fuse(self, name: str, model: WanModel) -> None:
        loras = self.loras[name]
        if self.storage.is_plain:
            for chosen in loras:
                fuse_lora(model, chosen.lora, chosen.strength)
            return
        parts = [(*split_patch(chosen.lora), chosen.strength) for chosen in loras]
        for patch, _, strength in parts:
            fuse_lora(model, patch, strength)
        others = [Chosen(rest, strength) for _, rest, strength in parts]
        self._undo.enter_context(beside(model, others, self.storage.device))


def denoise(
    sampler: Sampler,
    predict: Predict[Cond],
    noise: Tensor,
    cond: Cond,
    negative: Tensor | None,
    progress: Callable[[Tensor], Iterable[Tensor]] = iter,
) -> Tensor:
    """Latents (B, C, F, H, W) sampled from noise under these conditions, guided away from a negative text (T, E).

    A given first latent frame is that of the result. That it also replaces the one of each step is left to `predict`:
    solvers treat every latent on its own.
    """
    uncond = None if negative is None else replace_text(cond, negative)
    latents = sampler.denoise(predict, noise, cond, uncond, progress)
    return latents if cond.first is None else hold_first(latents, cond.first, cond.held)
