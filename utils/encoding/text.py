"""Prompts to embeddings, through the cache: the text encoder is loaded only where something is missing."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.common.device import compute_dtype
from utils.common.errors import UserError
from utils.common.formatting import readable_size
from utils.encoding.text_cache import TextCache, load_embedding
from wan.checkpoints import load_text_encoder, text_encoder_bytes, text_encoder_fingerprint, text_length
from wan.modules.model import WanShape

# The memory a loaded encoder needs beyond its weights, as a factor.
HEADROOM = 1.1


@dataclass(frozen=True)
class Texts:
    """Everything that is told in words, encoded."""

    captions: TextCache
    previews: list[tuple[str, Tensor]]  # prompts with their (T, E)
    negative: Tensor | None  # (T, E), where guidance leads away from it: in distillation, and in previews


@dataclass(frozen=True)
class TextEncoding:
    """The text encoder of a model folder, not loaded; bf16 on a machine with a GPU, as released, and fp32 without."""

    folder: Path
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.device)

    def cache(self, root: Path) -> TextCache:
        """This encoder's embeddings under `root`."""
        return TextCache(root, text_encoder_fingerprint(self.folder, text_length(self.folder), self.dtype))

    def fill(self, wanted: Mapping[TextCache, Sequence[str]]) -> None:
        """Encodes what the caches lack of these captions, with one load of the encoder, and says so."""
        missing = {cache: lacking for cache, captions in wanted.items() if (lacking := cache.missing(captions))}
        count = sum(map(len, missing.values()))
        known = sum(len(set(captions)) for captions in wanted.values()) - count
        if not count:
            print(f"text: 0 to encode, {known} cached")
            self._require_differences(wanted)
            return
        device = self._device()
        size = readable_size(text_encoder_bytes(self.folder))
        for cache in missing:
            cache.prepare()  # a folder that cannot be written is told before the encoder loads
        print(f"text: {count} to encode, {known} cached; loading the text encoder ({size}) on {device}")
        encoder = load_text_encoder(self.folder, text_length(self.folder), self.dtype, device)
        for cache, captions in missing.items():
            try:
                cache.store(captions, encoder.encode)
            except ValueError as error:
                raise UserError(f"{self.folder}: {error}") from None
            self._tell_cut(cache, captions)
        self._require_differences(wanted)
        # Given back to the driver once, because nothing later is as large: left reserved it would count as used.
        del encoder
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(
        self,
        captions: Sequence[str],
        prompts: Sequence[str],
        folder: Path,
        negative: Path | None,
        shared: Path,
        also: Sequence[Path] = (),
    ) -> Texts:
        """Caches all of these texts, with one load of the encoder at most: captions and prompts in `folder`.

        The `negative` prompt, a text or an embedding file, and those in the files `also` are kept in `shared`.
        """
        own, common = self.cache(folder), self.cache(shared)
        embedded = negative is not None and negative.suffix == ".safetensors"
        away = None if negative is None or embedded else read_prompt(negative)
        self.fill({own: [*captions, *prompts], common: [*map(read_prompt, also), *([] if away is None else [away])]})
        rows = [(prompt, own.load(prompt)) for prompt in prompts]
        if negative is None:
            return Texts(own, rows, None)
        vector = load_embedding(negative) if embedded else common.load(away)
        return Texts(own, rows, vector.to(self.device))

    def _require_differences(self, wanted: Mapping[TextCache, Sequence[str]]) -> None:
        """Raises UserError where two captions embed identically, as by an encoder whose embeddings are zero."""
        for cache, captions in wanted.items():
            whole = (
                caption for caption in dict.fromkeys(captions) if len(cache.load(caption)) < text_length(self.folder)
            )
            pair = list(itertools.islice(whole, 2))
            if len(pair) == 2 and torch.equal(*map(cache.load, pair)):
                same = f"{pair[0][:40]!r} and {pair[1][:40]!r} have the same embedding"
                remedy = f"replace its file and remove {cache.folder}"
                raise UserError(f"{same}: the text encoder in {self.folder} is damaged\n{remedy}")

    def _tell_cut(self, cache: TextCache, captions: Sequence[str]) -> None:
        length = text_length(self.folder)
        for caption in captions:
            if len(cache.load(caption)) == length:
                print(f"text: a text fills all {length} tokens of the model, more may be lost: {caption[:40]!r}...")

    def _device(self) -> torch.device:
        if self.device.type != "cuda":
            return self.device
        free, _ = torch.cuda.mem_get_info(self.device)
        needed = int(text_encoder_bytes(self.folder) * HEADROOM)
        if free >= needed:
            return self.device
        sizes = f"{readable_size(free)} free, the text encoder needs {readable_size(needed)}"
        print(f"text: the GPU has {sizes}: on the CPU")
        return torch.device("cpu")


def check_embedding_shape(embedding: Tensor, shape: WanShape, source: str) -> Tensor:
    """The embedding (T, E) unchanged. Raises UserError where the transformer reads another width, or fewer rows."""
    rows, width = embedding.shape
    if width != shape.text_dim or rows > shape.text_len:
        reads = f"the transformer reads up to {shape.text_len} of width {shape.text_dim}"
        raise UserError(f"{source}: {rows} embedding rows of width {width}, but {reads}")
    return embedding


def read_prompt(path: Path) -> str:
    """The prompt in a text file. Raises UserError where it is missing, empty or not UTF-8."""
    try:
        prompt = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt {path}: {error}") from None
    if not prompt:
        raise UserError(f"the prompt file {path} is empty")
    return prompt
