"""Small media files for tests."""

from pathlib import Path

import torch
from PIL import Image

from utils.media.frames import write_video


def video(
    path: Path,
    frames: int = 9,
    size: tuple[int, int] = (64, 48),
    caption: str | None = "a clip",
    fps: float = 16,
    darkest: int = 0,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = torch.linspace(darkest, 200, frames)[:, None, None, None] + torch.linspace(0, 50, size[0])
    write_video(path, ramp.expand(frames, 3, size[1], size[0]).byte(), fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def image(path: Path, caption: str | None = "a picture", size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path
