"""Text embeddings on disk: one safetensors file per caption, per text encoder.

    <folder>/<encoder fingerprint>/<hash of the caption>.safetensors       key "context": (T, E)

Only new and edited captions are encoded, because the hash is that of the text. Two encoders never share a file.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from utils.common.errors import UserError
from utils.common.files import replacing
from utils.common.tensor_files import TensorFileError, read_tensors, tensor_names, write_tensors

KEY = "context"
CHUNK = 8


class TextCache:
    """The embeddings of one text encoder under `folder`."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder / fingerprint

    def path(self, caption: str) -> Path:
        return self.folder / f"{hashlib.sha256(caption.encode()).hexdigest()[:32]}.safetensors"

    def missing(self, captions: Iterable[str]) -> list[str]:
        """The captions that have to be encoded, each once, in order: an incomplete file counts as missing."""
        return [caption for caption in dict.fromkeys(captions) if KEY not in tensor_names(self.path(caption))]

    def is_cached_elsewhere(self, caption: str) -> bool:
        """Whether another encoder, or this one in another dtype, has left its rows beside this cache."""
        name = self.path(caption).name
        return any(self.folder.parent.glob(f"*/{name}"))

    def load(self, caption: str) -> Tensor:
        """The rows (T, E) of a caption, on the CPU. Raises UserError if they are not cached."""
        return load_embedding(self.path(caption))

    def prepare(self) -> None:
        """Makes the folder. Raises UserError if it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / "written"):
                pass
            (self.folder / "written").unlink()
        except OSError as error:
            raise self._unwritable(error) from None

    def store(self, captions: list[str], encode: Callable[[list[str]], list[Tensor]]) -> None:
        """Encodes a few captions at a time and writes each atomically, so that an interrupted pass can be resumed."""
        self.prepare()
        try:
            for start in tqdm(range(0, len(captions), CHUNK), desc="encoding captions", disable=len(captions) <= CHUNK):
                chunk = captions[start : start + CHUNK]
                for caption, embedding in zip(chunk, encode(chunk), strict=True):
                    write_tensors(self.path(caption), {KEY: embedding}, {"caption": caption})
        except TensorFileError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: Exception) -> UserError:
        hint = "check its disk space and permissions; --cache_dir moves the cache of captions elsewhere"
        return UserError(f"cannot write text embeddings to {self.folder}: {error}\n{hint}")


def load_embedding(path: Path) -> Tensor:
    """The rows (T, E) of an embedding file, ours or WanTraining's. Raises UserError for any other file."""
    try:
        embedding = read_tensors(path)[0][KEY]
    except (TensorFileError, KeyError) as error:
        raise UserError(f"{path} is not a text embedding (safetensors with a tensor {KEY!r}): {error}") from None
    if embedding.ndim != 2 or not embedding.is_floating_point():
        found = f"{embedding.dtype} of shape {tuple(embedding.shape)}"
        raise UserError(f"{path}: {KEY!r} is {found}, but real numbers (tokens, width) are needed")
    if not embedding.isfinite().all():
        raise UserError(f"{path}: {KEY!r} holds NaN or infinite values: the file is damaged, encode it again")
    return embedding
