"""What a run needs before a transformer is loaded: clips, texts, and samples, from the caches or encoded now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType

import torch

from utils.adapters.attach import DTYPES, AdapterOptions, AdapterPlan
from utils.adapters.beside import Chosen
from utils.adapters.choosing import further_loras
from utils.adapters.pairs import parse_also_lora
from utils.adapters.stated_steps import statements
from utils.common.console import say
from utils.common.decisions import Decisions
from utils.common.errors import UserError
from utils.common.formatting import counted
from utils.data.dataset import DataOptions, Dataset, open_dataset, open_prompts
from utils.data.folders import Folder, Rules
from utils.data.plan import Plan, Window, full_length_windows, largest_window, validation_windows
from utils.data.prompts import PromptOptions, check_prompts
from utils.encoding.conditioning import Batch, GivenFrames
from utils.encoding.latent_cache import format_cache_size
from utils.encoding.samples import VAE_DTYPES, Caches, LatentEncoding, Samples, open_samples
from utils.encoding.starts import places_to_read
from utils.encoding.text import TextEncoding, Texts, encode_texts, negative_prompt_file, shipped_prompts
from utils.setup.model import SingleFiles
from utils.training.calibration import Workload
from utils.training.cards import Card
from utils.training.distillation import finished_student
from utils.training.experts import Role, plan_experts
from utils.training.few_step import CRITIC
from utils.training.optimizers import KINDS
from utils.training.phases import TrainingOptions
from utils.training.planning import OnGpu, encoding_seconds
from utils.training.preview import Preview, Scenes, make_preview
from wan.checkpoints import ModelFiles
from wan.configs import Family
from wan.modules.model import WanShape

CPU = torch.device("cpu")
NO_LORAS: Mapping[str, Sequence[Chosen]] = MappingProxyType({})


@dataclass(frozen=True)
class InputOptions(SingleFiles, DataOptions, PromptOptions, Caches, GivenFrames, AdapterOptions, TrainingOptions):
    """what is trained, and on what"""

    def check_start(self) -> None:
        """Raises UserError for options that do not go with few-step distillation, or with where it starts."""
        check_prompts(self, self, Rules.of(self), self.few_step, self.rolls_out)
        if self.distill_negative is not None and not (self.distill_cfg or self.few_step):
            raise UserError("--distill_negative requires --distill_cfg or --few_step")
        if self.few_step and self.control_lora:
            raise UserError("--few_step has no control: leave out --control_lora, and train the control without it")
        if self.critic_alignment and self.adapter_dtype == "bf16":
            raise UserError("--critic_alignment would be lost in bf16 matrices: leave out --adapter_dtype bf16")

    def places(self, family: Family) -> tuple[int, ...] | None:
        """The only frames that are read of a clip; None: all of them."""
        return places_to_read(family, self.prompts is None) if self.rolls_out else None


@dataclass(frozen=True)
class Inputs:
    """What is trained, and the samples, all of whose texts are encoded."""

    files: ModelFiles
    data: Dataset
    plan: Plan
    roles: list[Role[InputOptions]]  # the transformers in training
    adapters: Mapping[str, AdapterPlan]  # by the names of all transformers
    further: Mapping[str, Sequence[Chosen]]  # LoRAs that act beside those in training in previews
    texts: Texts
    samples: Samples
    watched: list[Window]  # for validation
    high: Chosen | None = None  # the finished LoRA of the high-noise expert, for few-step distillation of the other

    @property
    def size(self) -> tuple[int, int]:
        """The (width, height) of the largest clip."""
        return largest_window(self.data.windows).bucket[:2]

    def load_batch(self, window: Window) -> Batch:
        """A window alone, in main memory."""
        return self.samples.load_batch([window]).to(CPU)


def open_data(opts: InputOptions, folders: list[Folder], family: Family) -> Dataset:
    """Finds the clips, checks every file, and prints a table of them, before anything that takes long."""
    # Options for which this model has no use are an error.
    opts.check_given(family, any(folder.rules.reads_first for folder in folders), opts.prompts is None)
    opts.check_control(family)
    opts.roles(family)
    limits, places = opts.limits(family.grid), opts.places(family)
    opts.check_encoding(places)
    if opts.few_step and any(folder.rules.reads_mask for folder in folders):
        raise UserError(
            "masks would be ignored: --few_step compares distributions. Leave out --load_mask, --mask_folder"
        )
    if opts.prompts is not None:
        data = open_prompts(opts, Rules.of(opts), limits, family, opts.cache_dir)
    else:
        check, student = (opts.skip_bad_files, opts.decode_check), family if opts.rolls_out else None
        data = open_dataset(folders, limits, family.fps, opts.cache_dir, *check, student)
    if opts.val_samples and not data.val and not opts.few_step:
        say("\nno clips are held out in val/: validation is on training clips, which says less")
    if family.given_as == "channels" and data.num_images and not opts.rolls_out:
        images = counted(data.num_images, "image")
        say(f"{images}: this model is given the first frame, so of an image it sees the answer")
    say(format_cache_size(data, limits, family, opts.control_lora, places))
    return data


def load_texts(
    opts: InputOptions,
    files: ModelFiles,
    device: torch.device,
    data: Dataset,
    further: Mapping[str, Sequence[Chosen]] = NO_LORAS,
) -> Texts:
    """The embeddings of all captions and prompts; what is not cached yet is encoded.

    The LoRAs that act in previews may say how these are sampled.
    """
    # Distillation and guided previews also need a negative prompt. --cache_embeddings encodes all that ship with us.
    prompts, family = opts.preview_prompts, files.family
    stated = [*opts.stated(family, family.size), *statements(further)]
    sampler = opts.preview_sampler(family, family.size, bool(opts.distill_cfg), stated)
    guided = bool(opts.distill_cfg) or opts.few_step or (bool(prompts) and sampler.is_guided)
    negatives = [opts.distill_negative or negative_prompt_file(family)] if guided else []
    others = shipped_prompts() if opts.cache_embeddings else []
    encoding = TextEncoding(files, device, opts.text_encoder_dtype)
    return encode_texts(encoding, data.captions, prompts, data.cache_folder, negatives, others)


def open_inputs(
    opts: InputOptions, files: ModelFiles, device: torch.device, data: Dataset, plan: Plan, decisions: Decisions
) -> Inputs:
    """Encodes texts and clips, one encoder after another."""
    # First a rehearsal on transformers without weights: a misspelled layer, or a LoRA file that does not fit, should
    # not cost the minutes of loading.
    roles = opts.roles(files.family)
    adapters = plan_experts(roles, files)
    opts.preview_images(files.family, _preview_size(plan).frames)
    if opts.few_step:
        adapters = {name: replace(plan, copies=(CRITIC,)) for name, plan in adapters.items()}
    high = None if opts.high_lora is None else finished_student(opts.high_lora, opts, files)
    further = further_loras(opts.also_lora, files, {name: plan.facts for name, plan in adapters.items()})
    if opts.high_lora in [parse_also_lora(text)[0] for text in opts.also_lora]:
        raise UserError(f"--also_lora {opts.high_lora} is --high_lora, which acts in previews anyway: leave it out")
    if high is not None:
        name = files.family.experts[0].name
        further = {**further, name: [*further.get(name, ()), high]}

    # The text encoder takes 11 GB. It is loaded only if an embedding is missing, and freed before the next model.
    texts = load_texts(opts, files, device, data, further)

    # Clips go through the VAE at every step, or once, to the cache; frames that the model is given through a vision
    # encoder too. Without held-out clips validation uses training clips.
    watched = validation_windows(data.val or data.train, plan.limits, opts.val_samples)
    dtype, places = VAE_DTYPES[opts.vae_dtype], opts.places(files.family)
    encoding = LatentEncoding(files, device, opts.control_signal, dtype, decisions, places)
    windows = [*(plan.fixed_windows or plan.largest_batch), *watched]
    samples = open_samples(opts, encoding, windows, texts.captions, data.cache_folder, opts.num_workers)
    return Inputs(files, data, plan, roles, adapters, further, texts, samples, watched, high)


def open_preview(opts: InputOptions, inputs: Inputs, validation: list[Batch], seed: int) -> Preview:
    """What previews show: prompts, and for some models the controls and the given frames of validation clips."""
    # Previews have the size of the largest clip, or of those that they follow. Without validation clips they follow
    # the largest sample of the first epoch.
    family, size = inputs.files.family, _preview_size(inputs.plan)
    images = opts.preview_images(family, size.frames)
    follows = opts.control_lora or (family.given and opts.held_share and not images)
    if follows and not validation:
        validation = [inputs.load_batch(largest_window(chain(*inputs.plan.epoch(0))))]
    stated = [*opts.stated(family, inputs.size), *statements(inputs.further)]
    sampler = opts.preview_sampler(family, size.bucket[:2], bool(opts.distill_cfg), stated)
    if stated:
        say(f"previews take {sampler}: {stated[0]}")
    others = inputs.files.transformers.keys() - {role.name for role in inputs.roles}
    for name in others if opts.few_step else ():
        if not inputs.further.get(name):
            say(f"note: in previews the {name} expert has no LoRA for few steps: give it as --also_lora")
    scenes = Scenes(size.bucket, validation if follows else [], images)
    return make_preview(inputs.texts, sampler, seed, inputs.samples.open_encoders(), scenes)


def workload(opts: InputOptions, family: Family, shape: WanShape, plan: Plan) -> Workload:
    """The largest batch of a run, and what is trained on it."""
    windows, roles = plan.largest_batch, opts.roles(family)
    rank, dtype = max(role.opts.lora_rank for role in roles), DTYPES[opts.adapter_dtype]
    work = Workload(shape, windows[0].tokens, len(windows), rank, opts.lora_target, len(roles), dtype)
    loaded = len(family.experts) if opts.needs_others_for else len(roles)
    work = replace(work, loaded=loaded, has_average=bool(opts.ema_decay), accumulates=opts.gradient_accumulation > 1)
    work = replace(work, moment_bytes=KINDS[opts.optimizer].state_bytes)
    if opts.few_step:
        updates, passes = max(opts.passes(role.expert, family) for role in roles)
        work = replace(work, adapters=2, updates=updates, passes=passes, is_taught=True)
    return replace(work, fp32_stream=opts.fp32_stream, keeps_ends=opts.keep_end_blocks)


def say_encoding(opts: InputOptions, family: Family, plan: Plan, card: Card) -> None:
    """What the VAE adds to a step by forecast, where it encodes the same clips again and again."""
    if opts.cache_latents or not _videos(opts, family):
        return
    windows = plan.largest_batch
    each = encoding_seconds(family, windows[0].bucket, VAE_DTYPES[opts.vae_dtype], card)
    seconds = len(windows) * _videos(opts, family) * each
    adds = f"adds{' up to' * opts.overlap_encoding} {seconds:.3g} s to such a step"
    say(f"encoding its clips {adds}: --cache_latents 1 encodes each clip once")


def _videos(opts: InputOptions, family: Family) -> int:
    """How many videos of its size are encoded of a clip: itself, its given frames as a clip of their own, a control.

    A lone first frame, which takes little, counts as none.
    """
    return (opts.places(family) is None) + (family.given_as == "channels" and opts.prompts is None) + opts.control_lora


def encoders_on_gpu(opts: InputOptions, family: Family, plan: Plan) -> OnGpu:
    """What the encoders do while the transformer is loaded."""
    return OnGpu(
        None if opts.cache_latents or not _videos(opts, family) else plan.largest_batch[0].bucket,
        _preview_size(plan).bucket if opts.preview_prompts else None,
        VAE_DTYPES[opts.vae_dtype],
        opts.overlap_encoding,
        _videos(opts, family) + opts.control_i2v,  # the control is copied to get the first frame of the clip
    )


def _preview_size(plan: Plan) -> Window:
    return largest_window(full_length_windows(plan.sources, plan.limits))
