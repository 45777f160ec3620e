"""Names for what an encoder computes, by which caches know whose work they hold."""

import hashlib
from pathlib import Path

import torch

from wan.checkpoints.find import ModelFiles, clip_weights


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


def _fingerprint(settings: str, *paths: Path) -> str:
    """Reads 64 evenly spaced windows of a large file, not all 11 GB; a fine-tuned one differs in every one."""
    digest = hashlib.sha256(settings.encode())
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            if size <= 2**25:
                digest.update(file.read())
                continue
            for window in range(64):
                file.seek(window * (size - 2**16) // 63)
                digest.update(file.read(2**16))
    return digest.hexdigest()[:16]
