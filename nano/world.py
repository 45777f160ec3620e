"""The world of Wan-Nano: one flat shape on a plain background, with one of eight motions.

Clips are 64x64 pixels, 17 frames at 16 frames per second. Everything is deterministic for a given seed.
"""

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from utils.media.frames import write_video

SIDE, FRAMES, FPS = 64, 17, 16

COLOURS = {
    "red": (224, 44, 44),
    "green": (48, 176, 72),
    "blue": (52, 92, 232),
    "yellow": (246, 214, 56),
    "purple": (156, 60, 204),
    "cyan": (64, 206, 222),
}
BACKGROUNDS = {
    "black": (18, 18, 22),
    "white": (240, 240, 236),
    "gray": (128, 128, 128),
    "brown": (112, 74, 44),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = {
    "left": ("moves left", "moves to the left", "slides left"),
    "right": ("moves right", "moves to the right", "slides right"),
    "up": ("moves up", "moves to the top", "rises"),
    "down": ("moves down", "moves to the bottom", "falls"),
    "still": ("stays still", "does not move", "rests"),
    "orbiting": ("orbits", "goes round and round", "runs in a ring"),
    "growing": ("grows", "gets bigger", "becomes larger"),
    "shrinking": ("shrinks", "gets smaller", "becomes smaller"),
}
PHRASINGS = (
    "a {colour} {shape} {motion} on a {background} background",
    "on a {background} background a {colour} {shape} {motion}",
    "{background} background, {colour} {shape} that {motion}",
    "the {shape} is {colour}, it {motion}, the background is {background}",
)
COLOURLESS_PHRASINGS = (
    "a {shape} {motion}",
    "a {shape} that {motion}",
    "the {shape} {motion}",
    "there is a {shape}, it {motion}",
)

Colour = Sequence[float]  # red, green, blue on the 0..255 scale


@dataclass(frozen=True)
class Look:
    """The colours of a clip: those of the shape, and of a background that may be a gradient."""

    shape: Colour
    background: Colour
    far_background: Colour  # at the bottom, or at the right if the gradient is horizontal
    sideways: bool = False


@dataclass(frozen=True)
class Style:
    """A look that the base model has never seen, and the trigger word, unknown to it, with which a LoRA learns it."""

    trigger: str
    look: Look


STYLES = {"sunset": Style("kelo", Look(shape=(26, 16, 40), background=(255, 196, 84), far_background=(214, 64, 90)))}
PLAIN_SHARE = 0.35  # of a style's dataset has the world's colours; otherwise the style would affect every prompt
GRADIENT_SHARE = 0.4  # of the clips in arbitrary colours

# A motion that the base models have never seen, and the word, unknown to them, with which a LoRA learns it.
LESSONS = {"leaping": "tavi"}
ROUND_TRIPS = ("orbiting", "leaping")  # motions that end where they begin

STRIDE = 14.0  # pixels from the middle to both ends of a straight motion
ORBIT = 8.0  # radius of the orbit, in pixels
SQUARE = 0.89  # half the side of a square over the radius of a circle of equal area
GROWTH = 1.7  # ratio of the largest radius to the middle one, and of the middle one to the smallest
WITHHELD_SHARE = 0.2  # of all scenes


@dataclass(frozen=True)
class Scene:
    """What a clip shows, in the words of captions and of the probe."""

    shape: str
    colour: str
    background: str
    motion: str


def scenes() -> list[Scene]:
    """Every combination, in a fixed order."""
    return [Scene(*names) for names in itertools.product(SHAPES, COLOURS, BACKGROUNDS, MOTIONS)]


def split() -> tuple[list[Scene], list[Scene]]:
    """The scenes that the base model is trained on, and those withheld from it, each in a fixed random order."""
    shuffled = scenes()
    random.Random(0).shuffle(shuffled)
    count = round(WITHHELD_SHARE * len(shuffled))
    return shuffled[count:], shuffled[:count]


def caption(scene: Scene, rng: random.Random, style: str | None = None) -> str:
    """A caption of a scene in a random phrasing. With a style it names the trigger word instead of the colours."""
    if style is not None:
        return f"{colourless_caption(scene, rng)}, {STYLES[style].trigger} style"
    return _phrased(scene, rng.choice(PHRASINGS), rng)


def colourless_caption(scene: Scene, rng: random.Random) -> str:
    """A caption of a scene's shape and motion in a random phrasing, for clips in arbitrary colours."""
    return _phrased(scene, rng.choice(COLOURLESS_PHRASINGS), rng)


def _phrased(scene: Scene, phrasing: str, rng: random.Random) -> str:
    words = (f"goes {LESSONS[scene.motion]}",) if scene.motion in LESSONS else MOTIONS[scene.motion]
    return phrasing.format(**asdict(scene) | {"motion": rng.choice(words)})


def words() -> list[str]:
    """Every word of the captions, and a few that the caption of a style may need, in alphabetical order."""
    texts = [
        *PHRASINGS,
        *COLOURLESS_PHRASINGS,
        *itertools.chain(*MOTIONS.values()),
        *SHAPES,
        *COLOURS,
        *BACKGROUNDS,
        "in with and of style",
    ]
    return sorted({word for text in texts for word in re.findall(r"(?<!{)\b[a-z]+\b(?!})", text)})


def made_up_word(rng: random.Random) -> str:
    """A meaningless word of two or three syllables, like a trigger word."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))


# ---------------------------------------------------------------------------------------------------------- rendering


@dataclass(frozen=True)
class Track:
    """The path of a shape, in pixels: its middle (F, 2) as x, y and its radius (F,) in every frame."""

    middle: Tensor
    radius: Tensor


def track(motion: str, rng: random.Random, from_middle: bool = False) -> Track:
    """The path of a motion, with slightly random position, size and extent.

    Paths lead through the middle, or around it. Those `from_middle` begin there, all with the same size, so that the
    first frame does not say which motion follows; straight ones are half as long.
    """
    time = torch.linspace(-1, 1, FRAMES)
    reach = rng.uniform(0.9, 1.1)
    place = torch.tensor([SIDE / 2 + rng.uniform(-3, 3), SIDE / 2 + rng.uniform(-3, 3)])
    radius = torch.full((FRAMES,), rng.uniform(11.5, 13.5))
    if motion in ("growing", "shrinking"):
        sign = 1 if motion == "growing" else -1
        exponent = (time + 1) / 2 if from_middle else time
        return Track(place.expand(FRAMES, 2), radius * (GROWTH * reach) ** (sign * exponent))
    offset = _offset(motion, time)
    if from_middle:
        offset = (offset - offset[0]) * (1.0 if motion in ROUND_TRIPS else 0.5)
    return Track(place + reach * offset, radius)


def _offset(motion: str, time: Tensor) -> Tensor:
    """The offset (F, 2) in pixels from the middle of a motion at `time` (F,) in -1..1."""
    rest = torch.zeros_like(time)
    if motion == "orbiting":
        angle = math.pi * time
        return ORBIT * torch.stack([angle.sin(), angle.cos()], dim=1)
    if motion == "leaping":
        return STRIDE * torch.stack([rest, time.square() - 1], dim=1)
    ways = {"left": (-time, rest), "right": (time, rest), "up": (rest, -time), "down": (rest, time)}
    ways["still"] = (rest, rest)
    return STRIDE * torch.stack(ways[motion], dim=1)


def coverage(shape: str, path: Track, margin: float = 0.0) -> Tensor:
    """The share (F, side, side) in 0..1 of each pixel that the shape, grown by `margin` pixels, covers.

    Edges are sharp, with one pixel of antialiasing.
    """
    grid = torch.arange(SIDE) + 0.5
    x = grid[None, None, :] - path.middle[:, 0, None, None]
    y = grid[None, :, None] - path.middle[:, 1, None, None]
    return (0.5 + margin - signed_distance(shape, x, y, path.radius[:, None, None])).clamp(0, 1)


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """The distance in pixels from a shape's outline, negative inside; approximate near corners.

    Shapes of the same radius cover about the same area. Raises ValueError for an unknown shape.
    """
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - SQUARE * radius
    if shape == "triangle":
        slope = 0.5 * math.sqrt(3)
        return torch.maximum(y, slope * x.abs() - 0.5 * y) - 0.78 * radius
    if shape == "cross":
        near, far = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
        return torch.maximum(near - 0.4 * radius, far - 1.2 * radius)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def paint(cover: Tensor, colour: Colour, background: Tensor) -> Tensor:
    """Blends `colour` over a background (3, F, H, W) by `cover` (F, H, W) in 0..1; colours are on the 0..255 scale."""
    return torch.lerp(background, torch.tensor(colour, dtype=torch.float32).view(3, 1, 1, 1), cover)


def backdrop(look: Look) -> Tensor:
    """The background of a look without a shape: (3, F, H, W) fp32 on the 0..255 scale."""
    near, far = (torch.tensor(c, dtype=torch.float32).view(3, 1, 1, 1) for c in (look.background, look.far_background))
    ramp = torch.linspace(0, 1, SIDE)
    ramp = ramp[None, None, None, :] if look.sideways else ramp[None, None, :, None]
    return torch.lerp(near, far, ramp).expand(3, FRAMES, SIDE, SIDE)


def render(scene: Scene, rng: random.Random, style: str | None = None, from_middle: bool = False) -> Tensor:
    """A clip (3, F, H, W) fp32 on the 0..255 scale, in the colours of the scene or of the style."""
    background = BACKGROUNDS[scene.background]
    look = Look(COLOURS[scene.colour], background, background) if style is None else STYLES[style].look
    return _drawn(scene, look, rng, from_middle)


def recoloured(scene: Scene, rng: random.Random, from_middle: bool = False) -> Tensor:
    """A clip (3, F, H, W) like that of `render`, in random colours instead of the scene's."""
    return _drawn(scene, _any_look(rng), rng, from_middle)


def _drawn(scene: Scene, look: Look, rng: random.Random, from_middle: bool) -> Tensor:
    return paint(coverage(scene.shape, track(scene.motion, rng, from_middle)), look.shape, backdrop(look))


def to_frames(clip: Tensor) -> Tensor:
    """Converts a clip (3, F, H, W) on the 0..255 scale to frames (F, 3, H, W) uint8."""
    return clip.round().clamp(0, 255).to(torch.uint8).transpose(0, 1)


def doodle(rng: random.Random) -> Tensor:
    """A clip (3, F, H, W) of what the world never shows: several shapes, rings, other motions. Only the VAE sees it."""
    frames = backdrop(_any_look(rng))
    for _ in range(rng.randint(1, 3)):
        time = torch.linspace(-1, 1, FRAMES)
        start = torch.tensor([rng.uniform(8, SIDE - 8), rng.uniform(8, SIDE - 8)])
        sway = torch.tensor([rng.uniform(-16, 16), rng.uniform(-16, 16)])
        turns = rng.choice((time, (math.pi * rng.uniform(0.5, 3) * time).sin()))
        radius = rng.uniform(4, 20) * rng.uniform(0.6, 1.6) ** time
        path = Track(start + sway * turns[:, None], radius)
        shape = rng.choice(SHAPES)
        cover = coverage(shape, path)
        if rng.random() < 0.3:
            cover = cover - coverage(shape, path, -rng.uniform(2, 5))
        frames = paint(cover, _any_colour(rng), frames)
    return frames


def _any_look(rng: random.Random) -> Look:
    near = _any_colour(rng)
    far = _any_colour(rng) if rng.random() < GRADIENT_SHARE else near
    return Look(_any_colour(rng), near, far, sideways=rng.random() < 0.5)


def _any_colour(rng: random.Random) -> Colour:
    return [rng.uniform(0, 255) for _ in range(3)]


# ------------------------------------------------------------------------------------------------------------ datasets


def write_dataset(
    folder: Path,
    count: int,
    seed: int,
    style: str | None = None,
    motion: str | None = None,
    from_middle: bool = False,
    colourless_share: float = 0.0,
) -> None:
    """Writes a dataset for the trainer: `count` clips as mp4 files, each with its caption in a .txt file.

    With a style, or a `motion` of LESSONS, most clips show it and have its word in their captions; the rest are the
    world's own. Of these the `colourless_share` have any colours, and captions that name none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"dataset {seed}")
    known, _ = split()
    for index in range(count):
        is_lesson = index >= PLAIN_SHARE * count
        shown = style if is_lesson else None
        scene = rng.choice(known)
        if is_lesson and motion is not None:
            scene = replace(scene, motion=motion)
        path = folder / f"{index:03d}.mp4"
        if index < colourless_share * count:
            clip, text = recoloured(scene, rng, from_middle), colourless_caption(scene, rng)
        else:
            clip, text = render(scene, rng, shown, from_middle), caption(scene, rng, shown)
        write_video(path, to_frames(clip), FPS)
        path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
