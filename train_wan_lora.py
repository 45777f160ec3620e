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

import torch
from easydict import EasyDict
from torch import Tensor
from tqdm import tqdm

from utils.adapters.attach import AdapterOptions, plan_adapter
from utils.adapters.lora import fuse_lora, speaking
from utils.adapters.lora_reader import read_lora
from utils.common.device import compute_dtype, describe, explain_out_of_memory, pick_device
from utils.common.digests import LATENTS
from utils.common.errors import UserError
from utils.common.files import check_writable
from utils.common.formatting import readable_size
from utils.common.options import option, parse_options, run_script, to_json, training_table
from utils.common.signals import stop_on_signals
from utils.common.temp_rng import MAX_SEED
from utils.data.dataset import Dataset, open_dataset
from utils.data.folders import Folder, Rules, check_paired_files, resolve_folders
from utils.data.loading import batches
from utils.data.plan import Limits, Plan, Window, fixed_windows, flatten_windows, validation_windows
from utils.data.tables import format_plan
from utils.diffusion.flow import sample_noisy
from utils.diffusion.objectives import Objective, Predict, guided_target, squared_error
from utils.diffusion.sampling import Sampler
from utils.encoding.conditioning import Batch, inject_noise, make_predict, replace_text
from utils.encoding.latent_cache import format_cache_size
from utils.encoding.samples import CachedSamples, FreshSamples, LatentEncoding, Samples
from utils.encoding.text import TextEncoding, Texts, check_embedding_shape
from utils.media.controls import FROM_FILE
from utils.runs.ending import save_on_exit
from utils.runs.run import Checkpoints, RunPlan, open_run
from utils.runs.state import Facts, State, check_resume_compatible, find_state
from utils.setup.doctor import print_findings
from utils.setup.download import download_model
from utils.training.learner import Learner, Trainable
from utils.training.memory import MemoryOptions, prepare
from utils.training.optim import Optimization
from utils.training.phases import Phase
from utils.training.preview import Preview, Previews, make_requests, read_prompts
from utils.training.validation import SIGMAS, Validation, validation_loss
from wan.checkpoints import CheckpointError, find_model, load_config, load_transformer, load_vae, transformer_layout
from wan.configs import named_config
from wan.configs.grid import Grid
from wan.modules.model import WanModel

EMBEDDINGS = Path(__file__).resolve().parent / "embeddings"

# ------------------------------------------------------------------------------------------------------------ options
# A name here is a flag on the command line and a key in --config FILE.toml.


@dataclass(frozen=True)
class General:
    """what to do"""

    dataset: Path | None = option(
        None, "folder with your clips and captions; may hold train/ and val/", affects_training=False
    )
    dataset_config: Path | None = option(
        None, "TOML file with a [[dataset]] table for each of several folders", affects_training=False
    )
    check_dataset: bool = option(False, "look at every file, print what would be trained on, then stop")
    pretrained_model_name_or_path: str = option("Wan-AI/Wan2.1-T2V-1.3B", "model folder, or hub name under ./models/")
    download_model: bool = option(False, "fetch the model's files from the hub into ./models/, then stop")
    output_dir: Path = option(
        Path("outputs"), "where runs are written, each in its own dated folder", affects_training=False
    )
    resume_from_checkpoint: str | None = option(
        None, "go on from a saved state: latest, or a run's or state's path", affects_training=False
    )
    allow_changes: bool = option(
        False, "go on though options or data have changed", requires="resume_from_checkpoint", affects_training=False
    )
    config: Path | None = option(None, "TOML file with any of these options; flags win over it", affects_training=False)
    seed: int = option(42, "seed of everything random in training", minimum=0, maximum=MAX_SEED)
    doctor: bool = option(False, "print versions, devices and known problems of this machine, then stop")
    debug: bool = option(False, "show where in the program an error came from", affects_training=False)


@dataclass(frozen=True)
class Caches:
    """caches"""

    cache_embeddings: bool = option(False, "encode all captions and prompts, then stop")
    cache_latents: int = option(0, "encode so many windows of each clip once; 1: the middle", minimum=0, const=1)
    cache_only: bool = option(False, "fill the cache of latents, then stop", requires="cache_latents")
    prune_cache: bool = option(
        False, "remove cached latents that this run does not use", requires="cache_latents", affects_training=False
    )
    cache_dir: Path | None = option(
        None, "where caches are kept (default: .wan_cache in the first dataset)", affects_training=False
    )


@dataclass(frozen=True)
class Batching:
    """batches"""

    token_limit: int = option(10_000, "most tokens per clip, (w/16) * (h/16) * ((frames-1)/4 + 1)", minimum=1)
    batch_size: int = option(1, "clips of equal size per step", minimum=1)
    num_workers: int = option(
        2, "processes that load the next clips while this one trains", minimum=0, affects_training=False
    )
    skip_bad_files: bool = option(
        False, "train without the files that cannot be used, instead of stopping", affects_training=False
    )


@dataclass(frozen=True)
class Options(
    General,
    Caches,
    Batching,
    Rules,
    AdapterOptions,
    Optimization,
    Objective,
    MemoryOptions,
    Validation,
    Previews,
    Checkpoints,
):
    """Train a LoRA for a Wan video model on your own clips."""

    def __post_init__(self) -> None:
        if self.lr_warmup_steps >= self.max_train_steps:
            raise UserError(f"--lr_warmup_steps {self.lr_warmup_steps} leaves none of {self.max_train_steps} steps")
        if self.cache_embeddings and self.cache_latents:
            raise UserError("--cache_embeddings stops before it comes to --cache_latents: give one of them")

    @property
    def limits(self) -> Limits:
        return Limits(self.token_limit, self.batch_size, Grid(frame=4, side=16))

    def preview_sampler(self, config: EasyDict) -> Sampler:
        usual = 1.0 if self.distill_cfg else config.guidance
        guidance = usual if self.sample_guidance is None else self.sample_guidance
        return Sampler("unipc", self.sample_steps, guidance, config.shift)


# --------------------------------------------------------------------------------------------------------------- data


def open_folders(opts: Options) -> list[Folder]:
    """The folders to train on, each with its rules."""
    tables_only = opts.dataset_config != opts.config
    folders = resolve_folders(opts.dataset, opts.dataset_config, Rules.of(opts), tables_only)
    check_paired_files(folders, opts.control_lora, needs_masks=opts.mask_floor != Options.mask_floor)
    return folders


def open_data(opts: Options, folders: list[Folder], config: EasyDict) -> Dataset:
    """The clips, for a model of this kind, and everything there is to know about them on the console."""
    data = open_dataset(folders, opts.limits, config.fps, opts.cache_dir, opts.skip_bad_files)
    print(format_cache_size(data, opts.limits, config.out_dim * (1 + opts.control_lora)))
    return data


def encode_texts(opts: Options, stage: TextEncoding, data: Dataset) -> Texts:
    """Caches every text, with one load of the encoder at most."""
    prompts = [] if opts.sample_prompts is None else read_prompts(opts.sample_prompts)
    config = load_config(stage.folder)
    guided = bool(opts.distill_cfg) or (bool(prompts) and opts.preview_sampler(config).guidance != 1)
    negative = (opts.distill_negative or EMBEDDINGS / config.negative_prompt) if guided else None
    files = sorted(EMBEDDINGS.glob("*.txt")) if opts.cache_embeddings else []
    return stage.encode(data.captions, prompts, data.cache_folder, negative, EMBEDDINGS, files)


def open_samples(
    opts: Options, folder: Path, device: torch.device, data: Dataset, texts: Texts
) -> tuple[Samples, Plan, list[Window]]:
    """How clips become batches, which clips when, and the windows to validate on.

    Latents come out of the VAE at every step, or out of the cache, which is filled here.
    """
    watched = validation_windows(data.val or data.train, opts.limits, opts.val_samples)
    if not opts.cache_latents:
        samples = FreshSamples(load_vae(folder, device), texts.captions, opts.generated_control)
        return samples, Plan(data.train, opts.limits, opts.seed), watched
    fixed = fixed_windows(data.train, opts.limits, opts.cache_latents)
    windows = [*flatten_windows(fixed), *watched]
    stage = LatentEncoding(folder, device, opts.generated_control)
    latents = stage.fill(data.cache_folder / LATENTS, windows, opts.num_workers)
    if opts.prune_cache:
        print(f"latents: removed {readable_size(latents.prune(windows))} that this run does not use")
    samples = CachedSamples(latents, texts.captions, device)
    return samples, Plan(data.train, opts.limits, opts.seed, fixed), watched


# ----------------------------------------------------------------------------------------------------------- training


def prepare_preview(
    opts: Options, folder: Path, data: Dataset, samples: Samples, plan: Plan, texts: Texts, validation: list[Batch]
) -> Preview:
    """Previews are as large as the largest clip; those of a control LoRA follow clips, if possible of validation."""
    vae = samples.vae if isinstance(samples, FreshSamples) else load_vae(folder, samples.device)
    largest, config = max(data.windows, key=lambda window: window.tokens), load_config(folder)
    shape = vae.latent_shape(largest.frames, largest.height, largest.width)
    followed = []
    if opts.control_lora:
        longest = max(itertools.chain(*plan.epoch(0)), key=lambda window: window.tokens)
        followed = validation or [samples.batch([samples.load(longest)]).to(torch.device("cpu"))]
    requests = make_requests(texts.previews, shape, opts.seed, vae, followed)
    return Preview(requests, texts.negative, opts.preview_sampler(config), config.fps, vae)


def training_loss(batch: Batch, opts: Options, model: WanModel, predict: Predict, negative: Tensor | None) -> Tensor:
    """How far the model's velocity is from its target, at a random noise level per clip."""
    cond = inject_noise(batch.cond, opts.control_inject_noise)
    noisy = sample_noisy(batch.latents, opts.shift)
    target = noisy.velocity
    if opts.distill_cfg:
        with speaking(model, None):
            target = guided_target(noisy, predict, cond, replace_text(cond, negative), opts.distill_cfg)
    weight = None if batch.mask is None else opts.mask_floor + (1 - opts.mask_floor) * batch.mask
    return squared_error(predict(noisy.latents, noisy.timestep, cond), target, weight)


@dataclass(frozen=True)
class Session:
    """Everything that the loop needs."""

    learner: Learner
    phases: list[Phase]
    predict: Predict
    patch_size: tuple[int, int, int]
    samples: Samples
    plan: Plan
    steps_per_epoch: int
    validation: list[Batch]
    preview: Preview | None


def prepare_session(opts: Options, folder: Path, device: torch.device, data: Dataset) -> Session | None:
    """Loads and encodes what is needed, one thing after another; None where caches were all that was wanted."""
    layout = transformer_layout(folder)
    shape = layout.shape
    adapter_plan = plan_adapter(opts, layout)
    texts = encode_texts(opts, TextEncoding(folder, device), data)
    check_embedding_shape(texts.captions.load(data.captions[0]), shape, "the captions")
    if texts.negative is not None:
        check_embedding_shape(texts.negative, shape, "the negative prompt")
    samples, plan, watched = open_samples(opts, folder, device, data, texts)
    if opts.cache_only:
        return None
    torch.manual_seed(opts.seed)
    loading = partial(tqdm, desc="loading the transformer", unit="tensor", leave=False)
    model = load_transformer(folder, compute_dtype(device), device, loading)
    if opts.fuse_lora:
        fuse_lora(model, read_lora(opts.fuse_lora), opts.fuse_lora_weight)
    adapter = prepare(model, opts.memory, adapter_plan.attach)
    learner = Learner([Trainable("lora", adapter, opts.optimizer, opts.ema_decay)])
    per_epoch = -(-len(plan.epoch(0)) // opts.gradient_accumulation)
    distilled = f", guidance {1 + opts.distill_cfg:g} distilled" if opts.distill_cfg else ""
    print(f"\n{format_plan(plan, per_epoch, opts.max_train_steps)} on {describe(device)}")
    print(f"{adapter.describe()}, learning rate {opts.learning_rate:g}, shift {opts.shift:g}{distilled}")
    encoding = tqdm(watched, desc="encoding validation clips", leave=False)
    validation = [samples.batch([samples.load(window)]).to(torch.device("cpu")) for window in encoding]
    preview = prepare_preview(opts, folder, data, samples, plan, texts, validation) if texts.previews else None
    predict = make_predict(model)
    loss = partial(training_loss, opts=opts, model=model, predict=predict, negative=texts.negative)
    update = partial(learner.update, "lora", opts.max_grad_norm)
    phases = [Phase("train", adapter.speaking, loss, update)]
    return Session(learner, phases, predict, shape.patch_size, samples, plan, per_epoch, validation, preview)


def train(opts: Options, device: torch.device, data: Dataset, session: Session, state: State | None) -> None:
    """The loop."""
    learner, samples, preview = session.learner, session.samples, session.preview
    val_seed = opts.seed if opts.val_seed is None else opts.val_seed
    control = FROM_FILE if any(source.control for source in data.train) else opts.generated_control or ""
    about = {
        "control": control,
        "base_model": opts.pretrained_model_name_or_path,
        "shift": f"{opts.shift:g}",
        "options": to_json(opts),
    }
    facts = Facts(training_table(opts), data.fingerprint)
    plan = RunPlan(opts.output_dir, opts.max_train_steps, opts.max_grad_norm, to_json(opts), facts, about)
    run = open_run(plan, learner, state)
    metrics = run.metrics
    done = None if state is None else run.step  # whatever is due there was done before
    workers = opts.num_workers if isinstance(samples, FreshSamples) else 0  # a cached clip is there in a millisecond
    stream = batches(session.plan, samples.load, run.step * opts.gradient_accumulation, workers)
    with closing(stream), run, stop_on_signals() as stop, save_on_exit(run, stop):
        while True:
            last, fresh = run.step == opts.max_train_steps, run.step != done
            if stop.requested and not last:
                raise KeyboardInterrupt
            if session.validation and fresh and (last or run.step % opts.val_steps == 0):
                metrics.flush()  # what follows is no training time
                encoded = (batch.to(device) for batch in tqdm(session.validation, desc="validating", leave=False))
                metrics.log_validation(validation_loss(session.predict, encoded, val_seed), SIGMAS)
            every = opts.checkpointing_steps, opts.save_every_epochs * session.steps_per_epoch
            if last or (fresh and run.saving_is_due(*every, minutes=opts.save_every_minutes)):
                run.save()
                run.prune(opts.keep_checkpoints)
            if preview and fresh and (last or run.step % opts.sample_every == 0):
                metrics.flush()
                metrics.log_previews(preview.generate(session.predict), preview.fps)
            if last:
                metrics.say(f"look at it: python test_wan_control_lora.py --lora_path {run.last_saved} --prompt ...")
                break
            tokens = 0
            learner.begin_step(len(session.phases))
            for phase in session.phases:
                loss = torch.zeros((), device=device)
                with phase.speaking():
                    for _ in range(opts.gradient_accumulation):
                        batch = samples.batch(next(stream))
                        share = phase.loss(batch) / opts.gradient_accumulation
                        share.backward()
                        loss += share.detach()
                        tokens += batch.tokens(session.patch_size)
                update = phase.step()
                metrics.log(phase.name, loss, update)
            metrics.end_step(tokens)


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
        open_data(opts, folders, named_config(name) or load_config(find_model(name)))
        return
    check_writable(opts.output_dir)
    folder = find_model(name)
    data = open_data(opts, folders, load_config(folder))
    state = find_state(opts.resume_from_checkpoint, opts.output_dir) if opts.resume_from_checkpoint else None
    if state is not None:
        check_resume_compatible(state, opts, data.fingerprint, opts.allow_changes)
    device = pick_device()
    with explain_out_of_memory():
        if opts.cache_embeddings:
            encode_texts(opts, TextEncoding(folder, device), data)
        elif (session := prepare_session(opts, folder, device, data)) is not None:
            train(opts, device, data, session, state)


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))
