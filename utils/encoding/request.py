"""What is asked of a model: a video of which text, size and length, from what, and how it is sampled.

The options of the test script, and a request in which everything is decided that they leave open.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from utils.adapters.beside import Chosen
from utils.adapters.lora_file import LoraFile
from utils.adapters.stated_steps import Asked, StatedSteps, choose_sampler
from utils.adapters.wantraining import TEST_SCRIPT
from utils.common.errors import UserError
from utils.common.formatting import counted
from utils.common.options import Replaced, option
from utils.common.temp_rng import MAX_SEED
from utils.data.buckets import bucket_size, picture_size
from utils.encoding.pictures import check_pictures
from utils.encoding.text import negative_prompt_file, read_prompt
from utils.media.controls import CONTROL_TYPES, FROM_FILE
from utils.media.description import MediaInfo
from utils.media.probing import probe
from utils.setup.model import SingleFiles
from wan.configs import Family, Grid
from wan.text2video import Sampler
from wan.utils.fm_solvers import LCM, SOLVERS, UNIPC

BASE_RES = 624  # of the video that follows an input video, unless a size is given


@dataclass(frozen=True)
class Content:
    """content"""

    replaced: ClassVar[Replaced] = TEST_SCRIPT
    lora_path: tuple[Path, ...] = option(
        (),
        "LoRA file: from training, converted, or in another tool's format; for two experts HIGH LOW, or the name that "
        "both share",
        aliases=("lora",),
    )
    also_lora: tuple[str, ...] = option(
        (), "further LoRAs, each FILE or FILE:STRENGTH", requires="lora_path", is_path=True
    )
    fuse_lora: tuple[Path, ...] = option(
        (),
        "what the LoRA was trained on top of with --fuse_lora, where that is not found: the very file, "
        "since a converted one has another hash",
        requires="lora_path",
    )
    without_fused: bool = option(False, "sample without what the LoRA was trained on top of", requires="lora_path")
    pretrained_model_name_or_path: str | None = option(
        None, "base model (default: the one the LoRA names, or its run)", is_path=True
    )
    prompt: str | None = option(None, "what to generate (default: an empty prompt)")
    embedding: Path | None = option(None, "text embedding file to use instead of --prompt")
    negative_prompt: str | None = option(None, "what to avoid (default: the model's own negative prompt)")
    negative_embedding: Path | None = option(None, "text embedding file to use instead of --negative_prompt")
    image: Path | None = option(None, "picture that the video starts from, for models that are given one")
    last_image: Path | None = option(None, "picture that the video ends with", requires="image")
    input_video: Path | None = option(None, "video or image that a control LoRA follows", aliases=("control_video",))
    control_type: str | None = option(
        None,
        "how the input becomes the control; file: it is the control (default: as trained)",
        choices=(*CONTROL_TYPES, FROM_FILE),
        requires="input_video",
    )


@dataclass(frozen=True)
class Sampling:
    """sampling"""

    width: int | None = option(
        None, "multiple of 16 or 32 (default: the model's, or by the shape of the picture or input video)", minimum=16
    )
    height: int | None = option(None, "multiple of 16 or 32", minimum=16)
    frames: int | None = option(None, "4n + 1 (default: the model's, or what the input video has)", minimum=1)
    steps: int | None = option(
        None, "sampling steps (default: the model's, or those that a LoRA was distilled into)", minimum=1
    )
    guidance: tuple[float, ...] = option(
        (),
        "classifier-free guidance, 1: none; two: of the high and the low expert (default: the model's; 1 with a LoRA "
        "that was distilled into few steps)",
        minimum=0,
        aliases=("cfg",),
    )
    shift: float | None = option(
        None,
        "shift of the noise levels (default: the model's, or what a LoRA distilled into few steps states)",
        minimum=0.01,
    )
    solver: str | None = option(
        None,
        f"solver of the sampling steps (default: {UNIPC}, or {LCM} with a LoRA that was distilled into few)",
        choices=SOLVERS,
    )
    seed: int = option(42, "seed of the noise", minimum=0, maximum=MAX_SEED)
    strength: float = option(1.0, "strength of the LoRA")
    compare: bool = option(False, "also generate without the LoRA, from the same noise, side by side")
    check_lora: bool = option(
        False,
        "does the LoRA survive beside that of --also_lora, which samples in few steps? Says what both change, and "
        "shows the base model, each alone, and both. --steps, --solver, --guidance and --shift are for what has the "
        "other LoRA; the rest is sampled as the model is",
        requires="also_lora",
    )
    output_dir: Path = option(Path("outputs/samples"), "where the mp4 and the contact sheet are written")

    def sampler(self, family: Family, size: tuple[int, int], stated: Sequence[StatedSteps] = ()) -> Sampler:
        """As the family is sampled at this (width, height), or as LoRAs that were distilled into few steps state.

        Options override both. Raises UserError as `choose_sampler` does.
        """
        shift = family.shift_at(*size)
        usual = Sampler(UNIPC, family.steps, family.guidance, shift, family.boundaries, (self.seed,))
        return choose_sampler(usual, Asked(self.steps, self.solver, self.guidance, self.shift), stated)


@dataclass(frozen=True)
class RequestOptions(Content, SingleFiles, Sampling):
    """what is generated"""

    def __post_init__(self) -> None:
        if self.prompt is not None and self.embedding is not None:
            raise UserError("--prompt and --embedding exclude each other: an embedding is an encoded prompt")
        if self.negative_prompt is not None and self.negative_embedding is not None:
            raise UserError("--negative_prompt and --negative_embedding exclude each other: give one of them")
        if self.fuse_lora and self.without_fused:
            raise UserError("--fuse_lora and --without_fused exclude each other: give one of them")
        if self.check_lora and self.compare:
            raise UserError("--check_lora shows the base model too: leave out --compare")


@dataclass(frozen=True)
class Request:
    """What is generated, with everything decided that the options left open, but how it is sampled."""

    text: str | Path  # a prompt, or the file of its embedding
    negative: str | Path
    width: int
    height: int
    frames: int
    seed: int
    pictures: Sequence[Path]  # one for each frame that the model is given, or none
    input_video: Path | None
    control_type: str


@dataclass(frozen=True)
class Version:
    """One of the videos of a request, which differ in their LoRAs, by the names of the transformers."""

    label: str
    loras: Mapping[str, Sequence[Chosen]]
    sampler: Sampler

    @property
    def reads_control(self) -> bool:
        """Whether a LoRA needs a control."""
        return any(chosen.lora.input_shapes for loras in self.loras.values() for chosen in loras)


def complete(opts: RequestOptions, first: LoraFile, family: Family) -> Request:
    """Decides what was left open: by pictures, the input video, the first LoRA's metadata, the model's own settings.

    Raises UserError for what contradicts itself or does not fit the model.
    """
    if first.input_shapes and opts.input_video is None:
        raise UserError("this is a control LoRA: pass the video to follow as --input_video")
    if opts.input_video is not None and not first.input_shapes:
        raise UserError(f"{opts.lora_path[0]} is not a control LoRA: it cannot follow --input_video")
    pictures = [picture for picture in (opts.image, opts.last_image) if picture is not None]
    check_given(pictures, first, family)

    # A video has the shape of the picture that it starts from, and of the video that it follows also the length.
    (width, height), frames = family.size, family.frames
    info = None if opts.input_video is None else probe(opts.input_video)
    if info is not None:
        width, height = bucket_size(info.width, info.height, BASE_RES, family.grid)
        frames = min(frames, usable_frames(info, family.grid))
    elif pictures:
        width, height = picture_size(probe(pictures[0]), width * height, family.grid)
    negative: str | Path | None = opts.negative_embedding or opts.negative_prompt
    width, height = fill_in_side(opts.width, opts.height, (width, height), family.grid)
    request = Request(
        text=opts.embedding or opts.prompt or "",
        negative=read_prompt(negative_prompt_file(family)) if negative is None else negative,
        width=width,
        height=height,
        frames=opts.frames or frames,
        seed=opts.seed,
        pictures=pictures,
        input_video=opts.input_video,
        control_type=opts.control_type or first.metadata.get("control") or "tile",
    )
    check_request(request, family.grid, info)
    return request


def fill_in_side(width: int | None, height: int | None, usual: tuple[int, int], grid: Grid) -> tuple[int, int]:
    """(width, height): those that are given, else the usual ones; one that is given alone keeps the usual shape."""
    if width and not height:
        return width, max(round(width * usual[1] / usual[0] / grid.side), 1) * grid.side
    if height and not width:
        return max(round(height * usual[0] / usual[1] / grid.side), 1) * grid.side, height
    return width or usual[0], height or usual[1]


def check_given(pictures: Sequence[Path], first: LoraFile, family: Family) -> None:
    """Raises UserError unless there are the pictures that the model, or a control LoRA for one without, starts from."""
    if family.given:
        if pictures or family.given_as == "channels":
            names = "--image and --last_image" if len(family.given) > 1 else "--image"
            check_pictures(pictures, family, names)
        return
    if first.metadata.get("control_i2v") and not pictures:
        raise UserError("the LoRA was trained with --control_i2v: pass the picture to start from as --image")
    if len(pictures) > 1 or (pictures and not first.input_shapes):
        raise UserError("--image and --last_image: this is a text-to-video model, which starts from no picture")
    for picture in pictures:
        probe(picture)


def check_request(request: Request, grid: Grid, info: MediaInfo | None) -> None:
    """Raises UserError for sizes that the model does not have, and for a control that cannot be made."""
    if request.width % grid.side or request.height % grid.side:
        sizes = f"--width {request.width} and --height {request.height}"
        raise UserError(f"{sizes} must be multiples of {grid.side}")
    if request.control_type not in (*CONTROL_TYPES, FROM_FILE):
        made = f"the LoRA follows {request.control_type!r}, which cannot be made here"
        raise UserError(f"{made}; pass a video of it and --control_type {FROM_FILE}")
    if request.frames % grid.frame != 1:
        nearest = request.frames // grid.frame * grid.frame + 1
        raise UserError(f"--frames {request.frames} must be {grid.frame}n + 1, like {nearest}")
    if info is not None and request.frames > usable_frames(info, grid):
        raise UserError(f"{request.input_video} has {info.frames} frames, too few for --frames {request.frames}")
    if request.pictures and request.frames == 1:
        raise UserError(f"--frames 1 is the picture itself: give at least {grid.frame + 1}")


def usable_frames(info: MediaInfo, grid: Grid) -> int:
    """The frames of a control video that fit the model: 4n + 1."""
    return (info.frames - 1) // grid.frame * grid.frame + 1


def describe(request: Request, versions: Sequence[Version], strength: float, on_top: str = "") -> str:
    """What is about to be generated, including what was left open: it decides the result too.

    `on_top` ends the sentence: what the LoRA was trained on top of. Versions that are sampled in another way than the
    last one have a line of their own.
    """
    sampler = versions[-1].sampler
    given = "".join(f", from {picture}" for picture in request.pictures)
    followed = f", following {request.input_video} ({request.control_type})" if request.input_video else ""
    others = "".join(f"\n{each.label}: {each.sampler}" for each in versions if each.sampler != sampler)
    return (
        f"{request.width}x{request.height}, {counted(request.frames, 'frame')}, {sampler}, seed {request.seed}, "
        f"strength {strength:g}{given}{followed}{on_top}{others}"
    )
