#!/usr/bin/env python
"""Train a LoRA for a Wan video model on your own clips.

    python train_wan_lora.py --download_model                      once: fetch the base model
    python train_wan_lora.py --cache_embeddings --dataset clips    once per change of captions (optional)
    python train_wan_lora.py --dataset clips                       train

The story, from top to bottom: options; data; the objective; the loop. How clips become samples: utils/data/folders.py.
"""

import itertools
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.attach import AdapterOptions, attach_adapter, metadata, summary
from utils.adapters.lora import adapters_off, extract_lora
from utils.common.device import compute_dtype, describe, explain_out_of_memory, pick_device
from utils.common.errors import UserError
from utils.common.files import check_writable
from utils.common.options import option, parse_options, run_script, to_json, to_table
from utils.common.signals import stop_on_signals
from utils.data.dataset import Dataset, format_cache_size, format_plan, open_dataset
from utils.data.folders import Folder, Rules, resolve_folders
from utils.data.plan import Limits, Plan, Window, fixed_windows, flatten_windows, validation_windows
from utils.diffusion.flow import Predict, sample_noisy
from utils.diffusion.objectives import guided_target, squared_error
from utils.encoding.conditioning import Batch, Cond, inject_noise, make_predict, replace_text
from utils.encoding.samples import Caches, LatentEncoding, Samples, open_samples
from utils.encoding.text import (
    EMBEDDINGS,
    TextEncoding,
    Texts,
    check_embedding_shape,
    is_embedding,
    load_prompt,
    read_prompt,
)
from utils.media.controls import FROM_FILE
from utils.runs.run import Run, open_run, save_on_exit
from utils.runs.state import Learner, State, check_resume_compatible, find_state, write_state
from utils.setup.doctor import print_findings
from utils.setup.download import download_model, suggest_download
from utils.training.ema import Ema
from utils.training.memory import checkpoint_blocks
from utils.training.optim import SCHEDULES, OptimizerSpec, Updater
from utils.training.preview import Preview, make_requests, read_prompts
from utils.training.validation import SIGMAS, validation_loss
from wan.checkpoints import CheckpointError, ModelFiles, build_transformer, find_family, load_transformer, open_model
from wan.configs import Family
from wan.modules.model import WanModel
from wan.text2video import Sampler

MAX_SEED = 2**32 - 1

# ------------------------------------------------------------------------------------------------------------ options
# A name here is a flag on the command line and a key in --config FILE.toml.


@dataclass(frozen=True)
class Task:
    """what to do"""

    dataset: Path | None = option(None, "folder with your clips and captions; may hold train/ and val/")
    dataset_config: Path | None = option(None, "TOML file with a [[dataset]] table for each of several folders")
    check_dataset: bool = option(False, "look at every file, print what would be trained on, then stop")
    pretrained_model_name_or_path: str = option("Wan-AI/Wan2.1-T2V-1.3B", "model folder, or hub name under ./models/")
    download_model: bool = option(False, "fetch the model's files from the hub into ./models/, then stop")
    output_dir: Path = option(Path("outputs"), "where runs are written, each in its own dated folder")
    resume_from_checkpoint: str | None = option(None, "go on from a saved state: latest, or a run's or state's path")
    allow_changes: bool = option(False, "go on though options or data have changed", requires="resume_from_checkpoint")
    config: Path | None = option(None, "TOML file with any of these options; flags win over it")
    seed: int = option(42, "seed of everything random in training", minimum=0, maximum=MAX_SEED)
    doctor: bool = option(False, "print versions, devices and known problems of this machine, then stop")
    debug: bool = option(False, "show where in the program an error came from")


@dataclass(frozen=True)
class Steps:
    """batches"""

    token_limit: int = option(10_000, "most tokens per clip, (w/16) * (h/16) * ((frames-1)/4 + 1)", minimum=1)
    batch_size: int = option(1, "clips of equal size per step", minimum=1)
    num_workers: int = option(2, "processes that load the next clips while this one trains", minimum=0)
    skip_bad_files: bool = option(False, "train without the files that cannot be used, instead of stopping")


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
        "none", "recompute blocks in the backward pass to save memory", choices=("none", "full"), const="full"
    )
    shift: float = option(3.0, "moves training towards high noise; 1: uniform", minimum=0.01)
    mask_floor: float = option(0.1, "what the loss counts where a mask is black, of 1 in white", minimum=0, maximum=1)
    distill_cfg: float = option(0.0, "teach the LoRA guidance 1 + this, so that sampling needs none", minimum=0)
    distill_negative: Path | None = option(
        None, "negative prompt of --distill_cfg, text or embedding file (default: the model's)", requires="distill_cfg"
    )


@dataclass(frozen=True)
class Watching:
    """validation, previews and checkpoints"""

    checkpointing_steps: int = option(100, "write the LoRA, and the state to go on from, every N steps", minimum=1)
    save_every_minutes: float = option(0.0, "write them also when so many minutes have passed; 0: never", minimum=0)
    save_every_epochs: int = option(0, "write them also every N epochs; 0: never", minimum=0)
    keep_checkpoints: int = option(0, "keep the newest N; 0: every LoRA, and the newest two states", minimum=0)
    ema_decay: float = option(
        0.0, "average the LoRA over steps, and write that too; try 0.99", minimum=0, maximum=0.99999
    )
    val_steps: int = option(100, "validate before the first step, every N steps, and at the end", minimum=1)
    val_samples: int = option(4, "most clips to validate on; 0: no validation", minimum=0)
    val_seed: int | None = option(None, "seed of the validation's noise (default: --seed)", minimum=0, maximum=MAX_SEED)
    sample_prompts: str | None = option(None, "prompt to preview while training, or a .txt file with one per line")
    sample_every: int = option(200, "preview first, every N steps, and last", minimum=1, requires="sample_prompts")
    sample_steps: int = option(20, "sampling steps of a preview", minimum=1, requires="sample_prompts")
    sample_guidance: float | None = option(
        None, "guidance of previews (default: the model's; 1 with --distill_cfg)", minimum=0, requires="sample_prompts"
    )


@dataclass(frozen=True)
class Options(Task, Caches, Steps, Rules, AdapterOptions, Training, Watching):
    """Train a LoRA for a Wan video model on your own clips."""

    def __post_init__(self) -> None:
        if self.lr_warmup_steps >= self.max_train_steps:
            raise UserError(f"--lr_warmup_steps {self.lr_warmup_steps} leaves none of {self.max_train_steps} steps")
        if self.cache_embeddings and self.cache_latents:
            raise UserError("--cache_embeddings stops before it comes to --cache_latents: give one of them")

    @property
    def limits(self) -> Limits:
        return Limits(self.token_limit, self.batch_size)

    @property
    def optimizer(self) -> OptimizerSpec:
        return OptimizerSpec(
            self.learning_rate, self.weight_decay, self.lr_scheduler, self.lr_warmup_steps, self.max_train_steps
        )

    def preview_sampler(self, config: Family) -> Sampler:
        usual = 1.0 if self.distill_cfg else config.guidance
        guidance = usual if self.sample_guidance is None else self.sample_guidance
        return Sampler("unipc", self.sample_steps, guidance, config.shift)


# --------------------------------------------------------------------------------------------------------------- data


def open_folders(opts: Options) -> list[Folder]:
    """The folders to train on, each with its rules."""
    alone = opts.dataset_config != opts.config
    folders = resolve_folders(opts.dataset, opts.dataset_config, Rules.of(opts), alone)
    if opts.mask_floor != Options.mask_floor and not any(folder.rules.reads_mask for folder in folders):
        raise UserError("--mask_floor means nothing without masks: see --load_mask and --mask_folder")
    if not opts.control_lora and any(folder.rules.reads_control for folder in folders):
        raise UserError(f"load_control and control_folder in {opts.dataset_config} mean nothing without --control_lora")
    return folders


def open_data(opts: Options, folders: list[Folder], config: Family) -> Dataset:
    """The clips, for a model of this kind, and everything there is to know about them on the console."""
    data = open_dataset(folders, opts.limits, config.fps, opts.cache_dir, opts.skip_bad_files)
    print(format_cache_size(data, opts.limits, config.out_dim * (1 + opts.control_lora)))
    return data


def encode_texts(opts: Options, stage: TextEncoding, data: Dataset) -> Texts:
    """Caches every text, with one load of the encoder at most."""
    prompts = [] if opts.sample_prompts is None else read_prompts(opts.sample_prompts)
    config = stage.files.family
    guided = bool(opts.distill_cfg) or (bool(prompts) and opts.preview_sampler(config).guidance != 1)
    negative = (opts.distill_negative or EMBEDDINGS / config.negative_prompt) if guided else None
    files = [*(sorted(EMBEDDINGS.glob("*.txt")) if opts.cache_embeddings else []), *([negative] if negative else [])]
    captions, shared = stage.cache(data.cache_folder), stage.cache(EMBEDDINGS)
    negatives = [read_prompt(path) for path in files if not is_embedding(path)]
    stage.encode_missing({captions: [*data.captions, *prompts], shared: negatives})
    previews = [(prompt, captions.load(prompt)) for prompt in prompts]
    return Texts(captions.load, previews, None if negative is None else load_prompt(negative, shared).to(stage.device))


def plan_samples(
    opts: Options, files: ModelFiles, device: torch.device, data: Dataset, texts: Texts
) -> tuple[Samples, Plan, list[Window]]:
    """How clips become batches, which clips when, and the windows to validate on.

    Latents come out of the VAE at every step, or out of the cache, which is filled here.
    """
    watched = validation_windows(data.val or data.train, opts.limits, opts.val_samples)
    fixed = fixed_windows(data.train, opts.limits, opts.cache_latents) if opts.cache_latents else None
    windows = [*flatten_windows(fixed or ()), *watched]
    encoding = LatentEncoding(files, device, opts.generated_control)
    samples = open_samples(opts, encoding, windows, texts.captions, data.cache_folder, opts.num_workers)
    return samples, Plan(data.train, opts.limits, opts.seed, fixed), watched


# ----------------------------------------------------------------------------------------------------------- training


def prepare_preview(
    opts: Options, config: Family, data: Dataset, samples: Samples, plan: Plan, texts: Texts, validation: list[Batch]
) -> Preview:
    """Previews are as large as the largest clip; those of a control LoRA follow clips, if possible of validation."""
    largest, vae = max(data.windows, key=lambda window: window.tokens), samples.vae
    shape = vae.latent_shape(largest.frames, largest.height, largest.width)
    followed = []
    if opts.control_lora:
        longest = max(itertools.chain(*plan.epoch(0)), key=lambda window: window.tokens)
        followed = validation or [samples.load_batch([longest]).to(torch.device("cpu"))]
    requests = make_requests(texts.previews, shape, opts.seed, vae, followed)
    return Preview(requests, texts.negative, opts.preview_sampler(config), config.fps, vae)


def training_loss(
    batch: Batch, opts: Options, model: WanModel, predict: Predict[Cond], negative: Tensor | None
) -> Tensor:
    """How far the model's velocity is from its target, at a random noise level per clip."""
    cond = inject_noise(batch.cond, opts.control_inject_noise)
    noisy = sample_noisy(batch.latents, opts.shift)
    target = noisy.velocity
    if opts.distill_cfg:
        with adapters_off(model):
            target = guided_target(noisy, predict, cond, replace_text(cond, negative), opts.distill_cfg)
    weight = None if batch.mask is None else opts.mask_floor + (1 - opts.mask_floor) * batch.mask
    return squared_error(predict(noisy.latents, noisy.timestep, cond), target, weight)


@dataclass(frozen=True)
class Ready:
    """Everything that the loop needs."""

    model: WanModel
    learner: Learner
    samples: Samples
    plan: Plan
    steps_per_epoch: int
    negative: Tensor | None
    validation: list[Batch]
    preview: Preview | None
    facts: dict[str, Any]  # what a state says of options and data


def save(opts: Options, data: Dataset, ready: Ready, run: Run) -> None:
    """Writes the LoRA, its average, and the state to go on from."""
    run.flush()  # the state holds what is known of the loss
    control = FROM_FILE if any(source.control for source in data.train) else opts.generated_control or ""
    facts = {"base_model": opts.pretrained_model_name_or_path, "shift": f"{opts.shift:g}", "options": to_json(opts)}
    about = metadata(opts, steps=run.step, control=control, **facts)
    lora, average = extract_lora(ready.model, about), None
    if ready.learner.ema is not None:
        with ready.learner.ema.in_place():
            average = extract_lora(ready.model, about)
    run.save(lora, average, partial(write_state, learner=ready.learner, facts=ready.facts | run.facts))
    run.prune(opts.keep_checkpoints)


def prepare(opts: Options, files: ModelFiles, device: torch.device, data: Dataset) -> Ready | None:
    """Loads and encodes what is needed, one thing after another; None where caches were all that was wanted."""
    # A rehearsal without weights: a wrong name or a LoRA that does not fit should not cost the minutes of loading.
    layout = build_transformer(files.transformer)
    attach_adapter(opts, layout)

    # The text encoder takes 11 GB. It is loaded only if a text is not cached yet, and is gone before the others come.
    texts = encode_texts(opts, TextEncoding(files, device), data)
    check_embedding_shape(texts.captions(data.captions[0]), layout.shape, "the captions")
    if texts.negative is not None:
        check_embedding_shape(texts.negative, layout.shape, "the negative prompt")
    samples, plan, watched = plan_samples(opts, files, device, data, texts)
    if opts.cache_only:
        return None

    # From here on everything random follows the seed; the order of the clips has its own generator (`Plan.epoch`).
    torch.manual_seed(opts.seed)
    loading = partial(tqdm, desc="loading the transformer", unit="tensor", leave=False)
    model = load_transformer(files.transformer, compute_dtype(device), device, loading)
    adapter = attach_adapter(opts, model)
    if opts.gradient_checkpointing == "full":
        checkpoint_blocks(model.blocks)
    average = Ema(adapter, opts.ema_decay) if opts.ema_decay else None
    learner = Learner(adapter, Updater(adapter.values(), opts.optimizer), average)
    per_epoch = -(-len(plan.epoch(0)) // opts.gradient_accumulation)
    distilled = f", guidance {1 + opts.distill_cfg:g} distilled" if opts.distill_cfg else ""
    print(f"\n{format_plan(plan, per_epoch, opts.max_train_steps)} on {describe(device)}")
    print(f"{summary(opts, adapter)}, learning rate {opts.learning_rate:g}, shift {opts.shift:g}{distilled}")

    encoding = tqdm(watched, desc="encoding validation clips", leave=False)
    validation = [samples.load_batch([window]).to(torch.device("cpu")) for window in encoding]
    preview = prepare_preview(opts, files.family, data, samples, plan, texts, validation) if texts.previews else None
    facts = {"options": to_table(opts), "data": data.fingerprint}
    return Ready(model, learner, samples, plan, per_epoch, texts.negative, validation, preview, facts)


def train(opts: Options, device: torch.device, data: Dataset, ready: Ready, state: State | None) -> None:
    """The loop."""
    model, learner, samples, preview = ready.model, ready.learner, ready.samples, ready.preview
    predict = make_predict(model)
    val_seed = opts.seed if opts.val_seed is None else opts.val_seed
    if state is not None:
        learner.restore(state)
    run = open_run(opts.output_dir, opts.max_train_steps, to_json(opts), opts.max_grad_norm, state)
    done = None if state is None else run.step  # whatever is due there was done before
    stream = samples.stream(ready.plan, run.step * opts.gradient_accumulation)
    keep = partial(save, opts, data, ready, run)
    with closing(stream), run, stop_on_signals() as stop, save_on_exit(run, learner, stop, keep):
        while True:
            last, fresh = run.step == opts.max_train_steps, run.step != done
            if stop.asked and not last:
                raise KeyboardInterrupt

            # Once in a while: measure on the validation clips, the first time before anything is learnt.
            if ready.validation and fresh and (last or run.step % opts.val_steps == 0):
                run.flush()  # what follows is no training time
                encoded = (batch.to(device) for batch in tqdm(ready.validation, desc="validating", leave=False))
                run.log_validation(validation_loss(predict, encoded, val_seed), SIGMAS)

            # Once in a while, and at the end: write the LoRA, and the state to go on from.
            every = opts.checkpointing_steps, opts.save_every_epochs * ready.steps_per_epoch
            if last or (fresh and run.saving_is_due(*every, minutes=opts.save_every_minutes)):
                keep()

            # Once in a while: generate the same prompts from the same noise, to see what it has learnt.
            if preview and fresh and (last or run.step % opts.sample_every == 0):
                run.flush()
                run.log_previews(preview.generate(predict), preview.fps)

            if last:
                run.say(f"look at it: python test_wan_control_lora.py --lora_path {run.last_saved} --prompt ...")
                break

            # One step. Workers load the next clips meanwhile, and the host does not wait for the device: losses
            # stay there until they have arrived by themselves, and the optimizer skips what is not finite.
            learner.capture_rng_state()
            loss, tokens = torch.zeros((), device=device), 0
            for _ in range(opts.gradient_accumulation):
                batch = next(stream)
                share = training_loss(batch, opts, model, predict, ready.negative) / opts.gradient_accumulation
                share.backward()
                loss += share.detach()
                tokens += batch.tokens(model.shape.patch_size)
            learning_rate = learner.updater.learning_rate
            run.log(loss, learner.update(opts.max_grad_norm), learner.idle(), learning_rate, tokens)


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    if opts.doctor:
        print_findings()
        return
    if opts.download_model:
        download_model(opts.pretrained_model_name_or_path)
        return
    folders, name = open_folders(opts), opts.pretrained_model_name_or_path
    if opts.check_dataset:  # a released model need not be fetched for it
        with suggest_download():
            family = find_family(name)
        open_data(opts, folders, family)
        return
    check_writable(opts.output_dir)
    with suggest_download():
        files = open_model(name)
    data = open_data(opts, folders, files.family)
    state = find_state(opts.resume_from_checkpoint, opts.output_dir) if opts.resume_from_checkpoint else None
    if state is not None:
        check_resume_compatible(state, to_table(opts), data.fingerprint, opts.allow_changes)
    device = pick_device()
    with explain_out_of_memory():
        if opts.cache_embeddings:
            encode_texts(opts, TextEncoding(files, device), data)
        elif (ready := prepare(opts, files, device, data)) is not None:
            train(opts, device, data, ready, state)


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))
