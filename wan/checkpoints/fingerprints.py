"""Names for what encoders and transformers compute: caches know whose work they hold, and LoRAs what they are for."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from wan.checkpoints.find import ModelFiles, clip_weights
from wan.checkpoints.weights import Weights


def text_encoder_fingerprint(files: ModelFiles, dtype: torch.dtype, format: str | None = None) -> str:
    """Equal for equal weights, tokenizer, text length, dtype and format of quantised weights.

    Reads up to 4 MB of the weights.
    """
    return _fingerprint(
        " ".join([str(files.text_len), str(dtype), *([format] if format else [])]),
        *files.text_encoder.files,
        files.tokenizer / "tokenizer.json",
    )


def vae_fingerprint(files: ModelFiles, dtype: torch.dtype) -> str:
    """Equal for equal weights and dtype."""
    return _fingerprint(f"{dtype}", *files.vae.files)


def vision_fingerprint(files: ModelFiles, dtype: torch.dtype) -> str:
    """Equal for equal weights and dtype. Raises CheckpointError for a model without a vision encoder."""
    return _fingerprint(f"{dtype}", *clip_weights(files).files)


def transformer_fingerprint(files: Weights) -> str:
    """Equal for equal files, whatever they are called and wherever they are: 16 hex digits.

    The same weights in another layout or precision are other files. Reads up to 4 MB of each.
    """
    contents = [hashlib.sha256(b"".join(_windows(path))).digest() for path in files.files]
    return hashlib.sha256(b"".join(sorted(contents))).hexdigest()[:16]


def _fingerprint(settings: str, *paths: Path) -> str:
    digest = hashlib.sha256(settings.encode())
    for path in paths:
        digest.update(f"{path.name} ".encode())
        for part in _windows(path):
            digest.update(part)
    return digest.hexdigest()[:16]


def _windows(path: Path) -> Iterator[bytes]:
    """A file's size, and 64 evenly spaced windows of a large one, not all 11 GB: a fine-tuned one differs in each."""
    size = path.stat().st_size
    yield f"{size}".encode()
    with path.open("rb") as file:
        if size <= 2**25:
            yield file.read()
            return
        for window in range(64):
            file.seek(window * (size - 2**16) // 63)
            yield file.read(2**16)
