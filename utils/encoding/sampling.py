"""From conditions to latents: the LoRAs to sample with, the transformers that answer, and the sampling itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from utils.adapters.beside import Chosen, beside, split_patch
from utils.adapters.fitting import fitting
from utils.adapters.lora import fuse_lora
from utils.adapters.lora_reader import read_lora
from utils.adapters.pairs import remarks, resolve_also_loras, resolve_experts
from utils.common.console import say
from utils.common.errors import UserError
from utils.diffusion.flow import Predict
from utils.encoding.conditioning import Cond, make_predict, replace_text
from utils.storage.load import Store
from utils.storage.weights import Storage
from wan.checkpoints import ModelFiles, build_transformer, cast_to
from wan.image2video import hold_first
from wan.modules.model import WanModel
from wan.text2video import Sampler, part_at


def choose_loras(
    paths: Sequence[Path], strength: float, others: Sequence[str], files: ModelFiles
) -> dict[str, list[Chosen]]:
    """The LoRAs of each transformer: those of `paths`, and the `others`, each FILE or FILE:STRENGTH.

    What of them is not used, or not unchanged, is reported. Raises UserError as `resolve_experts`,
    `resolve_also_loras` and `fitting` do, before any weights of the model are read.
    """
    experts = [expert.name for expert in files.family.experts]
    own, further = resolve_experts(paths, experts), resolve_also_loras(others, experts)
    wanted = {name: [*([(own[name], strength)] if name in own else []), *further[name]] for name in experts}
    return _read_loras(wanted, files, remarks(own, experts))


def further_loras(texts: Sequence[str], files: ModelFiles) -> dict[str, list[Chosen]]:
    """The LoRAs of each transformer that act beside those in training, each FILE or FILE:STRENGTH; none for no texts.

    Reports and raises as `choose_loras` does. Raises UserError for a control LoRA too.
    """
    if not texts:
        return {}
    wanted = resolve_also_loras(texts, [expert.name for expert in files.family.experts])
    loras = _read_loras(wanted, files)
    for (path, _), chosen in zip(chain(*wanted.values()), chain(*loras.values()), strict=True):
        if chosen.lora.input_shapes:
            raise UserError(
                f"--also_lora {path} is a control LoRA: previews show no control but that of --control_lora.\n"
                "Try the LoRAs together with test_wan_control_lora.py."
            )
    return loras


def _read_loras(
    wanted: Mapping[str, Sequence[tuple[Path, float]]], files: ModelFiles, notes: Sequence[str] = ()
) -> dict[str, list[Chosen]]:
    """The part of each LoRA that its transformer has a place for. Says the notes, and what is left out."""
    notes, loras = [*notes], {name: list[Chosen]() for name in wanted}
    for name, paths in wanted.items():
        layout = build_transformer(files.transformers[name])
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

    They answer as the base model until `fuse` is called, and then with their LoRAs. Where weights are quantised or wait
    in main memory, LoRAs act beside them: added to codes, they would be rounded away.
    """

    def __init__(self, files: ModelFiles, loras: Mapping[str, Sequence[Chosen]], storage: Storage) -> None:
        self.files, self.loras, self.storage = files, loras, storage
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
        stream = self._store.load(model, self.files.transformers[name], cast_to, progress=progress)
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
