#!/usr/bin/env python
"""Generate a video with a LoRA, to see what it has learned.

    python test_wan_control_lora.py --lora_path wan-lora-00001000.safetensors --prompt "a fox in snow" --compare
    python test_wan_control_lora.py --lora_path fox_high_noise.safetensors fox_low_noise.safetensors --image fox.png
    python test_wan_control_lora.py --lora_path control.safetensors --input_video small.mp4

The story: the LoRA names its base model; text, given frames, control and noise are prepared; the transformer samples,
with --compare first without the LoRA; the VAE decodes; an mp4 and a contact sheet are written.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.beside import Chosen
from utils.adapters.choosing import FusedBase, choose_loras, find_fused_base, leave_out_fused_base
from utils.adapters.lora_file import LoraFile
from utils.adapters.lora_reader import read_lora
from utils.adapters.pairs import find_pair
from utils.adapters.wantraining import TEST_SCRIPT
from utils.common.console import say
from utils.common.decisions import Decisions
from utils.common.device import explain_out_of_memory, pick_device
from utils.common.errors import RunError, UserError
from utils.common.files import check_writable
from utils.common.formatting import counted
from utils.common.options import Replaced, option, parse_options, run_script
from utils.common.temp_rng import MAX_SEED
from utils.common.tensors import map_tensors
from utils.data.buckets import bucket_size, picture_size
from utils.diffusion.flow import seeded_noise
from utils.encoding.conditioning import Cond, Encoders, to_pixels, to_unit_range
from utils.encoding.pictures import check_pictures, load_picture, load_pictures
from utils.encoding.samples import LatentEncoding
from utils.encoding.sampling import Transformers, denoise
from utils.encoding.text import TextEncoding, check_embedding_shape, negative_prompt_file, read_prompt
from utils.encoding.text_cache import load_embedding
from utils.media.contact_sheet import contact_sheet
from utils.media.controls import CONTROL_TYPES, FROM_FILE, make_control
from utils.media.description import MediaInfo
from utils.media.frames import crop_and_resize, read_frames, save_image, write_video
from utils.media.probing import probe
from utils.setup.base import base_remarks, find_base
from utils.setup.model import SingleFiles, need_experts, open_given
from utils.storage.weights import StorageOptions
from utils.training.attention import SamplingAttention
from wan.checkpoints import CheckpointError, ModelFiles
from wan.configs import Family, Grid
from wan.text2video import Sampler
from wan.utils.fm_solvers import SOLVERS

BASE_RES = 624  # of the video that follows an input video, unless a size is given

# ------------------------------------------------------------------------------------------------------------ options


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
    steps: int | None = option(None, "sampling steps (default: the model's)", minimum=1)
    guidance: tuple[float, ...] = option(
        (),
        "classifier-free guidance, 1: none; two: of the high and the low expert (default: the model's)",
        minimum=0,
        aliases=("cfg",),
    )
    shift: float | None = option(None, "shift of the noise levels (default: the model's)", minimum=0.01)
    solver: str = option("unipc", "solver of the sampling steps; lcm: for models distilled into few", choices=SOLVERS)
    seed: int = option(42, "seed of the noise", minimum=0, maximum=MAX_SEED)
    strength: float = option(1.0, "strength of the LoRA")
    compare: bool = option(False, "also generate without the LoRA, from the same noise, side by side")
    output_dir: Path = option(Path("outputs/samples"), "where the mp4 and the contact sheet are written")


@dataclass(frozen=True)
class Options(Content, SingleFiles, Sampling, SamplingAttention, StorageOptions):
    """Generate a video with a LoRA."""

    def __post_init__(self) -> None:
        if self.prompt is not None and self.embedding is not None:
            raise UserError("--prompt and --embedding exclude each other: an embedding is an encoded prompt")
        if self.negative_prompt is not None and self.negative_embedding is not None:
            raise UserError("--negative_prompt and --negative_embedding exclude each other: give one of them")
        if self.fuse_lora and self.without_fused:
            raise UserError("--fuse_lora and --without_fused exclude each other: give one of them")


@dataclass(frozen=True)
class Request:
    """What is generated, with everything decided that the options left open."""

    text: str | Path  # a prompt, or the file of its embedding
    negative: str | Path
    width: int
    height: int
    frames: int
    sampler: Sampler
    seed: int
    pictures: Sequence[Path]  # one for each frame that the model is given, or none
    input_video: Path | None
    control_type: str


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    if not opts.lora_path:
        raise UserError("--lora_path is missing: the LoRA file to try")
    path = next(iter(find_pair(opts.lora_path[0]).values()), opts.lora_path[0])
    first, is_default = read_lora(path), opts.pretrained_model_name_or_path is None
    if is_default:
        opts = replace(opts, **find_base(opts, path, first.metadata))
    files = open_given(opts, opts.pretrained_model_name_or_path, is_default)
    need_experts(files, (), with_others=True)
    opts.check_storage(files.shape.num_layers)
    opts.check_attention(pick_device(), is_fp32=opts.weight_dtype == "fp32")
    request = complete(opts, first, files.family)
    del first  # its matrices are read again where they are needed
    for remark in base_remarks(files, opts.lora_path):
        say(remark)
    if opts.without_fused:
        fused = leave_out_fused_base(opts.lora_path, files)
    else:
        fused = find_fused_base(opts.lora_path, opts.fuse_lora, files)
    loras = choose_loras(opts.lora_path, opts.strength, opts.also_lora, files, fused)
    if request.input_video is None and any(chosen.lora.input_shapes for each in loras.values() for chosen in each):
        raise UserError("--also_lora holds a control LoRA: give it as --lora_path, with --input_video")
    check_writable(opts.output_dir)
    say(f"{describe(request, opts.strength)}{fused.describe(opts.compare)}")
    with explain_out_of_memory(), torch.no_grad():
        videos = generate(request, opts, loras, fused, files)
    without = "_without_fused" if opts.without_fused else ""
    write(opts.output_dir, f"{opts.lora_path[0].stem}{without}_seed{opts.seed}", videos, files.family.fps)


# --------------------------------------------------------------------------------------------------------- the request


def complete(opts: Options, first: LoraFile, family: Family) -> Request:
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
    guidance = opts.guidance or family.guidance
    if len(guidance) not in (1, len(family.experts)):
        raise UserError(
            f"--guidance has {len(guidance)} values, but the model {counted(len(family.experts), 'expert')}"
        )
    negative: str | Path | None = opts.negative_embedding or opts.negative_prompt
    width, height = fill_in_side(opts.width, opts.height, (width, height), family.grid)
    shift, steps = opts.shift or family.shift_at(width, height), opts.steps or family.steps
    request = Request(
        text=opts.embedding or opts.prompt or "",
        negative=read_prompt(negative_prompt_file(family)) if negative is None else negative,
        width=width,
        height=height,
        frames=opts.frames or frames,
        sampler=Sampler(opts.solver, steps, guidance, shift, family.boundaries, (opts.seed,)),
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


def describe(request: Request, strength: float) -> str:
    """What is about to be generated, including what was left open: it decides the result too."""
    sampler = request.sampler
    guidance = " and ".join(f"{value:g}" for value in sampler.guidance)
    given = "".join(f", from {picture}" for picture in request.pictures)
    followed = f", following {request.input_video} ({request.control_type})" if request.input_video else ""
    return (
        f"{request.width}x{request.height}, {counted(request.frames, 'frame')}, {counted(sampler.steps, 'step')} of "
        f"{sampler.solver}, guidance {guidance}, shift {sampler.shift:g}, seed {request.seed}, "
        f"strength {strength:g}{given}{followed}"
    )


# ---------------------------------------------------------------------------------------------------------- generation


def generate(
    request: Request,
    opts: Options,
    loras: Mapping[str, Sequence[Chosen]],
    fused: FusedBase,
    files: ModelFiles,
) -> dict[str, Tensor]:
    """Videos (F, 3, H, W) uint8 by label: the control if there is one, without the LoRA if asked for, and with it."""
    # Models are loaded one after another, and only while they are needed: the text encoder alone takes 11 GB.
    device = pick_device()
    text, negative = embed(request, opts, files, device)
    encoders = LatentEncoding(files, device).load()
    control = read_control(request, request.input_video, device) if request.input_video else None
    base, cond = condition(request, encoders, text, control)
    vae = encoders.vae
    del encoders
    noise = seeded_noise((1, *vae.latent_shape(request.frames, request.height, request.width)), request.seed).to(device)

    # Noise and conditions are the same without and with the LoRA, so every difference between the videos is the LoRA's.
    # What it was trained on top of is in both. Only the control is left out without the LoRA: the base model has no
    # input channels for one, unless a control LoRA is in it.
    shape = files.shape
    storage = opts.storage(device, shape, noise[0, 0].numel() // math.prod(shape.patch_size), Decisions(str(device)))
    transformers, latents = Transformers(files, loras, storage, fused.fusions, opts.attention), {}
    base = cond if fused.reads_control else base
    if opts.compare:
        latents["without the LoRA"] = sample(request, transformers, noise, base, negative, "without the LoRA")
    transformers.fuse()
    latents["with the LoRA"] = sample(request, transformers, noise, cond, negative, "with the LoRA")
    transformers.unload()

    videos = {} if control is None else {"control": to_pixels(control)}
    for label, result in latents.items():
        say(f"decoding the video {label}")
        videos[label] = to_pixels(vae.decode(result)[0])
    return videos


def condition(request: Request, encoders: Encoders, text: Tensor, control: Tensor | None) -> tuple[Cond, Cond]:
    """The conditions of the base model, and those with the control; both the same without one."""
    # Given frames are cut and encoded as those of a training clip are. A text-to-video model sees a picture only as the
    # first frame of the control.
    family, size, device = encoders.family, (request.width, request.height), encoders.vae.device
    start = load_picture(request.pictures[0], *size).to(device) if request.pictures and not family.given else None
    pictures = load_pictures(request.pictures, family, *size) if request.pictures and family.given else {}
    pictures = {place: picture.to(device) for place, picture in pictures.items()}
    base = encoders.condition(text, pictures, request.frames)
    cond = base if control is None else encoders.add_control(base, control, start)
    return map_tensors(base, lambda part: part[None]), map_tensors(cond, lambda part: part[None])


def sample(
    request: Request, transformers: Transformers, noise: Tensor, cond: Cond, negative: Tensor | None, label: str
) -> Tensor:
    """Latents (1, C, F, H, W) from the noise. Raises RunError where they are not finite: they would decode to black."""
    progress = partial(tqdm, desc=label, unit="step")
    latents = denoise(request.sampler, transformers.predict, noise, cond, negative, progress)
    if not latents.isfinite().all():
        raise RunError(
            f"the video {label} holds NaN or infinite values: the weights of the base model are damaged, or --strength "
            "or --guidance is too large"
        )
    return latents


def embed(request: Request, opts: Options, files: ModelFiles, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The embeddings (T, E) of the prompt and, where there is guidance, of the negative prompt; new ones are cached."""
    wanted = {"prompt": request.text}
    if request.sampler.is_guided:
        wanted["negative prompt"] = request.negative
    encoding = TextEncoding(files, device, opts.text_encoder_dtype)
    cache = encoding.shared_cache()
    encoding.encode_missing({cache: [text for text in wanted.values() if isinstance(text, str)]})
    rows = {}
    for role, text in wanted.items():
        embedding = cache.load(text) if isinstance(text, str) else load_embedding(text)
        source = f"the {role}" if isinstance(text, str) else str(text)
        rows[role] = check_embedding_shape(embedding, files.shape, source).to(device)
    return rows["prompt"], rows.get("negative prompt")


def read_control(request: Request, path: Path, device: torch.device) -> Tensor:
    """What to follow: (3, F, H, W) in -1..1, made from the beginning of the input video as it was in training."""
    frames = read_frames(path, range(request.frames))
    pixels = crop_and_resize(frames, request.width, request.height).transpose(0, 1)
    return make_control(to_unit_range(pixels.to(device)), request.control_type)


def write(folder: Path, stem: str, videos: dict[str, Tensor], fps: int) -> None:
    """One mp4 with the videos side by side, and a contact sheet with a row for each. Existing files stay."""
    taken = {path.stem for path in folder.glob("*.mp4")}
    name = next(name for name in (stem, *(f"{stem}_{n}" for n in range(2, 10_000))) if name not in taken)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{name}.mp4", torch.cat(list(videos.values()), dim=3), fps)
        save_image(folder / f"{name}.png", contact_sheet(list(videos.items())))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    say(f"wrote {folder / name}.mp4 ({' | '.join(videos)})\nwrote {folder / name}.png")


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))
