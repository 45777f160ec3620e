"""Prompts to embeddings, through the cache: the text encoder is loaded only if an embedding is missing."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.common.console import say
from utils.common.device import free_memory
from utils.common.errors import UserError
from utils.common.formatting import counted, readable_size
from utils.data.caption_files import is_visible
from utils.encoding.text_cache import TextCache, load_embedding
from utils.storage.weights import Storage, hold_as
from wan.checkpoints import ModelFiles, Place, all_to, build_text_encoder, load_text_encoder, text_encoder_fingerprint
from wan.configs import Family
from wan.modules.model import WanShape

# The prompts that ship with the project, and the cache of their embeddings.
EMBEDDINGS = Path(__file__).resolve().parents[2] / "embeddings"
# The memory a loaded encoder needs, as a multiple of its weights.
HEADROOM = 1.1


@dataclass(frozen=True)
class Texts:
    """The embeddings that a run reads."""

    captions: Callable[[str], Tensor]  # from a caption to its (T, E)
    previews: Sequence[tuple[str, Tensor]]  # prompts with their (T, E)
    negative: Tensor | None  # (T, E), what guidance leads away from: in distillation, and in previews


@dataclass(frozen=True)
class TextEncoding:
    """The text encoder of a model, not loaded: bf16 on a machine with a GPU, as released, and fp32 without.

    Its weights may be `stored` in another way, as `--text_encoder_dtype` says.
    """

    files: ModelFiles
    device: torch.device
    stored: str = "auto"

    @cached_property
    def storage(self) -> Storage:
        return hold_as(self.stored, self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @cached_property
    def fingerprint(self) -> str:
        return text_encoder_fingerprint(self.files, self.dtype, self.storage.format)

    def cache(self, root: Path) -> TextCache:
        """The cache of this encoder's embeddings under `root`."""
        return TextCache(root, self.fingerprint)

    def shared_cache(self) -> TextCache:
        """The cache for prompts that belong to no dataset."""
        return self.cache(EMBEDDINGS)

    def encode_missing(self, wanted: Mapping[TextCache, Sequence[str]]) -> None:
        """Encodes the texts that a cache lacks, and prints how many; loads the encoder once, and only if there are any.

        Raises UserError if a cache cannot be written, or if the encoder gives two texts the same embedding.
        """
        missing = {cache: lacking for cache, texts in wanted.items() if (lacking := cache.missing(texts))}
        count = sum(map(len, missing.values()))
        known = sum(len(set(texts)) for texts in wanted.values()) - count
        counts = f"text: {count} to encode, {known} cached"
        if missing:
            elsewhere = sum(cache.is_cached_elsewhere(text) for cache, texts in missing.items() for text in texts)
            if elsewhere:
                what = "of another text encoder, or with another --text_encoder_dtype"
                say(f"text: {counted(elsewhere, 'embedding')} cached before are {what}: they are not used")
            device = self._choose_device()
            for cache in missing:
                cache.prepare()  # a folder that cannot be written is reported before the encoder loads
            say(f"{counts}; loading the text encoder ({readable_size(self._bytes)}) on {device}")
            self._encode(missing, device)
            # Returned to the driver, because nothing later is as large: memory left reserved would count as used.
            if device.type == "cuda":
                torch.cuda.empty_cache()
        else:
            say(counts)
        self._check_differences(wanted)

    def _encode(self, missing: Mapping[TextCache, list[str]], device: torch.device) -> None:
        encoder = load_text_encoder(self.files, self.dtype, device, partial(self._place_in, device=device))
        cut: list[str] = []

        def encode(texts: list[str]) -> list[Tensor]:
            embeddings = encoder.encode(texts)
            pairs = zip(texts, embeddings, strict=True)
            cut.extend(text for text, embedding in pairs if len(embedding) == self.files.text_len)
            return embeddings

        for cache, texts in missing.items():
            try:
                cache.store(texts, encode)
            except ValueError as error:
                raise UserError(f"{self.files.text_encoder.path}: {error}") from None
        for text in cut:
            full = f"fills all {self.files.text_len} tokens of the model, more may be lost"
            say(f"text: a text {full}: {text[:40]!r}...")

    def _check_differences(self, wanted: Mapping[TextCache, Sequence[str]]) -> None:
        """Raises UserError if two texts have the same embedding: the encoder's token embedding may be zero."""
        for cache, texts in wanted.items():
            # Texts that are cut may well be the same up to there.
            whole = (text for text in dict.fromkeys(texts) if len(cache.load(text)) < self.files.text_len)
            pair = list(itertools.islice(whole, 2))
            if len(pair) == 2 and torch.equal(*map(cache.load, pair)):
                same = f"{pair[0][:40]!r} and {pair[1][:40]!r} have the same embedding"
                remedy = f"replace the file and remove {cache.folder}"
                raise UserError(f"{same}: the text encoder {self.files.text_encoder.path} is damaged\n{remedy}")

    def _place_in(self, encoder: nn.Module, device: torch.device) -> Place:
        storage = replace(self.storage, device=device)
        layers = storage.prepare(encoder)
        return storage.place(layers, all_to, home=lambda _: device)

    @property
    def _bytes(self) -> int:
        return sum(self.storage.sizes(build_text_encoder(self.files.text_encoder), lambda _: False).values())

    def _choose_device(self) -> torch.device:
        """The GPU if there is one with enough free memory, else the CPU."""
        if self.device.type != "cuda":
            return self.device
        free = free_memory()
        needed = int(self._bytes * HEADROOM)
        if free >= needed:
            return self.device
        sizes = f"{readable_size(free)} free, the text encoder needs {readable_size(needed)}"
        say(f"text: the GPU has {sizes}: it runs on the CPU")
        return torch.device("cpu")


def encode_texts(
    encoding: TextEncoding,
    captions: Sequence[str],
    prompts: Sequence[str],
    folder: Path,
    negatives: Sequence[Path],
    others: Sequence[Path] = (),
) -> Texts:
    """Encodes what the caches lack of a run's texts, with one load of the encoder, and returns what the run reads.

    Captions and prompts are cached in `folder`. The negative prompt, at most one, is a text or an embedding file; it is
    cached for all datasets, as are the prompts in the files `others`. Raises UserError as `encode_missing` does, and
    for embeddings that the transformer does not read.
    """
    own, shared = encoding.cache(folder), encoding.shared_cache()
    texts = [read_prompt(path) for path in (*others, *negatives) if not is_embedding(path)]
    encoding.encode_missing({own: [*captions, *prompts], shared: texts})
    previews = [(prompt, own.load(prompt)) for prompt in prompts]
    negative = load_prompt(negatives[0], shared).to(encoding.device) if negatives else None
    shape = encoding.files.shape
    check_embedding_shape(own.load(captions[0]), shape, "the captions")
    if negative is not None:
        check_embedding_shape(negative, shape, "the negative prompt")
    return Texts(own.load, previews, negative)


def negative_prompt_file(family: Family) -> Path:
    """The negative prompt that a family is sampled with unless another one is given."""
    return EMBEDDINGS / family.negative_prompt


def shipped_prompts() -> list[Path]:
    """All prompts that ship with the project."""
    return sorted(EMBEDDINGS.glob("*.txt"))


def check_embedding_shape(embedding: Tensor, shape: WanShape, source: str) -> Tensor:
    """The embedding (T, E) unchanged. Raises UserError if the transformer reads another width, or fewer rows."""
    rows, width = embedding.shape
    if width != shape.text_dim or rows > shape.text_len:
        reads = f"the transformer reads up to {shape.text_len} of width {shape.text_dim}"
        raise UserError(f"{source}: {rows} embedding rows of width {width}, but {reads}")
    return embedding


def is_embedding(path: Path) -> bool:
    """Whether a file given as a prompt is an embedding, not a text."""
    return path.suffix == ".safetensors"


def read_prompt(path: Path) -> str:
    """The prompt in a text file. Raises UserError if it is missing, not UTF-8, or shows nothing."""
    try:
        prompt = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read the prompt {path}: {reason}") from None
    if not is_visible(prompt):
        raise UserError(f"the prompt file {path} is empty")
    return prompt


def load_prompt(path: Path, cache: TextCache) -> Tensor:
    """The rows (T, E) of a prompt file: an embedding file's own, or a text file's from the cache."""
    return load_embedding(path) if is_embedding(path) else cache.load(read_prompt(path))
