"""Small media files for tests."""

import os
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from utils.media.frames import write_video

# Tests that also read other clips, if this variable names a folder of them.
OTHER_CLIPS = sorted(Path(os.environ["WAN_TEST_CLIPS"]).rglob("*.mp4")) if "WAN_TEST_CLIPS" in os.environ else []

CODECS = {
    "h264.mkv": ("libx264", {"bf": "3"}),
    "open_groups.mp4": ("libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=6"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none"}),
    "mpeg4.avi": ("mpeg4", {"bf": "2"}),
    "vp8.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime"}),
}


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


def moving(frames: int = 13, height: int = 48, width: int = 64) -> torch.Tensor:
    """Frames of rising brightness, with a gradient from left to right and from top to bottom: uint8 (F, 3, H, W)."""
    x = torch.linspace(0, 100, width).expand(frames, height, width)
    y = torch.linspace(0, 60, height)[None, :, None].expand(frames, height, width)
    t = torch.linspace(0, 150, frames)[:, None, None].expand(frames, height, width)
    return torch.stack([x + t, y + t, t + 20], dim=1).byte()


def encode(path: Path, codec: str, pixels: str = "yuv420p", **options: str) -> Path:
    """30 moving, noisy frames of 128x96 with a keyframe at least every 6 frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 96, pixels
        stream.codec_context.gop_size = 6
        noise = torch.randint(0, 40, (1, 3, 96, 128), generator=torch.Generator().manual_seed(0)).byte()
        for frame in (moving(30, 96, 128) + noise).permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)))
        container.mux(stream.encode())
    return path


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def remux(source: Path, target: Path, container: str | None = None, **options: str) -> Path:
    """The same packets in another container, or in the same one with other options."""
    with av.open(str(source)) as inside, av.open(str(target), "w", container, options) as outside:
        stream = inside.streams.video[0]
        copied = outside.add_stream_from_template(stream)
        for packet in inside.demux(stream):
            if packet.dts is not None:
                packet.stream = copied
                outside.mux(packet)
    return target
