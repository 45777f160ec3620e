"""From conditions to latents: the transformers that answer, and the sampling itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.beside import Chosen, beside, split_patch
from utils.adapters.fusion import Fusion, fuse_lora
from utils.diffusion.flow import Predict
from utils.encoding.conditioning import Cond, make_predict, replace_text
from utils.storage.load import Store
from utils.storage.weights import Storage
from wan.checkpoints import ModelFiles, Place, build_transformer, cast_to
from wan.image2video import hold_first
from wan.modules.attention import SDPA
from wan.modules.model import WanModel
from wan.text2video import Sampler, part_at


class Transformers:
    """The transformers of a model, one of which is in memory: that of the noise level that is asked for.

    They answer as the base model, with the LoRAs of `fusions` in it as in training, and with those of `use`. Where
    weights are quantised or wait in main memory, the latter act beside them: added to codes, they would be rounded
    away. They attend by `attention`, one of KERNELS.
    """

    def __init__(
        self,
        files: ModelFiles,
        storage: Storage,
        fusions: Mapping[str, Fusion] = MappingProxyType({}),
        attention: str = SDPA,
    ) -> None:
        self.files, self.storage, self.fusions, self.attention = files, storage, fusions, attention
        self._loras: Mapping[str, Sequence[Chosen]] = {}
        self._loaded: tuple[str, WanModel] | None = None
        self._store = Store(storage)
        self._undo = ExitStack()  # of LoRAs beside the loaded model

    def use(self, loras: Mapping[str, Sequence[Chosen]]) -> None:
        """From now on these LoRAs are added, by the names of the transformers, and none of those before."""
        had_none, self._loras = not any(self._loras.values()), loras
        if had_none and self._loaded is not None and len(self.files.transformers) == 1:
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
        model.use_attention(self.attention)
        fusion = self.fusions.get(name, Fusion())
        fusion.widen(model)

        def cast(dtype: torch.dtype, device: torch.device) -> Place:
            return fusion.place(cast_to(dtype, device))

        stream = self._store.load(model, self.files.transformers[name], cast, fusion.targets, progress)
        if stream is not None:
            self._undo.enter_context(stream.followed(model))
        self._fuse(name, model)
        return model

    def _fuse(self, name: str, model: WanModel) -> None:
        loras = self._loras.get(name, ())
        if not loras:
            return
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
