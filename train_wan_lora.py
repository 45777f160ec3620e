#!/usr/bin/env python
"""Train a LoRA for a Wan video model on your own clips.

    python train_wan_lora.py --download_model                      once: fetch the base model
    python train_wan_lora.py --cache_embeddings --dataset clips    once per change of captions (optional)
    python train_wan_lora.py --dataset clips                       train

The story, from top to bottom: the options; what is trained on; the text; the model with its adapter; the loop.
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from easydict import EasyDict
from torch import Tensor, nn
from tqdm import tqdm

from utils.atomic import require_writable
from utils.cache import TextCache, load_embedding
from utils.conditioning import Batch, collate, encode_clip, inject_noise, make_predict, with_text
from utils.dataset import Clip, SamplingOptions, batches, load_clip, plan_epoch, validation_windows
from utils.device import compute_dtype, explained_memory, pick_device
from utils.download import download_model
from utils.errors import UserError
from utils.flow import noised
from utils.lora import adapters_off, add_lora, extract_lora, fuse_lora, load_lora, select_modules, widen_patch_embedding
from utils.lora_files import LoraFile, read_lora
from utils.memory import checkpoint_blocks
from utils.objectives import Predict, guided_target, squared_error
from utils.optim import SCHEDULES, OptimizerSpec, Updater
from utils.options import option, parse_options, run_script, to_json
from utils.preflight import Dataset, open_dataset
from utils.preprocess import CONTROL_TYPES
from utils.preview import Preview, make_requests, read_prompts
from utils.report import clip_table, counted
from utils.run import Run, keeping_what_is_learnt
from utils.sampling import Sampler
from utils.text import TextStage, read_prompt, require_fit
from utils.validation import SIGMAS, validation_loss
from wan.checkpoints import CheckpointError, find_model, load_config, load_transformer, load_vae, transformer_layout
from wan.modules.model import WanModel
from wan.modules.vae import WanVAE

EMBEDDINGS = Path(__file__).resolve().parent / "embeddings"
MAX_SEED = 2**32 - 1

# ------------------------------------------------------------------------------------------------------------ options
# A name here is a flag on the command line and a key in --config FILE.toml.


@dataclass(frozen=True)
class Task:
    """what to do"""

    dataset: Path | None = option(None, "folder with your clips and captions; may hold train/ and val/")
    pretrained_model_name_or_path: str = option("Wan-AI/Wan2.1-T2V-1.3B", "model folder, or hub name under ./models/")
    download_model: bool = option(False, "fetch the model's files from the hub into ./models/, then stop")
    cache_embeddings: bool = option(False, "encode all captions and prompts, then stop")
    cache_dir: Path | None = option(None, "where text embeddings are kept (default: .wan_cache in the dataset)")
    output_dir: Path = option(Path("outputs"), "where runs are written, each in its own dated folder")
    config: Path | None = option(None, "TOML file with any of these options; flags win over it")
    seed: int = option(42, "seed of everything random in training", minimum=0, maximum=MAX_SEED)


@dataclass(frozen=True)
class Data:
    """data"""

    base_res: tuple[int, ...] = option((624,), "side of the square of equal area; several: one is drawn per sample")
    token_limit: int = option(10_000, "most tokens per clip, (w/16) * (h/16) * ((frames-1)/4 + 1)", minimum=1)
    max_frame_stride: int = option(2, "each clip takes every 1st to Nth frame, drawn at random", minimum=1)
    random_frame_length: bool = option(False, "draw the number of frames too, up to what fits")
    batch_size: int = option(1, "clips of equal size per step", minimum=1)
    num_workers: int = option(2, "processes that decode the next clips while this one trains", minimum=0)
    skip_bad_files: bool = option(False, "train without the files that cannot be used, instead of stopping")


@dataclass(frozen=True)
class Lora:
    """LoRA"""

    lora_rank: int = option(16, "rank of the matrices", minimum=1)
    lora_alpha: float | None = option(None, "strength alpha / rank of the adapter (default: the rank)", minimum=0.001)
    lora_target: tuple[str, ...] = option(("attn",), "attn, all-linear, or patterns like self_attn.q ffn.*")
    lora_blocks: str | None = option(None, "blocks to adapt: 1, or 0,2, or 4-9 (default: all)")
    init_lora: Path | None = option(None, "LoRA file to start from, of the same rank, alpha and targets")
    fuse_lora: Path | None = option(None, "LoRA file to add to the base model before training")
    fuse_lora_weight: float = option(1.0, "strength at which --fuse_lora is added", needs="fuse_lora")


@dataclass(frozen=True)
class Control:
    """control LoRA"""

    control_lora: bool = option(False, "train a LoRA that follows a control video through extra input channels")
    control_type: str = option("tile", "the control made from each clip", choices=CONTROL_TYPES)
    control_inject_noise: float = option(
        0.0, "most noise added to the control's latents, drawn per sample", minimum=0, needs="control_lora"
    )
    load_control: bool = option(
        False, "read the control of clip.mp4 from clip_control.mp4 instead of making it", needs="control_lora"
    )
    control_suffix: str = option("_control", "what the control file's name adds to the clip's", needs="load_control")


@dataclass(frozen=True)
class Training:
    """training"""

    max_train_steps: int = option(1000, "optimizer steps", minimum=1)
    learning_rate: float = option(1e-5, "base learning rate", minimum=0)
    lr_scheduler: str = option("constant", "what the learning rate does after warm-up", choices=SCHEDULES)
    lr_warmup_steps: int = option(0, "steps over which the learning rate rises to its value", minimum=0)
    weight_decay: float = option(0.01, "AdamW's weight decay", minimum=0)
    gradient_accumulation: int = option(1, "batches per optimizer step", minimum=1)
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0: never", minimum=0)
    gradient_checkpointing: str = option(
        "none", "recompute blocks in the backward pass to save memory", choices=("none", "full"), bare="full"
    )
    shift: float = option(3.0, "moves training towards high noise; 1: uniform", minimum=0.01)
    distill_cfg: float = option(0.0, "teach the LoRA guidance 1 + this, so that sampling needs none", minimum=0)
    distill_negative: Path | None = option(
        None, "negative prompt of --distill_cfg, text or embedding file (default: the model's)", needs="distill_cfg"
    )


@dataclass(frozen=True)
class Watching:
    """validation, previews and checkpoints"""

    checkpointing_steps: int = option(100, "write the LoRA every N steps", minimum=1)
    val_steps: int = option(100, "validate before the first step, every N steps, and at the end", minimum=1)
    val_samples: int = option(4, "most clips to validate on; 0: no validation", minimum=0)
    val_seed: int | None = option(None, "seed of the validation's noise (default: --seed)", minimum=0, maximum=MAX_SEED)
    sample_prompts: str | None = option(None, "prompt to preview while training, or a .txt file with one per line")
    sample_every: int = option(200, "preview first, every N steps, and last", minimum=1, needs="sample_prompts")
    sample_steps: int = option(20, "sampling steps of a preview", minimum=1, needs="sample_prompts")
    sample_guidance: float | None = option(
        None, "guidance of previews (default: the model's; 1 with --distill_cfg)", minimum=0, needs="sample_prompts"
    )


@dataclass(frozen=True)
class Options(Task, Data, Lora, Control, Training, Watching):
    """Train a LoRA for a Wan video model on your own clips."""

    def __post_init__(self) -> None:
        if self.lr_warmup_steps >= self.max_train_steps:
            raise UserError(f"--lr_warmup_steps {self.lr_warmup_steps} leaves none of {self.max_train_steps} steps")

    @property
    def sampling(self) -> SamplingOptions:
        return SamplingOptions(
            self.base_res, self.token_limit, self.max_frame_stride, self.random_frame_length, self.batch_size
        )

    @property
    def optimizer(self) -> OptimizerSpec:
        return OptimizerSpec(
            self.learning_rate, self.weight_decay, self.lr_scheduler, self.lr_warmup_steps, self.max_train_steps
        )

    @property
    def alpha(self) -> float:
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha

    def preview_sampler(self, config: EasyDict) -> Sampler:
        usual = 1.0 if self.distill_cfg else config.guidance
        guidance = usual if self.sample_guidance is None else self.sample_guidance
        return Sampler("unipc", self.sample_steps, guidance, config.shift)


# --------------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Texts:
    """Everything that is told in words, encoded."""

    captions: TextCache
    previews: list[tuple[str, Tensor]]  # prompts with their (T, E)
    negative: Tensor | None  # (T, E), where guidance leads away from it: in distillation, and in previews


def encode_texts(opts: Options, stage: TextStage, data: Dataset) -> Texts:
    """Caches every text, with one load of the encoder at most."""
    captions, negatives = stage.cache(opts.cache_dir or opts.dataset / ".wan_cache"), stage.cache(EMBEDDINGS)
    prompts = [] if opts.sample_prompts is None else read_prompts(opts.sample_prompts)
    config = load_config(stage.folder)
    negative = opts.distill_negative or EMBEDDINGS / config.negative_prompt
    embedded = negative.suffix == ".safetensors"
    files = sorted(EMBEDDINGS.glob("*.txt")) if opts.cache_embeddings else []
    guided = bool(opts.distill_cfg) or (bool(prompts) and opts.preview_sampler(config).guidance != 1)
    if guided and not embedded:
        files.append(negative)
    stage.fill({captions: [*data.captions, *prompts], negatives: [read_prompt(file) for file in files]})
    rows = [(prompt, captions.load(prompt)) for prompt in prompts]
    if not guided:
        return Texts(captions, rows, None)
    away = load_embedding(negative) if embedded else negatives.load(read_prompt(negative))
    return Texts(captions, rows, away.to(stage.device))


# -------------------------------------------------------------------------------------------------------------- model


def load_models(folder: Path, device: torch.device) -> tuple[WanVAE, WanModel]:
    """The VAE in fp32; the transformer in bf16 on a GPU, save for its fp32 islands, and in fp32 on the CPU."""
    progress = partial(tqdm, desc="loading the transformer", unit="tensor", leave=False)
    return load_vae(folder, device), load_transformer(folder, compute_dtype(device), device, progress)


def attach_adapter(opts: Options, model: WanModel) -> list[nn.Parameter]:
    """Puts the adapter on a frozen transformer and returns its parameters.

    The order matters: a fused LoRA is part of the base; control widens the input before the adapter goes on it;
    checkpointing wraps blocks that are complete.
    """
    names = select_modules(model, opts.lora_target, opts.lora_blocks)
    if opts.fuse_lora:
        fuse_lora(model, read_lora(opts.fuse_lora), opts.fuse_lora_weight)
    if opts.control_lora:
        widen_patch_embedding(model, 2 * model.shape.in_dim)
        names.append("patch_embedding")
    parameters = add_lora(model, names, opts.lora_rank, opts.alpha)
    if opts.init_lora:
        load_lora(model, read_lora(opts.init_lora))
    if opts.gradient_checkpointing == "full":
        checkpoint_blocks(model.blocks)
    return parameters


def metadata(opts: Options, step: int) -> dict[str, str]:
    """What a LoRA file says of itself."""
    return {
        "base_model": opts.pretrained_model_name_or_path,
        "rank": str(opts.lora_rank),
        "alpha": f"{opts.alpha:g}",
        "targets": " ".join(opts.lora_target),
        "shift": f"{opts.shift:g}",
        "steps": str(step),
        "control": "" if not opts.control_lora else "file" if opts.load_control else opts.control_type,
        "options": to_json(opts),
    }


# ----------------------------------------------------------------------------------------------------------- training


def encode_batch(clips: Sequence[Clip], opts: Options, vae: WanVAE, texts: TextCache) -> Batch:
    """Pixels and captions become latents and text on the device."""
    control = opts.control_type if opts.control_lora else None
    return collate([encode_clip(clip, texts.load(clip.caption), vae, control) for clip in clips])


def encode_validation(opts: Options, data: Dataset, count: int, vae: WanVAE, texts: TextCache) -> list[Batch]:
    """The validation clips, which are the same all along: encoded once, and kept in host memory until needed."""
    windows = validation_windows(data.val or data.train, opts.sampling, count)
    watched = tqdm(windows, desc="encoding validation clips", leave=False)
    return [encode_batch([load_clip(window)], opts, vae, texts).to(torch.device("cpu")) for window in watched]


def prepare_preview(
    opts: Options, folder: Path, data: Dataset, vae: WanVAE, texts: Texts, validation: list[Batch]
) -> Preview:
    """Previews are as large as the largest clip; those of a control LoRA follow validation clips."""
    followed = []
    if opts.control_lora:
        followed = validation or encode_validation(opts, data, len(texts.previews), vae, texts.captions)
    largest, config = max(data.windows, key=lambda window: window.tokens), load_config(folder)
    shape = vae.latent_shape(largest.frames, largest.height, largest.width)
    requests = make_requests(texts.previews, shape, opts.seed, vae, followed)
    return Preview(requests, texts.negative, opts.preview_sampler(config), config.fps)


def training_loss(batch: Batch, opts: Options, model: WanModel, predict: Predict, negative: Tensor | None) -> Tensor:
    """How far the model's velocity is from its target, at a random noise level per clip."""
    cond = inject_noise(batch.cond, opts.control_inject_noise)
    noisy = noised(batch.latents, opts.shift)
    target = noisy.velocity
    if opts.distill_cfg:
        with adapters_off(model):
            target = guided_target(noisy, predict, cond, with_text(cond, negative), opts.distill_cfg)
    return squared_error(predict(noisy.latents, noisy.timestep, cond), target)


def print_plan(opts: Options, data: Dataset, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    """One table of what will be trained, before the first step."""
    print(clip_table(data.windows))
    steps = -(-len(plan_epoch(data.train, opts.sampling, opts.seed, epoch=0)) // opts.gradient_accumulation)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    distilled = f", guidance {1 + opts.distill_cfg:g} distilled" if opts.distill_cfg else ""
    buckets = len({window.bucket for window in data.windows})
    print(
        f"\n{counted(len(data.train), 'clip')} in {counted(buckets, 'bucket')}, {counted(steps, 'step')} per epoch; "
        f"{counted(opts.max_train_steps, 'step')} of training ({opts.max_train_steps / steps:.1f} epochs) on {where}\n"
        f"{sum(p.numel() for p in parameters):,} trainable parameters: rank {opts.lora_rank}, alpha {opts.alpha:g}, "
        f"learning rate {opts.learning_rate:g}, shift {opts.shift:g}{distilled}"
    )
    if opts.val_samples and not data.val:
        print(f"no clips are held out in {opts.dataset / 'val'}: validating on training clips, which says less")


def lora_file(model: WanModel, opts: Options, run: Run) -> LoraFile:
    """The LoRA as it is after this step."""
    return extract_lora(model, metadata(opts, run.step))


def train(opts: Options, folder: Path, device: torch.device, data: Dataset) -> None:
    """Everything that is needed, then the loop."""
    # A rehearsal without weights: a wrong name or a LoRA that does not fit should not cost the minutes of loading.
    layout = transformer_layout(folder)
    attach_adapter(opts, layout)

    # The text encoder takes 11 GB. It is loaded only if a text is not cached yet, and is gone before the others come.
    texts = encode_texts(opts, TextStage(folder, device), data)
    require_fit(texts.captions.load(data.captions[0]), layout.shape, "the captions")
    if texts.negative is not None:
        require_fit(texts.negative, layout.shape, "the negative prompt")

    # From here on everything random follows the seed; the order of the clips has its own generator (`plan_epoch`).
    torch.manual_seed(opts.seed)
    vae, model = load_models(folder, device)
    parameters = attach_adapter(opts, model)
    predict = make_predict(model)
    updater = Updater(parameters, opts.optimizer)
    print_plan(opts, data, parameters, device)

    validation = encode_validation(opts, data, opts.val_samples, vae, texts.captions)
    val_seed = opts.seed if opts.val_seed is None else opts.val_seed
    preview = prepare_preview(opts, folder, data, vae, texts, validation) if texts.previews else None

    stream = batches(data.train, opts.sampling, opts.seed, num_workers=opts.num_workers)
    run = Run(opts.output_dir, opts.max_train_steps, to_json(opts))
    snapshot = partial(lora_file, model, opts, run)
    with closing(stream), run, keeping_what_is_learnt(run, snapshot):
        while True:
            last = run.step == opts.max_train_steps
            # Once in a while: measure on the validation clips, the first time before anything is learnt.
            if validation and (last or run.step % opts.val_steps == 0):
                run.flush()  # what follows is no training time
                samples = (batch.to(device) for batch in tqdm(validation, desc="validating", leave=False))
                run.log_validation(validation_loss(predict, samples, val_seed), SIGMAS)

            # Once in a while, and at the end: write the LoRA.
            if last or (run.step and run.step % opts.checkpointing_steps == 0):
                run.save(snapshot())

            # Once in a while: generate the same prompts from the same noise, to see what it has learnt.
            if preview and (last or run.step % opts.sample_every == 0):
                run.flush()
                run.log_previews(preview.generate(predict, vae), preview.fps)

            if last:
                run.say(f"look at it: python test_wan_control_lora.py --lora_path {run.last_saved} --prompt ...")
                break

            # One step. Workers decode the next clips meanwhile, and the host does not wait for the device: losses
            # stay there until they have arrived by themselves, and the optimizer skips what is not finite.
            loss, tokens = torch.zeros((), device=device), 0
            for _ in range(opts.gradient_accumulation):
                batch = encode_batch(next(stream), opts, vae, texts.captions)
                share = training_loss(batch, opts, model, predict, texts.negative) / opts.gradient_accumulation
                share.backward()
                loss += share.detach()
                tokens += batch.tokens(model.shape.patch_size)
            learning_rate = updater.learning_rate
            run.log(loss, updater.update(opts.max_grad_norm), learning_rate, tokens)


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    if opts.download_model:
        download_model(opts.pretrained_model_name_or_path)
        return
    if opts.dataset is None:
        raise UserError("--dataset is missing: the folder with your clips and captions")
    require_writable(opts.output_dir)
    device = pick_device()
    folder = find_model(opts.pretrained_model_name_or_path)
    load_config(folder)  # an unsupported model is told before anything is prepared for it
    control_suffix = opts.control_suffix if opts.load_control else None
    data = open_dataset(opts.dataset, opts.sampling, control_suffix, opts.skip_bad_files)
    with explained_memory():
        if opts.cache_embeddings:
            encode_texts(opts, TextStage(folder, device), data)
        else:
            train(opts, folder, device, data)


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))
