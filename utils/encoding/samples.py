"""How planned samples become batches on the device: through the VAE at every step, or from the cache.

Both have the same face: `load(window)` runs in worker processes, `batch(samples)` in the training loop.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from utils.common.formatting import readable_size
from utils.data.loading import Clip, load_ahead, load_clip
from utils.data.plan import Window
from utils.encoding.conditioning import Batch, Encoded, collate, encode_clip
from utils.encoding.latent_cache import LatentCache, latent_bytes
from utils.encoding.text_cache import TextCache
from wan.checkpoints import load_vae, vae_fingerprint
from wan.modules.vae import WanVAE


@dataclass(frozen=True)
class FreshSamples:
    """Clips are encoded when they are trained on; `control` names what is made from them, if anything."""

    vae: WanVAE
    texts: TextCache
    control: str | None

    def load(self, window: Window) -> Clip:
        return load_clip(window)

    def batch(self, clips: Sequence[Clip]) -> Batch:
        """Pixels and captions become latents and text on the VAE's device."""
        texts = (self.texts.load(clip.caption) for clip in clips)
        return collate(
            [encode_clip(clip, text, self.vae, self.control) for clip, text in zip(clips, texts, strict=True)]
        )


@dataclass(frozen=True)
class CachedSamples:
    """Clips were encoded before: neither the VAE nor the text encoder is needed."""

    latents: LatentCache
    texts: TextCache
    device: torch.device

    def load(self, window: Window) -> Encoded:
        return Encoded(text=self.texts.load(window.caption), **self.latents.load(window))

    def batch(self, samples: Sequence[Encoded]) -> Batch:
        return collate([sample.to(self.device) for sample in samples])


@dataclass(frozen=True)
class LatentEncoding:
    """The VAE of a model folder, not loaded, and what is made from each clip for it to follow, if anything."""

    folder: Path
    device: torch.device
    control: str | None

    def fill(self, root: Path, windows: Sequence[Window], num_workers: int) -> LatentCache:
        """Encodes what the cache under `root` lacks of these windows, and says so.

        Raises UserError where the disk is too small, and as loading clips does.
        """
        cache = LatentCache(root, vae_fingerprint(self.folder, torch.float32), self.control)
        missing = cache.missing(windows)
        known = len({cache.path(window) for window in windows}) - len(missing)
        print(f"latents: {len(missing)} to encode, {known} cached")
        if missing:
            vae = load_vae(self.folder, self.device)
            sides = 1 + (self.control is not None)
            size = latent_bytes(missing, sides * vae.z_dim)
            cache.check_disk_space(size)
            print(f"latents: writing {readable_size(size)} to {cache.folder}")
            self._encode(cache, vae, missing, num_workers)
        return cache

    def _encode(self, cache: LatentCache, vae: WanVAE, missing: Sequence[Window], num_workers: int) -> None:
        with closing(load_ahead([(window,) for window in missing], load_clip, num_workers)) as stream:
            watched = tqdm(stream, "encoding latents", len(missing), unit="clip")
            for window, (clip,) in zip(missing, watched, strict=True):
                encoded = encode_clip(clip, torch.empty(0, 0), vae, self.control)
                parts = {"latents": encoded.latents, "channels": encoded.channels, "mask": encoded.mask}
                cache.store(window, {name: part for name, part in parts.items() if part is not None})


Samples = FreshSamples | CachedSamples
