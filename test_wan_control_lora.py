#!/usr/bin/env python
"""Generate a video with a LoRA, to see what it has learnt.

    python test_wan_control_lora.py --lora_path wan-lora-00001000.safetensors --prompt "a fox in snow" --compare
    python test_wan_control_lora.py --lora_path control.safetensors --input_video small.mp4

The story: the LoRA names its base model; text, control and noise are prepared; the transformer samples, with
--compare first without the LoRA; the VAE decodes; an mp4 and a contact sheet are written.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.lora import fuse_lora
from utils.adapters.lora_file import LoraFile
from utils.adapters.lora_reader import read_lora
from utils.adapters.wantraining import TEST_SCRIPT
from utils.common.device import compute_dtype, explain_out_of_memory, pick_device
from utils.common.errors import UserError
from utils.common.files import check_writable
from utils.common.formatting import counted
from utils.common.options import Replaced, option, parse_options, run_script
from utils.data.buckets import bucket_size
from utils.diffusion.flow import seeded_noise
from utils.encoding.conditioning import Cond, encode_video, make_predict, replace_text, to_pixels, to_unit_range
from utils.encoding.text import EMBEDDINGS, TextEncoding, check_embedding_shape, read_prompt
from utils.encoding.text_cache import load_embedding
from utils.media.contact_sheet import contact_sheet
from utils.media.controls import CONTROL_TYPES, FROM_FILE, make_control
from utils.media.frames import crop_and_resize, read_frames, save_image, write_video
from utils.media.probing import MediaInfo, probe
from utils.setup.download import suggest_download
from wan.checkpoints import CheckpointError, ModelFiles, build_transformer, load_transformer, load_vae, open_model
from wan.configs import Family, Grid
from wan.text2video import Sampler
from wan.utils.fm_solvers import SOLVERS

# ------------------------------------------------------------------------------------------------------------ options


@dataclass(frozen=True)
class Source:
    """what to generate"""

    replaced: ClassVar[Replaced] = TEST_SCRIPT
    lora_path: Path | None = option(
        None, "LoRA file: from training, converted, or in another tool's format", aliases=("lora",)
    )
    pretrained_model_name_or_path: str | None = option(None, "base model (default: the one the LoRA names)")
    prompt: str | None = option(None, "what to show (default: nothing in particular)")
    embedding: Path | None = option(None, "text embedding file to use instead of --prompt")
    negative_prompt: str | None = option(None, "what not to show (default: the model's own)")
    negative_embedding: Path | None = option(None, "text embedding file to use instead of --negative_prompt")
    input_video: Path | None = option(None, "video or image that a control LoRA follows", aliases=("control_video",))
    control_type: str | None = option(
        None,
        "how it becomes the control (default: as trained)",
        choices=(*CONTROL_TYPES, FROM_FILE),
        requires="input_video",
    )


@dataclass(frozen=True)
class Sampling:
    """how"""

    width: int | None = option(None, "multiple of 16 (default: the model's, or near the input video's)", minimum=16)
    height: int | None = option(None, "multiple of 16", minimum=16)
    frames: int | None = option(None, "4n + 1 (default: the model's, or what the input video has)", minimum=1)
    steps: int | None = option(None, "sampling steps (default: the model's)", minimum=1)
    guidance: float | None = option(
        None, "classifier-free guidance, 1: none (default: the model's)", minimum=0, aliases=("cfg",)
    )
    shift: float | None = option(None, "shift of the noise levels (default: the model's)", minimum=0.01)
    solver: str = option("unipc", "how the steps are taken", choices=SOLVERS)
    seed: int = option(42, "seed of the noise", minimum=0, maximum=2**32 - 1)
    strength: float = option(1.0, "strength of the LoRA")
    compare: bool = option(False, "generate without the LoRA too, from the same noise, side by side")
    output_dir: Path = option(Path("outputs/samples"), "where the mp4 and the contact sheet are written")


@dataclass(frozen=True)
class Options(Source, Sampling):
    """Generate a video with a LoRA."""


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    if opts.lora_path is None:
        raise UserError("--lora_path is missing: the LoRA file to try")
    lora = read_lora(opts.lora_path)
    name = opts.pretrained_model_name_or_path or lora.metadata.get("base_model")
    if not name:
        raise UserError(f"{opts.lora_path} does not name its base model; pass --pretrained_model_name_or_path")
    with suggest_download():
        files = open_model(name)
    opts = complete(opts, lora, files.family)
    check_writable(opts.output_dir)
    # A rehearsal without weights: a LoRA that does not fit should not cost the minutes of loading.
    fuse_lora(build_transformer(files.transformer), lora)
    print(describe(opts))
    with explain_out_of_memory(), torch.no_grad():
        generate(opts, lora, files)


# --------------------------------------------------------------------------------------------------------- the request


def complete(opts: Options, lora: LoraFile, config: Family) -> Options:
    """Fills in what was left open: from the input video, from the LoRA's metadata, from the model's own settings."""
    size, frames, grid = config.size, config.frames, config.grid
    if opts.prompt is not None and opts.embedding is not None:
        raise UserError("--prompt and --embedding exclude each other: an embedding is a prompt that is encoded already")
    if opts.negative_prompt is not None and opts.negative_embedding is not None:
        raise UserError("--negative_prompt and --negative_embedding exclude each other: give one of them")
    if bool(lora.input_shapes) != (opts.input_video is not None):
        raise UserError(
            "this is a control LoRA: pass the video to follow as --input_video"
            if lora.input_shapes
            else f"{opts.lora_path} is not a control LoRA: it cannot follow --input_video"
        )
    if opts.input_video is not None:
        info = probe(opts.input_video)
        size, frames = bucket_size(info.width, info.height, 624, grid), min(frames, usable_frames(info, grid))
    opts = replace(
        opts,
        width=opts.width or size[0],
        height=opts.height or size[1],
        frames=opts.frames or frames,
        steps=opts.steps or config.steps,
        guidance=config.guidance if opts.guidance is None else opts.guidance,
        shift=opts.shift or config.shift,
        control_type=opts.control_type or lora.metadata.get("control") or "tile",
        negative_prompt=read_prompt(EMBEDDINGS / config.negative_prompt)
        if opts.negative_prompt is None
        else opts.negative_prompt,
    )
    step, side = grid.frame, grid.side
    if opts.width % side or opts.height % side:
        raise UserError(f"--width {opts.width} and --height {opts.height} must be multiples of {side}")
    if opts.control_type not in (*CONTROL_TYPES, FROM_FILE):
        made = f"the LoRA follows {opts.control_type!r}, which cannot be made here"
        raise UserError(f"{made}; pass a video of it and --control_type {FROM_FILE}")
    if opts.frames % step != 1:
        raise UserError(f"--frames {opts.frames} must be {step}n + 1, like {opts.frames // step * step + 1}")
    if opts.input_video is not None and opts.frames > usable_frames(info, grid):
        raise UserError(f"{opts.input_video} has {info.frames} frames, too few for --frames {opts.frames}")
    return opts


def describe(opts: Options) -> str:
    """What is about to be generated: what was left open is told too, because it decides the result."""
    followed = f", following {opts.input_video} ({opts.control_type})" if opts.input_video else ""
    return (
        f"{opts.width}x{opts.height}, {counted(opts.frames, 'frame')}, {counted(opts.steps, 'step')} of {opts.solver}, "
        f"guidance {opts.guidance:g}, shift {opts.shift:g}, seed {opts.seed}, strength {opts.strength:g}{followed}"
    )


def usable_frames(info: MediaInfo, grid: Grid) -> int:
    """The frames of a control video that fit the model: 4n + 1."""
    return (info.frames - 1) // grid.frame * grid.frame + 1


# ---------------------------------------------------------------------------------------------------------- generation


def generate(opts: Options, lora: LoraFile, files: ModelFiles) -> None:
    """From the request to files; models are loaded one after another, and only while they are needed."""
    device = pick_device()
    text, negative = embed(opts, files, device)
    vae = load_vae(files, device)
    control = read_control(opts, device) if opts.input_video else None
    cond = Cond(text[None], None if control is None else encode_video(control, vae)[None])
    shape = (1, *vae.latent_shape(opts.frames, opts.height, opts.width))
    noise = seeded_noise(shape, opts.seed).to(device)

    progress = partial(tqdm, desc="loading the transformer", unit="tensor", leave=False)
    model = load_transformer(files.transformer, compute_dtype(device), device, progress)
    denoise = Sampler(opts.solver, opts.steps, opts.guidance, opts.shift).denoise
    latents = {}
    if opts.compare:
        free = replace(cond, channels=None)  # the base model has no channels for control
        progress = partial(tqdm, desc="without the LoRA", unit="step")
        uncond = None if negative is None else replace_text(free, negative)
        latents["without the LoRA"] = denoise(make_predict(model), noise, free, uncond, progress)
    fuse_lora(model, lora, opts.strength)
    progress = partial(tqdm, desc="with the LoRA", unit="step")
    uncond = None if negative is None else replace_text(cond, negative)
    latents["with the LoRA"] = denoise(make_predict(model), noise, cond, uncond, progress)
    del model

    videos = {} if control is None else {"control": to_pixels(control)}
    for label, result in latents.items():
        print(f"decoding the video {label}")
        videos[label] = to_pixels(vae.decode(result)[0])
    write(opts, videos, files.family.fps)


def embed(opts: Options, files: ModelFiles, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The embeddings (T, E) of the prompt and, where there is guidance, of the negative prompt.

    What has to be encoded for them is cached beside the script.
    """
    rows, prompts, wan = {}, {}, files.transformer.shape
    if opts.embedding is not None:
        rows["text"] = check_embedding_shape(load_embedding(opts.embedding), wan, str(opts.embedding))
    else:
        prompts["text"] = opts.prompt or ""
    if opts.guidance != 1 and opts.negative_embedding is not None:
        embedding = load_embedding(opts.negative_embedding)
        rows["negative"] = check_embedding_shape(embedding, wan, str(opts.negative_embedding))
    elif opts.guidance != 1:
        prompts["negative"] = opts.negative_prompt
    stage = TextEncoding(files, device)
    cache = stage.cache(EMBEDDINGS)
    stage.encode_missing({cache: list(prompts.values())})
    rows |= {
        role: check_embedding_shape(cache.load(prompt), wan, f"the {role} prompt") for role, prompt in prompts.items()
    }
    negative = rows["negative"].to(device) if "negative" in rows else None
    return rows["text"].to(device), negative


def read_control(opts: Options, device: torch.device) -> Tensor:
    """What to follow: (3, F, H, W) in -1..1, made from the beginning of the input video as it was in training."""
    frames = read_frames(opts.input_video, range(opts.frames))
    pixels = crop_and_resize(frames, opts.width, opts.height).transpose(0, 1)
    return make_control(to_unit_range(pixels.to(device)), opts.control_type)


def write(opts: Options, videos: dict[str, Tensor], fps: int) -> None:
    """One mp4, several videos side by side, and a contact sheet with a row for each."""
    stem = f"{opts.lora_path.stem}_seed{opts.seed}"
    taken = {path.stem for path in opts.output_dir.glob("*.mp4")}
    name = next(name for name in (stem, *(f"{stem}_{n}" for n in range(2, 10_000))) if name not in taken)
    try:
        opts.output_dir.mkdir(parents=True, exist_ok=True)
        write_video(opts.output_dir / f"{name}.mp4", torch.cat(list(videos.values()), dim=3), fps)
        save_image(opts.output_dir / f"{name}.png", contact_sheet(list(videos.items())))
    except OSError as error:
        raise UserError(f"cannot write to {opts.output_dir}: {error.strerror}") from None
    print(f"wrote {opts.output_dir / name}.mp4 ({' | '.join(videos)})\nwrote {opts.output_dir / name}.png")


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))
