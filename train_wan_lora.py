#!/usr/bin/env python
"""Train a LoRA for a Wan video model on your own clips.

    python train_wan_lora.py --download_model                      once: fetch the base model
    python train_wan_lora.py --cache_embeddings --dataset clips    once per change of captions (optional)
    python train_wan_lora.py --dataset clips                       train

The story, from top to bottom: the options; what is learned; what happens before the first step; the loop. Where to read
on: how clips become samples: utils/data, utils/encoding; what a LoRA does to the model: utils/adapters; what learns:
utils/training; what a run writes: utils/runs; what Wan is: wan/.
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
from utils.encoding.text import EMBEDDINGS, TextEncoding, Texts, encode_texts
from utils.media.controls import FROM_FILE
from utils.runs.ending import save_on_exit
from utils.runs.run import Run, RunOptions, RunPlan, open_run
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
        if self.lr_warmup_steps >= self.max_train_steps:
            raise UserError(f"--lr_warmup_steps {self.lr_warmup_steps} leaves none of {self.max_train_steps} steps")
        if self.cache_embeddings and self.cache_latents:
            raise UserError("--cache_embeddings stops before it comes to --cache_latents: give one of them")


# ---------------------------------------------------------------------------------------------------- what is learned


def training_loss(
    batch: Batch, opts: Options, model: WanModel, predict: Predict[Cond], negative: Tensor | None
) -> Tensor:
    """How far the model's velocity is from its target: a scalar, fp32."""
    # Flow matching. Latents move in a straight line to Gaussian noise, and each clip is shown at a noise level of its
    # own: uniform in 0..1, then shifted towards noise, where the layout of a video is decided.
    cond = inject_noise(batch.cond, opts.control_inject_noise)
    noisy = sample_noisy(batch.latents, opts.shift)

    # The target is the velocity of that line, noise - latents. Distillation moves it by what guidance would have added
    # to the answer of the base model, which speaks here without the LoRA. So sampling needs no guidance afterwards.
    target = noisy.velocity
    if opts.distill_cfg and negative is not None:
        with speaking(model, None):
            target = guided_target(noisy, predict, cond, replace_text(cond, negative), opts.distill_cfg)

    # Black regions of a mask still count a little, or what happens in them would be arbitrary.
    weight = None if batch.mask is None else opts.mask_floor + (1 - opts.mask_floor) * batch.mask
    return squared_error(predict(noisy.latents, noisy.timestep, cond), target, weight)


@dataclass(frozen=True)
class Session:
    """What the loop needs: who learns, in which phases, from which samples, and what is measured on the way."""

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
    # A negative prompt is needed where guidance is: for distillation, and for previews unless theirs is 1.
    prompts = [] if opts.sample_prompts is None else read_prompts(opts.sample_prompts)
    sampler = opts.preview_sampler(encoding.files.family, bool(opts.distill_cfg))
    guided = bool(opts.distill_cfg) or (bool(prompts) and sampler.guidance != 1)
    negatives = [opts.distill_negative or EMBEDDINGS / encoding.files.family.negative_prompt] if guided else []
    others = sorted(EMBEDDINGS.glob("*.txt")) if opts.cache_embeddings else []
    return encode_texts(encoding, data.captions, prompts, data.cache_folder, negatives, others)


def load_model(opts: Options, files: ModelFiles, plan: AdapterPlan, device: torch.device) -> LoraAdapter:
    """The frozen transformer on the device, with the adapter that is trained on it."""
    # Each tensor goes through `place` when it is read: it is cast to the compute dtype, and a fused LoRA is added. So
    # memory never holds a second copy of the weights.
    model = build_transformer(files.transformer)
    plan.widen(model)
    place = plan.place(cast_to(compute_dtype(device), device))
    progress = partial(tqdm, desc="loading the transformer", unit="tensor", leave=False)
    load_weights(model, files.transformer, place, progress)
    return prepare(model, opts.memory, plan.attach)


def open_session(opts: Options, files: ModelFiles, device: torch.device, data: Dataset) -> Session | None:
    """Encodes and loads what the loop needs, one model after another; None where caches were all that was wanted."""
    # First a rehearsal on a transformer without weights: a misspelled layer, or a LoRA file that does not fit, should
    # not cost the minutes of loading.
    adapter_plan = plan_adapter(opts, build_transformer(files.transformer))

    # The text encoder takes 11 GB. It is loaded only if an embedding is missing, and freed before the next model.
    texts = load_texts(opts, TextEncoding(files, device), data)

    # Everything random about the data is decided by the plan, from the seed and the number of the epoch alone. So the
    # order does not depend on worker processes, and a resumed run continues in it.
    limits, latents = opts.limits(files.family.grid), LatentEncoding(files, device, opts.generated_control)
    plan = make_plan(data.train, limits, opts.seed, opts.cache_latents)
    watched = validation_windows(data.val or data.train, limits, opts.val_samples)
    windows = [*plan.fixed_windows, *watched]
    samples = open_samples(opts, latents, windows, texts.captions, data.cache_folder, opts.num_workers)
    if opts.cache_only:
        return None

    # From here on everything random follows the seed: the LoRA's first values, then noise and noise levels.
    torch.manual_seed(opts.seed)
    adapter = load_model(opts, files, adapter_plan, device)

    # The LoRA alone is learned, the base model is frozen. A step is one phase: the LoRA speaks, forward and backward,
    # and its optimizer updates it. Training with several learners would list several phases.
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
        # Previews are as large as the largest clip. Those of a control LoRA follow clips, of validation if possible.
        longest = largest_window(chain(*plan.epoch(0)))
        followed = (validation or [samples.load_batch([longest]).to(CPU)]) if opts.control_lora else []
        sampler, size = opts.preview_sampler(files.family, bool(opts.distill_cfg)), largest_window(data.windows)
        preview = make_preview(texts, sampler, files.family, opts.seed, samples.vae, size, followed)
    return Session(learner, [phase], adapter.model, predict, samples, plan, steps_per_epoch, validation, preview)


def start_run(opts: Options, data: Dataset, learner: Learner, state: State | None) -> Run:
    """The run's folder, and what its files say about how they were made. The learner is restored from a saved state."""
    control = FROM_FILE if any(source.control for source in data.train) else opts.generated_control or ""
    about = {"base_model": opts.pretrained_model_name_or_path, "control": control, "shift": f"{opts.shift:g}"}
    options, facts = to_json(opts), Facts(training_table(opts), data.fingerprint)
    plan = RunPlan(opts.output_dir, opts.max_train_steps, opts.max_grad_norm, options, facts, about)
    return open_run(plan, learner, state)


# ------------------------------------------------------------------------------------------------------------ the loop


def train(opts: Options, device: torch.device, session: Session, run: Run, resumed_at: int | None) -> None:
    """Takes steps until the last one, and measures, saves and previews in between."""
    metrics, preview = run.metrics, session.preview
    val_seed = opts.seed if opts.val_seed is None else opts.val_seed
    save_every = opts.checkpointing_steps, opts.save_every_epochs * session.steps_per_epoch
    # The stream has no end: epoch after epoch. A resumed run skips the batches that it has already had.
    stream = session.samples.stream(session.plan, run.step * opts.gradient_accumulation)
    with closing(stream), run, stop_on_signals() as stop, save_on_exit(run, stop):
        while True:
            # What was due at the step of a resumed state was done before the state was saved.
            last, fresh = run.step == opts.max_train_steps, run.step != resumed_at
            if stop.requested and not last:
                raise KeyboardInterrupt

            # Once in a while: the loss on the same clips with the same noise, for the first time before step 1.
            if session.validation and fresh and (last or run.step % opts.val_steps == 0):
                metrics.flush()  # what follows is not training time
                encoded = (batch.to(device) for batch in tqdm(session.validation, desc="validating", leave=False))
                metrics.log_validation(validation_loss(session.predict, encoded, val_seed), SIGMAS)

            # Once in a while, and at the end: the LoRA, its average, and the state to resume from are written.
            if last or (fresh and run.saving_is_due(*save_every, minutes=opts.save_every_minutes)):
                run.save()
                run.prune(opts.keep_checkpoints)

            # Once in a while: the same prompts from the same noise, so that only the LoRA makes a difference.
            if preview and fresh and (last or run.step % opts.sample_every == 0):
                metrics.flush()
                metrics.log_previews(preview.generate(session.predict), preview.fps)

            if last:
                metrics.say(f"look at it: python test_wan_control_lora.py --lora_path {run.last_saved} --prompt ...")
                return

            # Everything else is training.
            take_step(opts, session, run, stream, stop)


def take_step(opts: Options, session: Session, run: Run, stream: Iterator[Batch], stop: Stop) -> None:
    """One step: each phase accumulates the gradients of its batches, then updates what it trains."""
    # Meanwhile worker processes load the next clips. The host never waits for the device: losses stay there until they
    # have been copied, and the optimizer itself skips a gradient that is not finite.
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

        # The optimizer step. A second Ctrl-C waits for its end: half an update could not be saved.
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

    # Everything that can be wrong with options, files and states is found before a model is loaded.
    folders = find_folders(opts)
    with suggest_download():
        if opts.check_dataset:  # a released model need not be downloaded for it
            open_data(opts, folders, find_family(name))
            return
        check_writable(opts.output_dir)
        files = open_model(name)
    data = open_data(opts, folders, files.family)

    # A run can be resumed exactly if its options and its clips are still the same; what differs is listed.
    state = find_state(opts.resume_from_checkpoint, opts.output_dir) if opts.resume_from_checkpoint else None
    if state is not None:
        check_resume_compatible(state, opts, data.fingerprint, opts.allow_changes)

    device = pick_device()
    with explain_out_of_memory():
        if opts.cache_embeddings:
            load_texts(opts, TextEncoding(files, device), data)
        elif (session := open_session(opts, files, device, data)) is not None:
            run = start_run(opts, data, session.learner, state)
            train(opts, device, session, run, resumed_at=None if state is None else state.step)


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))
