#!/usr/bin/env python
"""Generate a video with a LoRA, to see what it has learned.

    python test_wan_control_lora.py --lora_path wan-lora-00001000.safetensors --prompt "a fox in snow" --compare
    python test_wan_control_lora.py --lora_path fox_high_noise.safetensors fox_low_noise.safetensors --image fox.png
    python test_wan_control_lora.py --lora_path control.safetensors --input_video small.mp4
    python test_wan_control_lora.py --lora_path fox.safetensors --also_lora speed.safetensors --check_lora

The story: the LoRA names its base model; text, given frames, control and noise are prepared; the transformer samples,
with --compare first without the LoRA, with --check_lora also with another one and with both; the VAE decodes; an mp4
and a contact sheet are written.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils.adapters.beside import Chosen
from utils.adapters.choosing import FusedBase, choose_loras, find_fused_base, leave_out_fused_base, split_loras
from utils.adapters.lora_reader import read_lora
from utils.adapters.overlap_report import reports
from utils.adapters.pairs import find_pair
from utils.adapters.stated_steps import statements
from utils.common.console import say
from utils.common.decisions import Decisions
from utils.common.device import explain_out_of_memory, pick_device
from utils.common.errors import RunError, UserError
from utils.common.files import check_writable
from utils.common.options import parse_options, run_script
from utils.common.tensors import map_tensors
from utils.diffusion.flow import seeded_noise
from utils.encoding.conditioning import Cond, Encoders, to_pixels, to_unit_range
from utils.encoding.pictures import load_picture, load_pictures
from utils.encoding.request import Request, RequestOptions, Version, complete, describe
from utils.encoding.samples import LatentEncoding
from utils.encoding.sampling import Transformers, denoise
from utils.encoding.text import TextEncoding, check_embedding_shape
from utils.encoding.text_cache import load_embedding
from utils.media.contact_sheet import column_sheet, contact_sheet
from utils.media.controls import make_control
from utils.media.frames import crop_and_resize, read_frames, save_image, write_video
from utils.setup.base import base_remarks, find_base
from utils.setup.model import need_experts, open_given
from utils.storage.weights import StorageOptions
from utils.training.attention import SamplingAttention
from wan.checkpoints import CheckpointError, ModelFiles
from wan.configs import Family


@dataclass(frozen=True)
class Options(RequestOptions, SamplingAttention, StorageOptions):
    """Generate a video with a LoRA."""


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    if not opts.lora_path:
        raise UserError("--lora_path is missing: the LoRA file to try")
    path = next(iter(find_pair(opts.lora_path[0]).values()), opts.lora_path[0])
    first, is_default = read_lora(path), opts.pretrained_model_name_or_path is None
    if is_default:
        opts = replace(opts, **find_base(opts, path, first.metadata))
    files = open_given(opts, opts.pretrained_model_name_or_path, is_default)
    need_experts(files, (), ["sampling"])
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
    versions = plan_versions(opts, request, loras, files.family)
    if request.input_video is None and versions[-1].reads_control:
        raise UserError("--also_lora holds a control LoRA: give it as --lora_path, with --input_video")
    check_writable(opts.output_dir)
    if opts.check_lora:
        own, others = split_loras(loras, opts.lora_path)
        for text in reports(own, others, partial(tqdm, desc="comparing", unit="weight", leave=False)):
            say(f"\n{text}\n")
        if versions[0].sampler == versions[-1].sampler:
            say("note: the LoRA of --also_lora states no steps; if it is for few: --steps 4 --solver lcm --guidance 1")
    for statement in statements(loras):
        say(str(statement))
    say(describe(request, versions, opts.strength, fused.describe(len(versions) > 1)))
    with explain_out_of_memory(), torch.no_grad():
        videos = generate(request, versions, opts, fused, files)
    stem = f"{opts.lora_path[0].stem}{'_without_fused' * opts.without_fused}{'_check' * opts.check_lora}"
    sheet = (column_sheet if opts.check_lora else contact_sheet)([*videos.items()])
    write(opts.output_dir, f"{stem}_seed{opts.seed}", videos, sheet, files.family.fps)


def plan_versions(
    opts: Options, request: Request, loras: Mapping[str, Sequence[Chosen]], family: Family
) -> list[Version]:
    """The videos to generate, in their order, each sampled as its LoRAs state, or else as the model is."""
    size = request.width, request.height
    as_stated = opts.sampler(family, size, statements(loras))
    if not opts.check_lora:
        base = [Version("without the LoRA", {}, opts.sampler(family, size))] if opts.compare else []
        return [*base, Version("with the LoRA", loras, as_stated)]
    own, others = split_loras(loras, opts.lora_path)
    without = RequestOptions(seed=opts.seed)  # the options of sampling are for the other LoRA
    return [
        Version("base", {}, without.sampler(family, size)),
        Version("LoRA", own, without.sampler(family, size, statements(own))),
        Version("other LoRA", others, as_stated),
        Version("both", loras, as_stated),
    ]


def generate(
    request: Request, versions: Sequence[Version], opts: Options, fused: FusedBase, files: ModelFiles
) -> dict[str, Tensor]:
    """Videos (F, 3, H, W) uint8 by label: the control if there is one, and each version."""
    # Models are loaded one after another, and only while they are needed: the text encoder alone takes 11 GB.
    device = pick_device()
    text, negative = embed(request, any(version.sampler.is_guided for version in versions), opts, files, device)
    encoders = LatentEncoding(files, device).load()
    control = read_control(request, request.input_video, device) if request.input_video else None
    base, cond = condition(request, encoders, text, control)
    vae = encoders.vae
    del encoders
    noise = seeded_noise((1, *vae.latent_shape(request.frames, request.height, request.width)), request.seed).to(device)

    # Noise and conditions are the same in all versions, so every difference between the videos is the LoRAs', and that
    # of the steps that these state. What a LoRA was trained on top of is in all. Only the control is left out where no
    # control LoRA is: the base model has no input channels for one.
    shape = files.shape
    storage = opts.storage(device, shape, noise[0, 0].numel() // math.prod(shape.patch_size), Decisions(str(device)))
    transformers, latents = Transformers(files, storage, fused.fusions, opts.attention), {}
    for version in versions:
        transformers.use(version.loras)
        seen = cond if version.reads_control or fused.reads_control else base
        latents[version.label] = sample(version, transformers, noise, seen, negative)
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


def sample(version: Version, transformers: Transformers, noise: Tensor, cond: Cond, negative: Tensor | None) -> Tensor:
    """Latents (1, C, F, H, W) from the noise. Raises RunError where they are not finite: they would decode to black."""
    progress = partial(tqdm, desc=version.label, unit="step")
    latents = denoise(version.sampler, transformers.predict, noise, cond, negative, progress)
    if not latents.isfinite().all():
        raise RunError(
            f"the video {version.label} holds NaN or infinite values: the weights of the base model are damaged, or "
            "--strength or --guidance is too large"
        )
    return latents


def embed(
    request: Request, is_guided: bool, opts: Options, files: ModelFiles, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The embeddings (T, E) of the prompt and, where there is guidance, of the negative prompt; new ones are cached."""
    wanted = {"prompt": request.text}
    if is_guided:
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


def write(folder: Path, stem: str, videos: dict[str, Tensor], sheet: Image.Image, fps: int) -> None:
    """One mp4 with the videos side by side, and a sheet of their frames. Existing files stay."""
    taken = {path.stem for path in folder.glob("*.mp4")}
    name = next(name for name in (stem, *(f"{stem}_{n}" for n in range(2, 10_000))) if name not in taken)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{name}.mp4", torch.cat(list(videos.values()), dim=3), fps)
        save_image(folder / f"{name}.png", sheet)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    say(f"wrote {folder / name}.mp4 ({' | '.join(videos)})\nwrote {folder / name}.png")


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))
