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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.attach import AdapterOptions
from utils.adapters.beside import Chosen
from utils.adapters.lora import speaking
from utils.common.console import say
from utils.common.decisions import Decisions
from utils.common.device import describe, explain_out_of_memory, pick_device
from utils.common.errors import UserError
from utils.common.files import check_writable
from utils.common.formatting import counted
from utils.common.options import option, parse_options, run_script, to_json, training_table
from utils.common.signals import Stop, stop_on_signals
from utils.common.temp_rng import MAX_SEED
from utils.data.dataset import DataOptions, Dataset, open_dataset
from utils.data.folders import Folder, Rules, check_paired_files
from utils.data.plan import Plan, Window, full_length_windows, largest_window, make_plan, validation_windows
from utils.data.tables import format_plan
from utils.diffusion.flow import sample_noisy
from utils.diffusion.objectives import guided_target, squared_error
from utils.encoding.conditioning import (
    Batch,
    GivenFrames,
    draw_held,
    inject_noise,
    loss_weight,
    make_predict,
    replace_text,
)
from utils.encoding.latent_cache import format_cache_size
from utils.encoding.pictures import needed_flags
from utils.encoding.samples import Caches, LatentEncoding, Samples, open_samples
from utils.encoding.sampling import further_loras
from utils.encoding.text import TextEncoding, Texts, encode_texts, negative_prompt_file, shipped_prompts
from utils.media.controls import FROM_FILE
from utils.runs.ending import save_on_exit
from utils.runs.run import Run, RunOptions, RunSettings, open_run
from utils.runs.state import Facts, State, check_resume_compatible, find_state
from utils.setup.download import SetupOptions, set_up
from utils.setup.model import SingleFiles, find_given_family, given_shape, need_experts, open_given
from utils.training.calibration import Workload
from utils.training.checkpoint_plan import CheckpointPlan
from utils.training.compilation import explain_failed_compilation
from utils.training.conditions import check_conditions
from utils.training.experts import Experts, load_experts, plan_experts
from utils.training.learner import Learner, Trainable
from utils.training.optim import with_epochs
from utils.training.phases import Schedule, TrainingOptions, make_phase
from utils.training.planning import given_of, say_plan
from utils.training.preview import Preview, Scenes, make_preview
from utils.training.rehearsal import rehearse
from utils.training.validation import hold_share
from wan.checkpoints import CheckpointError, ModelFiles
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
class Options(
    General, SetupOptions, SingleFiles, DataOptions, Caches, GivenFrames, AdapterOptions, TrainingOptions, RunOptions
):
    """Train a LoRA for a Wan video model on your own clips."""

    def __post_init__(self) -> None:
        self.check_length()
        self.check_name()
        if self.cache_embeddings and self.cache_latents:
            raise UserError("--cache_embeddings stops after the texts, before --cache_latents: give one of them")


# ---------------------------------------------------------------------------------------------------- what is learned


def training_loss(
    batch: Batch, opts: Options, sigmas: tuple[float, float], model: WanModel, negative: Tensor | None
) -> Tensor:
    """How far the model's velocity is from its target: a scalar, fp32."""
    # Flow matching. Latents move in a straight line to Gaussian noise, and each clip is shown at a noise level of its
    # own: uniform in 0..1, then shifted towards noise, where the layout of a video is decided. One of several experts
    # sees only the levels that it is responsible for.
    predict = make_predict(model)
    cond = inject_noise(batch.cond, opts.control_inject_noise, batch.latents.shape[1])
    cond = draw_held(cond, opts.held_share)
    noisy = sample_noisy(batch.latents, opts.shift, sigmas)

    # The target is the velocity of that line, noise - latents. Distillation adds what guidance would add to the answer
    # of the base model, which is asked here without the LoRA and without gradients. Sampling then needs no guidance.
    target = noisy.velocity
    if opts.distill_cfg and negative is not None:
        with speaking(model, None):
            target = guided_target(noisy, predict, cond, replace_text(cond, negative), opts.distill_cfg)

    # Black regions of a mask count a little too: with weight zero the LoRA could do anything to them. A first frame
    # that the model is given counts nothing.
    weight = loss_weight(batch, cond, opts.mask_floor)
    return squared_error(predict(noisy.latents, noisy.timestep, cond), target, weight)


@dataclass(frozen=True)
class Session:
    """What the loop needs: who learns, in which phases, from which samples, and what is measured in between."""

    learner: Learner
    schedule: Schedule  # which update a step has; ordinary training has always the same
    experts: Experts  # the transformers; most models have one
    samples: Samples
    plan: Plan
    steps_per_epoch: int
    validation: list[Batch]
    preview: Preview | None
    further: Mapping[str, Sequence[Chosen]]  # LoRAs that act beside those in training in previews
    needed: str  # the flags that the test script needs to show this model

    def watched(self, device: torch.device) -> Iterator[Batch]:
        """The validation clips, one after another on the device."""
        return (batch.to(device) for batch in tqdm(self.validation, desc="validating", leave=False))


# --------------------------------------------------------------------------------------------- before the first step


def open_data(opts: Options, folders: list[Folder], family: Family) -> Dataset:
    """Finds the clips, checks every file, and prints a table of them, before anything that takes long."""
    # Options for which this model has no use are an error.
    opts.check_given(family, any(folder.rules.reads_first for folder in folders))
    opts.check_control(family)
    opts.roles(family)
    limits = opts.limits(family.grid)
    data = open_dataset(folders, limits, family.fps, opts.cache_dir, opts.skip_bad_files)
    if family.given_as == "channels" and data.num_images:
        images = counted(data.num_images, "image")
        say(f"{images}: this model is given the first frame, so of an image it sees the answer")
    say(format_cache_size(data, limits, family, opts.control_lora))
    return data


def load_texts(opts: Options, encoding: TextEncoding, data: Dataset) -> Texts:
    """The embeddings of all captions and prompts; what is not cached yet is encoded."""
    # Distillation and guided previews also need a negative prompt. --cache_embeddings encodes all that ship with us.
    prompts = opts.preview_prompts
    sampler = opts.preview_sampler(encoding.files.family, encoding.files.family.size, bool(opts.distill_cfg))
    guided = bool(opts.distill_cfg) or (bool(prompts) and sampler.is_guided)
    negatives = [opts.distill_negative or negative_prompt_file(encoding.files.family)] if guided else []
    others = shipped_prompts() if opts.cache_embeddings else []
    return encode_texts(encoding, data.captions, prompts, data.cache_folder, negatives, others)


def open_session(
    opts: Options, files: ModelFiles, device: torch.device, data: Dataset, plan: Plan, decisions: Decisions
) -> Session | None:
    """Encodes and loads what the loop needs, one model after another; None with --cache_only."""
    # First a rehearsal on transformers without weights: a misspelled layer, or a LoRA file that does not fit, should
    # not cost the minutes of loading.
    roles = opts.roles(files.family)
    plans = plan_experts(roles, files)
    size = largest_window(full_length_windows(plan.sources, plan.limits))
    opts.preview_images(files.family, size.frames)
    further = further_loras(opts.also_lora, files)
    shape, steps = next(iter(files.transformers.values())).shape, [role.opts.max_train_steps for role in roles]
    # What the machine decides, such as whether blocks are compiled, stays as it is when a run is resumed.
    storage = opts.storage(device, shape, round(plan.mean_tokens), decisions)
    memory = opts.memory(storage, shape, sum(steps) * opts.gradient_accumulation * plan.mean_tokens, decisions)

    # The text encoder takes 11 GB. It is loaded only if an embedding is missing, and freed before the next model.
    texts = load_texts(opts, TextEncoding(files, device, opts.text_encoder_dtype), data)

    # Clips go through the VAE at every step, or once, to the cache; frames that the model is given through a vision
    # encoder too. Without held-out clips validation uses training clips.
    watched = validation_windows(data.val or data.train, plan.limits, opts.val_samples)
    encoding, windows = LatentEncoding(files, device, opts.control_signal), [*plan.fixed_windows, *watched]
    samples = open_samples(opts, encoding, windows, texts.captions, data.cache_folder, opts.num_workers)
    if opts.cache_only:
        return None

    # The other random numbers come from torch's generator: the LoRA's first values, then noise and noise levels.
    torch.manual_seed(opts.seed)
    kept = CheckpointPlan(memory.checkpointing, shape.num_layers)
    experts, adapters = load_experts(roles, plans, files, memory, kept, storage, bool(texts.previews))

    # Only LoRAs are trained; base models are frozen. A step is one phase, and two experts take turns. A student and its
    # critic would be two phases of one step.
    learner = Learner([Trainable(r.trainable, adapters[r.name], r.opts.optimizer, opts.ema_decay) for r in roles])
    loss = partial(training_loss, negative=texts.negative)
    phases = [make_phase(role, adapters[role.name], experts, learner, loss) for role in roles]
    schedule = Schedule([[phase] for phase in phases], steps, opts.expert_phase_steps)
    steps_per_epoch = plan.steps_per_epoch(opts.gradient_accumulation)
    say(f"\n{format_plan(plan, steps_per_epoch, schedule.total_steps)} on {describe(device)}")
    for role in roles:
        say(f"{role.label}{adapters[role.name].describe()}, {describe_rate(role.opts)}")

    # A condition that is lost on its way to the model costs hours, and shows only in the result.
    # The longest clips have every condition; a still has no first frame that could be given.
    batch = samples.load_batch(max(plan.epoch(0), key=lambda windows: windows[0].frames))
    for phase, adapter in zip(phases, adapters.values(), strict=True):
        with phase.speaking():
            check_conditions(adapter, batch, phase.sigmas[2], files.family.given, opts.control_lora)

    clips = tqdm(watched, "encoding validation clips", leave=False)
    validation = [samples.load_batch([window]).to(CPU) for window in clips]
    preview = open_preview(opts, files.family, texts, samples, plan, size, validation) if texts.previews else None
    validation = hold_share(validation, opts.held_share)

    # The largest batch goes through the model before the first step, so that memory is found too small now and not
    # after hours. What there is room for decides how much the blocks keep for the backward pass.
    rehearse(phases[0], experts.models[roles[0].name], samples.load_batch(plan.largest_batch), kept, learner.parameters)
    needed = opts.flags(files) + opts.storage_flags + needed_flags(files.family, opts.control_signal)
    return Session(learner, schedule, experts, samples, plan, steps_per_epoch, validation, preview, further, needed)


def describe_rate(opts: Options) -> str:
    """How fast is learned, and what."""
    distilled = f", guidance {1 + opts.distill_cfg:g} distilled" if opts.distill_cfg else ""
    return f"learning rate {opts.learning_rate:g}, shift {opts.shift:g}{distilled}"


def open_preview(
    opts: Options, family: Family, texts: Texts, samples: Samples, plan: Plan, size: Window, validation: list[Batch]
) -> Preview:
    """What previews show: prompts, and for some models the controls and the given frames of validation clips."""
    # Previews have the `size` of the largest clip, or of those that they follow. Without validation clips they follow
    # the largest sample of the first epoch.
    images = opts.preview_images(family, size.frames)
    follows = opts.control_lora or (family.given and opts.held_share and not images)
    if follows and not validation:
        validation = [samples.load_batch([largest_window(chain(*plan.epoch(0)))]).to(CPU)]
    sampler, scenes = (
        opts.preview_sampler(family, size.bucket[:2], bool(opts.distill_cfg)),
        validation if follows else [],
    )
    return make_preview(texts, sampler, opts.seed, samples.open_encoders(), Scenes(size.bucket, scenes, images))


def make_forecast(opts: Options, name: str, family: Family, data: Dataset) -> None:
    """Says what the run would take on a GPU, by its largest batch."""
    plan = make_plan(data.train, opts.limits(family.grid), opts.seed, opts.cache_latents)
    shape, windows, experts = given_shape(opts, name, family), plan.largest_batch, len(opts.roles(family))
    opts.check_storage(shape.num_layers)
    work = Workload(shape, windows[0].tokens, len(windows), opts.lora_rank, opts.lora_target, experts)
    given = given_of(opts, opts, shape.num_layers)
    say_plan(opts, given, family, work, keeps_encoders=not opts.cache_latents or bool(opts.preview_prompts))


def start_run(opts: Options, data: Dataset, session: Session, state: State | None, decisions: Decisions) -> Run:
    """Creates the run's folder, or restores the learner from a saved state and continues in that run's folder."""
    control = FROM_FILE if any(source.control for source in data.train) else opts.control_type * opts.control_lora
    about = {**opts.base(opts.pretrained_model_name_or_path), "control": control, "shift": f"{opts.shift:g}"}
    about |= {"control_i2v": "true"} if opts.control_i2v else {}
    options, facts = to_json(opts), Facts(training_table(opts), data.fingerprint, decisions.table())
    total, name = session.schedule.total_steps, opts.output_name
    settings = RunSettings(opts.output_dir, total, opts.max_grad_norm, options, facts, about, name)
    return open_run(settings, session.learner, state)


# ------------------------------------------------------------------------------------------------------------ the loop


def train(opts: Options, device: torch.device, session: Session, run: Run) -> None:
    """Trains until the last step; validates, saves and previews in between."""
    metrics, preview, phases = run.metrics, session.preview, session.schedule.phases
    val_seed = opts.seed if opts.val_seed is None else opts.val_seed
    save_every = opts.checkpointing_steps, opts.save_every_epochs * session.steps_per_epoch
    # The stream has no end: epoch after epoch. A resumed run skips the batches that it has already used.
    used = session.schedule.updates_before(run.step) * opts.gradient_accumulation
    stream = session.samples.stream(session.plan, used)
    with closing(stream), run, stop_on_signals() as stop, save_on_exit(run, stop):
        while True:
            # The first Ctrl-C, SIGTERM or SIGHUP ends the run here, between two steps. `save_on_exit` saves it first.
            last = run.step == session.schedule.total_steps
            if stop.requested and not last:
                raise KeyboardInterrupt

            # Validation: always the same clips, noise and noise levels, so that the numbers can be compared.
            if session.validation and run.is_due(opts.val_steps) and not metrics.is_validated:
                metrics.flush()  # what follows does not count as training time
                losses = {phase.name: phase.validate(session.watched(device), val_seed) for phase in phases}
                metrics.log_validation(losses)

            # A checkpoint: the LoRA, its average, and the state from which the run can be resumed.
            if run.saving_is_due(*save_every, minutes=opts.save_every_minutes):
                run.save()
                run.prune(opts.keep_checkpoints)

            # Previews: always the same prompts from the same noise, so that only the LoRA makes a difference.
            if preview and run.is_due(opts.sample_every) and not metrics.has_previews:
                metrics.flush()
                with session.experts.beside(session.further):
                    metrics.log_previews(preview.generate(session.experts.predict), preview.fps)

            if last:
                files = " ".join(map(str, run.last_saved_files))
                metrics.say(
                    f"look at it: python test_wan_control_lora.py --lora_path {files}{session.needed} --prompt ..."
                )
                return
            take_step(opts, session, run, stream, stop)


def take_step(opts: Options, session: Session, run: Run, stream: Iterator[Batch], stop: Stop) -> None:
    """One step: each phase accumulates the gradients of its batches, then updates what it trains."""
    # Worker processes load the next clips meanwhile, and the host does not wait for the device: losses are copied in
    # the background, and the optimizer skips a gradient that is not finite. A step counts once all phases are updated.
    due, tokens = session.schedule.due(), 0
    session.learner.begin_step(len(due))
    for phase in due:
        loss = torch.zeros(())
        with phase.speaking():
            for batch in islice(stream, opts.gradient_accumulation):
                share = phase.loss(batch) / opts.gradient_accumulation
                share.backward()
                loss = loss + share.detach()
                tokens += batch.tokens(session.experts.patch_size)

        # The optimizer step. A second Ctrl-C ends the run at once, but not in here: half an update cannot be saved.
        with stop.held():
            update = phase.step()
        run.metrics.log(phase.name, loss, update)
    run.metrics.end_step(tokens)


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    if set_up(opts):
        return
    name = opts.pretrained_model_name_or_path

    # What is wrong with options, clips or a state is found here, before anything takes long.
    folders, is_default = opts.folders(Rules.of(opts), opts.config), name == Options.pretrained_model_name_or_path
    check_paired_files(folders, opts.control_lora, needs_masks=opts.mask_floor != Options.mask_floor)
    if opts.check_dataset or opts.plan:  # a released model need not be downloaded for these
        family = find_given_family(opts, name, is_default)
        data = open_data(opts, folders, family)
        return make_forecast(opts, name, family, data) if opts.plan else None
    check_writable(opts.output_dir)
    files = open_given(opts, name, is_default)
    need_experts(files, [role.name for role in opts.roles(files.family)], bool(opts.preview_prompts))
    opts.check_storage(next(iter(files.transformers.values())).shape.num_layers)
    data = open_data(opts, folders, files.family)

    # The plan draws everything random about the data, from the seed and the number of the epoch alone. The order of
    # samples therefore does not depend on worker processes, and a resumed run continues in it.
    plan = make_plan(data.train, opts.limits(files.family.grid), opts.seed, opts.cache_latents)
    opts = with_epochs(opts, plan.steps_per_epoch(opts.gradient_accumulation))
    steps = {role.trainable: role.opts.max_train_steps for role in opts.roles(files.family)}

    # A resumed run must have the options and clips of the saved one. Differences are listed, and are an error without
    # --allow_changes.
    state = find_state(opts.resume_from_checkpoint, opts.output_dir) if opts.resume_from_checkpoint else None
    if state is not None:
        check_resume_compatible(state, opts, data.fingerprint, opts.allow_changes, steps)

    device = pick_device()
    decisions = Decisions(describe(device), state.facts.decided if state else {}, opts.allow_changes)
    with explain_out_of_memory(), explain_failed_compilation():
        if opts.cache_embeddings:
            load_texts(opts, TextEncoding(files, device, opts.text_encoder_dtype), data)
        elif (session := open_session(opts, files, device, data, plan, decisions)) is not None:
            train(opts, device, session, start_run(opts, data, session, state, decisions))


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))
