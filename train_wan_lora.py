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
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.attach import LoraAdapter
from utils.adapters.lora import speaking
from utils.common.console import say
from utils.common.decisions import Decisions
from utils.common.device import describe, doing, explain_out_of_memory, pick_device
from utils.common.errors import UserError
from utils.common.files import check_writable
from utils.common.options import option, parse_options, run_script
from utils.common.signals import Stop, stop_on_signals
from utils.common.temp_rng import MAX_SEED
from utils.data.folders import Folder, Rules, check_paired_files
from utils.data.plan import Plan, make_plan
from utils.data.tables import format_plan
from utils.diffusion.flow import sample_noisy
from utils.diffusion.objectives import Loss, guided_target, squared_error, sum_losses
from utils.encoding.conditioning import Batch, draw_held, inject_noise, loss_weight, make_predict, replace_text
from utils.encoding.pictures import needed_flags
from utils.encoding.text_length import say_cut_captions
from utils.runs.about import DescribedOptions, run_settings
from utils.runs.attempts import run_until_it_fits
from utils.runs.benchmark import benchmark
from utils.runs.ending import save_on_exit
from utils.runs.few_steps import make_few_steps, watch_variety
from utils.runs.inputs import (
    Inputs,
    encoders_on_gpu,
    load_texts,
    open_data,
    open_inputs,
    open_preview,
    say_encoding,
    workload,
)
from utils.runs.rehearsal import ROOM, rehearse_run, rehearse_saving
from utils.runs.run import Run, open_run
from utils.runs.session import Session
from utils.runs.state import State, check_resume_compatible, decisions_of, find_state
from utils.setup.download import set_up
from utils.setup.model import find_given_family, find_given_tokenizer, given_shape, need_experts, open_given
from utils.training.checkpoint_plan import CheckpointPlan
from utils.training.compilation import explain_failed_compilation
from utils.training.conditions import check_conditions
from utils.training.experts import DISK, Experts, base_contents, load_experts
from utils.training.few_step import FewStep
from utils.training.fit import Fit, find_fit, given_of
from utils.training.learner import Learner
from utils.training.optim import with_epochs
from utils.training.phases import (
    Phase,
    Schedule,
    count_updates,
    make_few_step_phases,
    make_phase,
    make_trainables,
)
from utils.training.planning import budget
from utils.training.validation import hold_share
from wan.checkpoints import CheckpointError
from wan.configs import Family
from wan.modules.model import WanModel, WanShape

# ------------------------------------------------------------------------------------------------------------ options
# A name here is a flag on the command line and a key in --config FILE.toml. Groups live with what they configure.


@dataclass(frozen=True)
class General:
    """general"""

    config: Path | None = option(None, "TOML file with any of these options; flags override it", affects_training=False)
    seed: int = option(42, "seed of everything random in training", minimum=0, maximum=MAX_SEED)
    debug: bool = option(False, "print a traceback with every error", affects_training=False)


@dataclass(frozen=True)
class Options(General, DescribedOptions):
    """Train a LoRA for a Wan video model on your own clips."""

    def __post_init__(self) -> None:
        self.check_length()
        self.check_names()
        self.check_plan()
        self.check_optimizer(is_bf16=self.adapter_dtype == "bf16")
        if self.cache_embeddings and self.cache_latents:
            raise UserError("--cache_embeddings stops after the texts, before --cache_latents: give one of them")
        if self.overlap_encoding and self.cache_latents:
            raise UserError("--overlap_encoding has no effect with --cache_latents: steps encode nothing")
        self.check_start()
        if self.few_step and self.benchmark:
            raise UserError("--benchmark times ordinary steps: leave out --few_step")
        if self.benchmark and (self.cache_embeddings or self.cache_only or self.check_dataset):
            raise UserError("--benchmark needs a run: leave out --cache_embeddings, --cache_only and --check_dataset")


# ---------------------------------------------------------------------------------------------------- what is learned


def training_loss(
    batch: Batch, opts: Options, sigmas: tuple[float, float], model: WanModel, negative: Tensor | None
) -> Loss:
    """How far the model's velocity is from its target, fp32. With --few_step: utils/training/few_step.py."""
    # Flow matching. Latents move in a straight line to Gaussian noise, and each clip is shown at a noise level of its
    # own: uniform in 0..1, then shifted towards noise, where the layout of a video is decided. One of several experts
    # sees only the levels of its --expert_range.
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
    return Loss(squared_error(predict(noisy.latents, noisy.timestep, cond), target, weight))


def make_turns(
    inputs: Inputs,
    adapters: Mapping[str, LoraAdapter],
    experts: Experts,
    learner: Learner,
    few_steps: Mapping[str, FewStep],
) -> list[list[Phase]]:
    """The phases of a step, by whose turn it is: most runs have one of one, and two experts take turns."""
    if few_steps:  # a LoRA and its critic are two phases of one step
        return [make_few_step_phases(r, adapters[r.name], experts, learner, few_steps[r.name]) for r in inputs.roles]
    loss = partial(training_loss, negative=inputs.texts.negative)
    return [[make_phase(role, adapters[role.name], experts, learner, loss)] for role in inputs.roles]


# --------------------------------------------------------------------------------------------- before the first step


def fit_memory(opts: Options, family: Family, shape: WanShape, plan: Plan, compiled: bool, decisions: Decisions) -> Fit:
    """The fastest setting with which the largest batch fits, by forecast, within what the options leave open."""
    work, memory = workload(opts, family, shape, plan), budget(opts, family, encoders_on_gpu(opts, family, plan))
    fit = find_fit(work, memory, given_of(opts, shape.num_layers, compiled), decisions)
    fit.say()
    say_encoding(opts, family, plan, memory.card)
    return fit


def open_session(opts: Options, inputs: Inputs, device: torch.device, compiled: bool, decisions: Decisions) -> Session:
    """Loads what learns, and what the loop shows it."""
    files, plan, roles, samples = inputs.files, inputs.plan, inputs.roles, inputs.samples
    storage = opts.storage(device, files.shape, round(plan.mean_tokens), decisions)
    storage = replace(storage, idle_on_disk=opts.idle_expert == DISK)
    windows = plan.largest_batch
    size = len(windows), windows[0].tokens
    attention = opts.attention_kernel(device, storage.dtype, files.shape, size, decisions)
    memory = opts.memory(storage, compiled, attention)

    # The other random numbers come from torch's generator: the LoRA's first values, then noise and noise levels.
    torch.manual_seed(opts.seed)
    kept = CheckpointPlan(memory.checkpointing, files.shape.num_layers)
    with_others = bool(opts.needs_others_for)
    with doing("loading the transformer"):
        experts, adapters = load_experts(roles, inputs.adapters, files, memory, kept, storage, with_others)

    # Only LoRAs are trained; base models are frozen.
    learner = Learner([each for role in roles for each in make_trainables(role, adapters[role.name])])
    few_steps = make_few_steps(inputs, adapters, experts) if opts.few_step else {}
    turns = make_turns(inputs, adapters, experts, learner, few_steps)
    schedule = Schedule(turns, [role.opts.max_train_steps for role in roles], opts.expert_phase_steps)
    steps_per_epoch = plan.steps_per_epoch(opts.batches_per_step)
    say(f"\n{format_plan(plan, steps_per_epoch, schedule.total_steps)} on {describe(device)}")
    for role in roles:
        say(f"{role.label}{adapters[role.name].describe()}, {role.opts.describe_rate(role.expert, files.family)}")

    # A condition that is lost on its way to the model costs hours, and shows only in the result.
    # The longest clips have every condition; a still has no first frame that could be given.
    batch = samples.load_batch(max(plan.epoch(0), key=lambda windows: windows[0].frames))
    for (phase, *_), adapter in zip(turns, adapters.values(), strict=True):
        with phase.speaking(), doing("checking the conditions"):
            check_conditions(adapter, batch, phase.sigmas[2], files.family.given, opts.control_lora)

    with doing("encoding validation clips"):
        clips = tqdm(inputs.watched, "encoding validation clips", leave=False, disable=not inputs.watched)
        validation = [inputs.load_batch(window) for window in clips]
    preview = open_preview(opts, inputs, validation, opts.seed) if inputs.texts.previews else None
    validation, variety = hold_share(validation, opts.held_share), {}
    if few_steps:  # its loss says nothing about a student; how much its samples differ does
        variety = watch_variety(inputs, few_steps, [student for student, _ in turns], validation, decisions)
        validation = []
    needed = opts.flags(files) + opts.storage_flags + needed_flags(files.family, opts.control_signal)
    return Session(
        learner,
        schedule,
        experts,
        samples,
        plan,
        steps_per_epoch,
        validation,
        preview,
        inputs.further,
        kept,
        needed,
        variety,
    )


def forecast_run(opts: Options, folders: list[Folder], is_default: bool) -> None:
    """Checks the clips, and with --plan says what their largest batch takes."""
    name = opts.pretrained_model_name_or_path
    family = find_given_family(opts, name, is_default)
    opts.check_name_for(family)
    data = open_data(opts, folders, family)
    opts.say_unheard(data.train)
    say_cut_captions(find_given_tokenizer(opts, name), [*data.train, *data.val])
    if opts.plan:
        shape = given_shape(opts, name, family)
        opts.check_storage(shape.num_layers)
        plan = make_plan(data.train, opts.limits(family.grid), opts.seed, opts.cache_latents)
        fit_memory(opts, family, shape, plan, opts.compile == "on", Decisions(opts.gpu or ""))


# ------------------------------------------------------------------------------------------------------------ the loop


def train(opts: Options, device: torch.device, session: Session, run: Run) -> None:
    """Trains until the last step; validates, saves and previews in between."""
    metrics, preview = run.metrics, session.preview
    val_seed = opts.seed if opts.val_seed is None else opts.val_seed
    save_every = opts.checkpointing_steps, opts.save_every_epochs * session.steps_per_epoch
    # The stream has no end: epoch after epoch. A resumed run skips the batches that it has already used.
    used = session.schedule.updates_taken * opts.gradient_accumulation
    stream = session.samples.stream(session.plan, used)
    # Loading ends first: while a checkpoint is saved, there are no worker processes left that could die.
    with run, stop_on_signals() as stop, save_on_exit(run, stop), closing(stream):
        while True:
            # The first Ctrl-C, SIGTERM or SIGHUP ends the run here, between two steps. `save_on_exit` saves it first.
            last = run.step == session.schedule.total_steps
            if stop.requested and not last:
                raise KeyboardInterrupt

            # Validation: always the same clips, noise and noise levels, so that the numbers can be compared.
            if session.is_watched and run.is_due(opts.val_steps) and not metrics.is_validated:
                metrics.flush()  # what follows does not count as training time
                metrics.log_validation(session.validate(device, val_seed), session.measure_variety())

            # Previews: always the same prompts from the same noise, so that only the LoRA makes a difference. They come
            # first, because the checkpoint of this step shows one. If they fail, it is written all the same.
            shown = preview if run.is_due(opts.sample_every) and not metrics.has_previews else None
            if shown:
                metrics.flush()
            try:
                if shown:
                    run.log_previews(session.show(shown), shown.fps)
            finally:
                # A checkpoint: the LoRA, its average, and the state from which the run can be resumed.
                if run.saving_is_due(*save_every, minutes=opts.save_every_minutes):
                    run.save()
                    run.prune(opts.keep_checkpoints)

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
        losses = []
        with phase.speaking():
            for batch in islice(stream, opts.gradient_accumulation):
                loss = phase.loss(batch) / opts.gradient_accumulation
                loss.value.backward()
                losses.append(loss.detach())
                tokens += batch.tokens(session.experts.patch_size)

        # The optimizer step. A second Ctrl-C ends the run at once, but not in here: half an update cannot be saved.
        with stop.held():
            update = phase.step()
        run.metrics.log(phase.name, sum_losses(losses), update)
    run.metrics.end_step(tokens)


def run_with(
    opts: Options,
    inputs: Inputs,
    device: torch.device,
    compiled: bool,
    decisions: Decisions,
    fit: Fit | None,
    state: State | None,
) -> None:
    """A whole run with a setting, from its beginning or from a state."""
    if state is None:
        decisions.forget(ROOM)  # that of a try with another setting
    planned, spare = (opts, 0.0) if fit is None else (fit.applied(opts, decisions), fit.spare)
    folder = opts.output_dir if state is None else state.run_folder
    with explain_out_of_memory(), explain_failed_compilation():
        session = open_session(planned, inputs, device, compiled, decisions)
        # The state has the options as they were given; what was chosen, also in the rehearsal, is in the decisions.
        settings = partial(run_settings, opts, inputs, session.schedule.total_steps, decisions)
        save = partial(rehearse_saving, session.learner, settings(), folder)
        rehearse_run(session, opts, save, decisions if compiled else None, spare)
        if opts.benchmark:
            return benchmark(planned, inputs, session, compiled, decisions)
        train(opts, device, session, open_run(settings(), session.learner, state))


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    name = opts.pretrained_model_name_or_path
    is_default = name == Options.pretrained_model_name_or_path
    if set_up(opts, partial(open_given, opts, name, is_default)):
        return

    # What is wrong with options, clips or a state is found here, before anything takes long.
    folders = [] if opts.prompts else opts.folders(Rules.of(opts), opts.config)
    check_paired_files(folders, opts.control_lora, needs_masks=opts.mask_floor != Options.mask_floor)
    if opts.check_dataset or opts.plan:  # a released model need not be downloaded for these
        return forecast_run(opts, folders, is_default)
    device = pick_device()
    opts.limit_memory(device)
    opts.check_attention(device, is_fp32=opts.weight_dtype == "fp32")
    opts.check_overlap(device)
    check_writable(opts.output_dir)
    files = open_given(opts, name, is_default)
    opts.check_name_for(files.family)
    need_experts(files, [role.name for role in opts.roles(files.family)], opts.needs_others_for)
    opts.check_storage(files.shape.num_layers)
    data = open_data(opts, folders, files.family)
    opts.say_unheard(data.train)

    # The plan draws everything random about the data, from the seed and the number of the epoch alone. The order of
    # samples therefore does not depend on worker processes, and a resumed run continues in it.
    plan = make_plan(data.train, opts.limits(files.family.grid), opts.seed, opts.cache_latents)
    opts = with_epochs(opts, plan.steps_per_epoch(opts.batches_per_step))
    steps = {name: count for role in opts.roles(files.family) for name, count in count_updates(role).items()}

    # A resumed run must have the options and clips of the saved one. Differences are listed, and are an error without
    # --allow_changes.
    state = find_state(opts.resume_from_checkpoint, opts.output_dir) if opts.resume_from_checkpoint else None
    if state is not None:
        base = base_contents(opts.roles(files.family), files, opts.other_files)
        check_resume_compatible(state, opts, data.fingerprint, opts.allow_changes, steps, base)

    with explain_out_of_memory():
        if opts.cache_embeddings:
            load_texts(opts, files, device, data)
            return

        # What the machine decides, such as whether blocks are compiled, is the same when a run is resumed.
        decisions = decisions_of(state, device, opts.allow_changes)
        if opts.cache_only:
            open_inputs(opts, files, device, data, plan, decisions)
            return
        tokens = sum(steps.values()) * opts.gradient_accumulation * plan.mean_tokens
        compiled = opts.compiles(device, files.shape, tokens, decisions)
        fit = None
        if opts.plans_for(device):
            fit = fit_memory(opts, files.family, files.shape, plan, compiled, decisions)
        inputs = open_inputs(opts, files, device, data, plan, decisions)

    run = partial(run_with, opts, inputs, device, compiled, decisions)
    run_until_it_fits(run, fit, state, retries=opts.oom == "retry")


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))
