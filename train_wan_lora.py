#!/usr/bin/env python
"""Train a LoRA for a Wan video model on your own clips.

    python train_wan_lora.py --download_model                      once: fetch the base model
    python train_wan_lora.py --cache_embeddings --dataset clips    once per change of captions (optional)
    python train_wan_lora.py --dataset clips                       train

The story, from top to bottom: the options; what is learned; what happens before the first step; the loop; main. Read on
in utils/media and utils/data (files to samples), utils/encoding (samples to latents), utils/diffusion (noise and loss),
utils/adapters (LoRA on the model), utils/training (what learns), utils/runs (what a run writes) and wan/ (the models).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.attach import AdapterOptions, AdapterPlan, LoraAdapter, plan_adapter
from utils.adapters.lora import speaking
from utils.common.console import say
from utils.common.device import compute_dtype, describe, explain_out_of_memory, pick_device
from utils.common.errors import UserError
from utils.common.files import check_writable
from utils.common.options import option, parse_options, run_script, to_json, training_table
from utils.common.signals import Stop, stop_on_signals
from utils.common.temp_rng import MAX_SEED
from utils.data.dataset import DataOptions, Dataset, open_dataset
from utils.data.folders import Folder, Rules, check_paired_files, resolve_folders
from utils.data.plan import Plan, largest_window, make_plan, validation_windows
from utils.data.tables import format_plan
from utils.diffusion.flow import Predict, sample_noisy
from utils.diffusion.objectives import guided_target, squared_error
from utils.encoding.conditioning import Batch, Cond, inject_noise, make_predict, replace_text
from utils.encoding.latent_cache import format_cache_size
from utils.encoding.samples import Caches, LatentEncoding, Samples, open_samples
from utils.encoding.text import TextEncoding, Texts, encode_texts, negative_prompt_file, shipped_prompts
from utils.media.controls import FROM_FILE
from utils.runs.ending import save_on_exit
from utils.runs.metrics import Losses
from utils.runs.run import Run, RunOptions, RunSettings, open_run
from utils.runs.state import Facts, State, check_resume_compatible, find_state
from utils.setup.doctor import print_findings
from utils.setup.download import SetupOptions, download_model, suggest_download
from utils.training.learner import Learner, Trainable
from utils.training.memory import prepare
from utils.training.phases import Phase, TrainingOptions
from utils.training.preview import Preview, make_preview, read_prompts
from utils.training.validation import SIGMAS, validation_loss
from wan.checkpoints import (
    CheckpointError,
    ModelFiles,
    build_transformer,
    cast_to,
    find_family,
    load_weights,
    open_model,
)
from wan.configs import Family
from wan.modules.model import WanModel

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------------------ options
# A name here is a flag on the command line and a key in --config FILE.toml. Groups live with what they configure.


@dataclass(frozen=True)
class General:
    """general"""

    config: Path | None = option(None, "TOML file with any of these options; flags override it", affects_training=False)
    seed: int = option(42, "seed of everything random in training", minimum=0, maximum=MAX_SEED)
    debug: bool = option(False, "print a traceback with every error", affects_training=False)


@dataclass(frozen=True)
class Options(General, SetupOptions, DataOptions, Caches, AdapterOptions, TrainingOptions, RunOptions):
    """Train a LoRA for a Wan video model on your own clips."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_warmup_steps >= self.max_train_steps:
            raise UserError(f"--lr_warmup_steps {self.lr_warmup_steps} must be below the {self.max_train_steps} steps")
        if self.cache_embeddings and self.cache_latents:
            raise UserError("--cache_embeddings stops after the texts, before --cache_latents: give one of them")


# ---------------------------------------------------------------------------------------------------- what is learned


def training_loss(
    batch: Batch, opts: Options, model: WanModel, predict: Predict[Cond], negative: Tensor | None
) -> Tensor:
    """How far the model's velocity is from its target: a scalar, fp32."""
    # Flow matching. Latents move in a straight line to Gaussian noise, and each clip is shown at a noise level of its
    # own: uniform in 0..1, then shifted towards noise, where the layout of a video is decided.
    cond = inject_noise(batch.cond, opts.control_inject_noise)
    noisy = sample_noisy(batch.latents, opts.shift)

    # The target is the velocity of that line, noise - latents. Distillation adds what guidance would add to the answer
    # of the base model, which is asked here without the LoRA and without gradients. Sampling then needs no guidance.
    target = noisy.velocity
    if opts.distill_cfg and negative is not None:
        with speaking(model, None):
            target = guided_target(noisy, predict, cond, replace_text(cond, negative), opts.distill_cfg)

    # Black regions of a mask count a little too. With weight zero the LoRA could do anything to them.
    weight = None if batch.mask is None else opts.mask_floor + (1 - opts.mask_floor) * batch.mask
    return squared_error(predict(noisy.latents, noisy.timestep, cond), target, weight)


@dataclass(frozen=True)
class Session:
    """What the loop needs: who learns, in which phases, from which samples, and what is measured in between."""

    learner: Learner
    phases: list[Phase]  # the updates of a step; ordinary training has one
    model: WanModel
    predict: Predict[Cond]
    samples: Samples
    plan: Plan
    steps_per_epoch: int
    validation: list[Batch]
    preview: Preview | None


# --------------------------------------------------------------------------------------------- before the first step


def find_folders(opts: Options) -> list[Folder]:
    """The folders to train on, each with its rules."""
    # A dataset config holds nothing but [[dataset]] tables, unless it is the file of --config too.
    tables_only = opts.dataset_config != opts.config
    folders = resolve_folders(opts.dataset, opts.dataset_config, Rules.of(opts), tables_only)
    check_paired_files(folders, opts.control_lora, needs_masks=opts.mask_floor != Options.mask_floor)
    return folders


def open_data(opts: Options, folders: list[Folder], family: Family) -> Dataset:
    """Finds the clips, checks every file, and prints a table of them, before anything that takes long."""
    limits = opts.limits(family.grid)
    data = open_dataset(folders, limits, family.fps, opts.cache_dir, opts.skip_bad_files)
    say(format_cache_size(data, limits, family.out_dim * (1 + opts.control_lora)))
    return data


def load_texts(opts: Options, encoding: TextEncoding, data: Dataset) -> Texts:
    """The embeddings of all captions and prompts; what is not cached yet is encoded."""
    # Distillation and guided previews also need a negative prompt. --cache_embeddings encodes all that ship with us.
    prompts = [] if opts.sample_prompts is None else read_prompts(opts.sample_prompts)
    sampler = opts.preview_sampler(encoding.files.family, bool(opts.distill_cfg))
    guided = bool(opts.distill_cfg) or (bool(prompts) and sampler.is_guided)
    negatives = [opts.distill_negative or negative_prompt_file(encoding.files.family)] if guided else []
    others = shipped_prompts() if opts.cache_embeddings else []
    return encode_texts(encoding, data.captions, prompts, data.cache_folder, negatives, others)


def load_model(opts: Options, files: ModelFiles, plan: AdapterPlan, device: torch.device) -> LoraAdapter:
    """The frozen transformer on the device, with the adapter that is trained on it."""
    # Each tensor goes through `place` when it is read: it is cast to the compute dtype, and a fused LoRA is added. This
    # way memory never holds a second copy of the weights.
    model = build_transformer(files.transformer)
    plan.widen(model)
    place = plan.place(cast_to(compute_dtype(device), device))
    progress = partial(tqdm, desc="loading the transformer", unit="tensor", leave=False)
    load_weights(model, files.transformer, place, progress)
    return prepare(model, opts.memory, plan.attach)


def open_session(opts: Options, files: ModelFiles, device: torch.device, data: Dataset) -> Session | None:
    """Encodes and loads what the loop needs, one model after another; None with --cache_only."""
    # First a rehearsal on a transformer without weights: a misspelled layer, or a LoRA file that does not fit, should
    # not cost the minutes of loading.
    adapter_plan = plan_adapter(opts, build_transformer(files.transformer))

    # The text encoder takes 11 GB. It is loaded only if an embedding is missing, and freed before the next model.
    texts = load_texts(opts, TextEncoding(files, device), data)

    # The plan draws everything random about the data, from the seed and the number of the epoch alone. The order of
    # samples therefore does not depend on worker processes, and a resumed run continues in it. Without held-out clips
    # validation uses training clips.
    limits, latents = opts.limits(files.family.grid), LatentEncoding(files, device, opts.generated_control)
    plan = make_plan(data.train, limits, opts.seed, opts.cache_latents)
    watched = validation_windows(data.val or data.train, limits, opts.val_samples)
    windows = [*plan.fixed_windows, *watched]
    samples = open_samples(opts, latents, windows, texts.captions, data.cache_folder, opts.num_workers)
    if opts.cache_only:
        return None

    # The other random numbers come from torch's generator: the LoRA's first values, then noise and noise levels.
    torch.manual_seed(opts.seed)
    adapter = load_model(opts, files, adapter_plan, device)

    # Only the LoRA is trained; the base model is frozen. A step is one phase: the LoRA speaks, forward and backward,
    # and is updated by its optimizer. Two experts, or a student and its critic, would be two phases.
    learner = Learner([Trainable("lora", adapter, opts.optimizer, opts.ema_decay)])
    predict = make_predict(adapter.model)
    loss = partial(training_loss, opts=opts, model=adapter.model, predict=predict, negative=texts.negative)
    phase = Phase("train", adapter.speaking, loss, partial(learner.update, "lora", opts.max_grad_norm))
    steps_per_epoch = plan.steps_per_epoch(opts.gradient_accumulation)
    distilled = f", guidance {1 + opts.distill_cfg:g} distilled" if opts.distill_cfg else ""
    say(f"\n{format_plan(plan, steps_per_epoch, opts.max_train_steps)} on {describe(device)}")
    say(f"{adapter.describe()}, learning rate {opts.learning_rate:g}, shift {opts.shift:g}{distilled}")

    encoding = tqdm(watched, "encoding validation clips", leave=False)
    validation = [samples.load_batch([window]).to(CPU) for window in encoding]
    preview = None
    if texts.previews:
        # Previews have the size of the largest clip. Those of a control LoRA follow validation clips, or the largest
        # sample of the first epoch.
        longest = largest_window(chain(*plan.epoch(0)))
        followed = (validation or [samples.load_batch([longest]).to(CPU)]) if opts.control_lora else []
        sampler, size = opts.preview_sampler(files.family, bool(opts.distill_cfg)), largest_window(data.windows)
        preview = make_preview(texts, sampler, files.family, opts.seed, samples.vae, size, followed)
    return Session(learner, [phase], adapter.model, predict, samples, plan, steps_per_epoch, validation, preview)


def start_run(opts: Options, data: Dataset, learner: Learner, state: State | None) -> Run:
    """Creates the run's folder, or restores the learner from a saved state and continues in that run's folder."""
    control = FROM_FILE if any(source.control for source in data.train) else opts.generated_control or ""
    about = {"base_model": opts.pretrained_model_name_or_path, "control": control, "shift": f"{opts.shift:g}"}
    options, facts = to_json(opts), Facts(training_table(opts), data.fingerprint)
    total, name = opts.max_train_steps, opts.output_name
    settings = RunSettings(opts.output_dir, total, opts.max_grad_norm, options, facts, about, name)
    return open_run(settings, learner, state)


# ------------------------------------------------------------------------------------------------------------ the loop


def train(opts: Options, device: torch.device, session: Session, run: Run) -> None:
    """Trains until the last step; validates, saves and previews in between."""
    metrics, preview = run.metrics, session.preview
    val_seed = opts.seed if opts.val_seed is None else opts.val_seed
    save_every = opts.checkpointing_steps, opts.save_every_epochs * session.steps_per_epoch
    # The stream has no end: epoch after epoch. A resumed run skips the batches that it has already used.
    used = run.step * opts.gradient_accumulation * len(session.phases)
    stream = session.samples.stream(session.plan, used)
    with closing(stream), run, stop_on_signals() as stop, save_on_exit(run, stop):
        while True:
            # The first Ctrl-C, SIGTERM or SIGHUP ends the run here, between two steps. `save_on_exit` saves it first.
            last = run.step == opts.max_train_steps
            if stop.requested and not last:
                raise KeyboardInterrupt

            # Validation: always the same clips, noise and noise levels, so that the numbers can be compared.
            if session.validation and run.is_due(opts.val_steps) and not metrics.is_validated:
                metrics.flush()  # what follows does not count as training time
                encoded = (batch.to(device) for batch in tqdm(session.validation, desc="validating", leave=False))
                losses = validation_loss(session.predict, encoded, val_seed)
                metrics.log_validation({"train": Losses(losses, SIGMAS)})

            # A checkpoint: the LoRA, its average, and the state from which the run can be resumed.
            if run.saving_is_due(*save_every, minutes=opts.save_every_minutes):
                run.save()
                run.prune(opts.keep_checkpoints)

            # Previews: always the same prompts from the same noise, so that only the LoRA makes a difference.
            if preview and run.is_due(opts.sample_every) and not metrics.has_previews:
                metrics.flush()
                metrics.log_previews(preview.generate(session.predict), preview.fps)

            if last:
                files = " ".join(map(str, run.last_saved_files))
                metrics.say(f"look at it: python test_wan_control_lora.py --lora_path {files} --prompt ...")
                return
            take_step(opts, session, run, stream, stop)


def take_step(opts: Options, session: Session, run: Run, stream: Iterator[Batch], stop: Stop) -> None:
    """One step: each phase accumulates the gradients of its batches, then updates what it trains."""
    # Worker processes load the next clips meanwhile, and the host does not wait for the device: losses are copied in
    # the background, and the optimizer skips a gradient that is not finite. A step counts once all phases are updated.
    session.learner.begin_step(len(session.phases))
    tokens = 0
    for phase in session.phases:
        loss = torch.zeros(())
        with phase.speaking():
            for batch in islice(stream, opts.gradient_accumulation):
                share = phase.loss(batch) / opts.gradient_accumulation
                share.backward()
                loss = loss + share.detach()
                tokens += batch.tokens(session.model.shape.patch_size)

        # The optimizer step. A second Ctrl-C ends the run at once, but not in here: half an update cannot be saved.
        with stop.held():
            update = phase.step()
        run.metrics.log(phase.name, loss, update)
    run.metrics.end_step(tokens)


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    name = opts.pretrained_model_name_or_path
    if opts.doctor:
        print_findings()
        return
    if opts.download_model:
        download_model(name)
        return

    # What is wrong with options, clips or a state is found here, before anything takes long.
    folders = find_folders(opts)
    with suggest_download():
        if opts.check_dataset:  # a released model need not be downloaded for it
            open_data(opts, folders, find_family(name))
            return
        check_writable(opts.output_dir)
        files = open_model(name)
    data = open_data(opts, folders, files.family)

    # A resumed run must have the options and clips of the saved one. Differences are listed, and are an error without
    # --allow_changes.
    state = find_state(opts.resume_from_checkpoint, opts.output_dir) if opts.resume_from_checkpoint else None
    if state is not None:
        check_resume_compatible(state, opts, data.fingerprint, opts.allow_changes, opts.max_train_steps)

    device = pick_device()
    with explain_out_of_memory():
        if opts.cache_embeddings:
            load_texts(opts, TextEncoding(files, device), data)
        elif (session := open_session(opts, files, device, data)) is not None:
            train(opts, device, session, start_run(opts, data, session.learner, state))


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))
