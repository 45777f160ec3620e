"""Which adapter is trained: its options, how it gets onto the model, and the file that it becomes."""

import copy
import shlex
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from utils.adapters.fusion import Fusion, fit_lora, read_fusion
from utils.adapters.initial import differences, load_lora, options_for
from utils.adapters.lora import (
    ADAPTER,
    adapter_parameters,
    add_lora,
    extract_lora,
    let_speak,
    select_modules,
    speaking,
    widen_patch_embedding,
)
from utils.adapters.lora_file import LoraError, LoraFile
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import write_lora
from utils.adapters.model_card import network_facts
from utils.adapters.pairs import lora_of
from utils.adapters.provenance import (
    FUSED_KEY,
    DamagedRecordError,
    FusedRecord,
    find_fused_files,
    fused_file,
    read_records,
    readable_records,
    to_metadata,
)
from utils.adapters.videox_fun import VIDEOX_FUN
from utils.adapters.wantraining import TRAINER
from utils.common.errors import UserError
from utils.common.options import Replaced, option
from utils.media.controls import CONTROL_TYPES, ControlSignal
from wan.checkpoints import Place
from wan.configs import Family
from wan.modules.model import WanModel
from wan.names import PATCH

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OF_EACH_EXPERT = ("lora_rank", "lora_alpha")  # options that each expert may have of its own: --high_lora_rank
ALONE = "transformer"  # the name of a model's only transformer


@dataclass(frozen=True)
class Lora:
    """LoRA"""

    lora_rank: int = option(16, "rank of the matrices", minimum=1, aliases=("rank",))
    lora_alpha: float | None = option(
        None, "the LoRA's strength is alpha / rank (default: the rank)", minimum=0.001, aliases=("network_alpha",)
    )
    lora_target: tuple[str, ...] = option(("attn",), "attn, all-linear, or patterns like self_attn.q ffn.* img_emb.*")
    lora_blocks: str | None = option(None, "blocks to adapt: 1, or 0,2, or 4-9 (default: all)")
    adapter_dtype: str = option(
        "fp32", "dtype of the matrices and their gradients; bf16: less memory", choices=tuple(DTYPES)
    )
    init_lora: Path | None = option(None, "LoRA file to start from, of the same rank, alpha and targets")
    fuse_lora: Path | None = option(None, "LoRA file to add to the base model before training")
    fuse_lora_weight: float = option(1.0, "strength at which --fuse_lora is added", requires="fuse_lora")

    @property
    def alpha(self) -> float:
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True)
class Control:
    """control LoRA"""

    control_lora: bool = option(False, "train a LoRA that follows a control video through extra input channels")
    control_type: str = option("tile", "the control made from each clip", choices=CONTROL_TYPES)
    control_inject_noise: float = option(
        0.0,
        "most noise added to the control latents, drawn per sample",
        minimum=0,
        requires="control_lora",
    )
    control_i2v: bool = option(
        False,
        "the first frame of the control is that of the clip, so that the LoRA starts from a picture",
        requires="control_lora",
    )

    @property
    def control_signal(self) -> ControlSignal | None:
        """What a control LoRA is trained to follow."""
        return ControlSignal(self.control_type, self.control_i2v) if self.control_lora else None

    def check_control(self, family: Family) -> None:
        """Raises UserError where the control would start from a frame that the model is given anyway."""
        if self.control_i2v and family.given:
            raise UserError("--control_i2v is for models that are given no frames, but this one is: leave it out")


@dataclass(frozen=True)
class AdapterOptions(Lora, Control):
    """adapter"""

    replaced: ClassVar[Replaced] = {**TRAINER, **VIDEOX_FUN}


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA on a model, in training: what a `Trainable` updates and exports."""

    model: WanModel
    opts: AdapterOptions
    name: str = ADAPTER  # among the adapters of this model
    facts: Mapping[str, str] = field(default_factory=dict)  # of its base model, for the metadata of its files

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The matrices by their names in the model."""
        return adapter_parameters(self.model, self.name)

    def named(self, name: str) -> "LoraAdapter":
        """Another adapter of the same model and modules."""
        return replace(self, name=name)

    def speaking(self) -> AbstractContextManager[None]:
        """A span in which the model answers with this adapter, forward and backward."""
        return speaking(self.model, self.name)

    @torch.no_grad()
    def take_values(self, other: "LoraAdapter", share: float = 1.0) -> None:
        """Moves its matrices towards those of another adapter of the same modules, by a share of the way."""
        for own, values in zip(self.parameters.values(), other.parameters.values(), strict=True):
            own.lerp_(values, share)

    def export(self, path: Path, values: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Writes the LoRA file with these values of `parameters`. Raises LoraError."""
        own = {"rank": str(self.opts.lora_rank), "alpha": f"{self.opts.alpha:g}"}
        own |= {"targets": " ".join(self.opts.lora_target), **network_facts(self.opts.lora_rank, self.opts.alpha)}
        write_lora(path, extract_lora(self.model, own | dict(self.facts) | dict(facts), values, self.name))

    def describe(self) -> str:
        """The adapter's size in one line."""
        count = sum(parameter.numel() for parameter in self.parameters.values())
        dtype = "" if self.opts.adapter_dtype == "fp32" else f", {self.opts.adapter_dtype}"
        return f"{count:,} trainable parameters: rank {self.opts.lora_rank}, alpha {self.opts.alpha:g}{dtype}"


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter whose names and files were checked on a model without weights; from here on nothing can fail.

    The order is: `widen` the model without weights, load its weights through `place`, then `attach`.
    """

    opts: AdapterOptions
    fusion: Fusion | None = None
    init: LoraFile | None = None
    facts: Mapping[str, str] = field(default_factory=dict)  # of the base model, for the metadata of LoRA files
    notes: tuple[str, ...] = ()  # what of the LoRA files is not as in them, or not as it seems, a sentence each
    copies: tuple[str, ...] = ()  # further adapters of the model, which begin with the values of the first

    def widen(self, model: WanModel) -> None:
        """Gives the patch embedding the inputs that a fused control LoRA reads."""
        if self.fusion is not None:
            self.fusion.widen(model)

    @property
    def changed(self) -> Collection[str]:
        """The names of the parameters that fused LoRAs change."""
        return () if self.fusion is None else self.fusion.targets

    def place(self, cast: Place) -> Place:
        """What is done to each tensor of the base model while it is loaded: cast, then fused LoRAs are added."""
        return cast if self.fusion is None else self.fusion.place(cast)

    def attach(self, model: WanModel, name: str = ADAPTER) -> LoraAdapter:
        """Puts the adapter on a frozen transformer, and its copies; control widens the input first.

        It answers until another is asked to. Raises UserError for modules that are not there and for an --init_lora
        that does not fit.
        """
        modules = select_modules(model, self.opts.lora_target, self.opts.lora_blocks)
        if self.opts.control_lora:
            widen_patch_embedding(model, model.shape.in_dim + model.shape.out_dim)
            modules.append(PATCH)
        for each in (name, *self.copies):
            add_lora(model, modules, self.opts.lora_rank, self.opts.alpha, each, DTYPES[self.opts.adapter_dtype])
        if self.init is not None:
            load_lora(model, self.init, name)
        adapter = LoraAdapter(model, self.opts, name, self.facts)
        for copied in self.copies:
            adapter.named(copied).take_values(adapter)
        let_speak(model, name)
        return adapter


def plan_adapter(
    opts: AdapterOptions, layout: WanModel, expert: str = ALONE, experts: Sequence[str] = (ALONE,)
) -> AdapterPlan:
    """Reads the LoRA files that the options name and tries everything on `layout`, a transformer without weights.

    `layout` is that of the `expert` among the model's `experts`: of a pair of LoRAs its own is meant. Of --fuse_lora
    what fits is fused. Raises UserError for modules that are not there and for LoRA files that do not fit: before
    weights are loaded, which takes minutes. Uses `layout` up.
    """
    init = opts.init_lora and lora_of(opts.init_lora, expert, experts)
    if opts.init_lora is not None and init is None:
        raise UserError(f"--init_lora {opts.init_lora} is not for the {expert} expert: give a pair, or see --expert")
    plan = plan_fusion(opts, layout, expert, experts)
    if init is not None:
        lora = read_lora(init)
        fit_lora(lora, layout, init)  # or it is another Wan's, and then that is the reason
        _check_init(opts, lora, layout, expert, experts)
        said = [f"starting from {init}", *lora.remarks(init), *_note_on_other_base(lora, init, plan)]
        plan = replace(plan, init=lora, notes=(*plan.notes, *said))
    plan.widen(layout)
    plan.attach(layout)
    return plan


def plan_fusion(opts: AdapterOptions, layout: WanModel, expert: str, experts: Sequence[str]) -> AdapterPlan:
    """As `plan_adapter`, for a transformer that gets the LoRA of --fuse_lora alone. Leaves `layout` unchanged.

    What that LoRA was trained on top of is fused before it. Raises UserError where it is not found.
    """
    if opts.fuse_lora is None:
        return AdapterPlan(opts)
    path = lora_of(opts.fuse_lora, expert, experts)
    if path is None:
        return AdapterPlan(opts, facts=to_metadata([]))
    advice = f"Copy it into {path.absolute().parent}, under that name: it is then fused before {path.name}."
    try:
        files = [*find_fused_files(path, advice), fused_file(path, opts.fuse_lora_weight)]
    except DamagedRecordError as error:
        alone = f"Get the file again, or remove {FUSED_KEY} from its metadata: it is then fused alone."
        raise LoraError(f"{error}\n{alone}") from None
    fusion, notes = read_fusion(layout, files)
    said = [f"fused into the base model: {' and '.join(map(str, files))}"]
    said += [f"{path} was trained on top of {file.path}, which is fused too" for file in files[:-1]]
    if fusion.reads_control and not opts.control_lora:
        said.append(f"{path} is a control LoRA: without --control_lora its control is zeros")
    return AdapterPlan(opts, fusion, facts=to_metadata([file.record for file in files]), notes=(*said, *notes))


def _check_init(opts: AdapterOptions, lora: LoraFile, layout: WanModel, expert: str, experts: Sequence[str]) -> None:
    """Raises UserError for a LoRA that this run cannot start from, with what to do instead: that was tried.

    `layout` has nothing fused yet, and stays unchanged.
    """
    assert opts.init_lora is not None
    modules = [*select_modules(layout, opts.lora_target, opts.lora_blocks), *([PATCH] if opts.control_lora else [])]
    faults = differences(lora, modules, opts.lora_rank, opts.alpha)
    if not faults:
        return
    facts = f"--init_lora {opts.init_lora}: {'; '.join(faults)}"
    options = options_for(lora, layout, modules, opts.lora_rank, opts.alpha)
    # Both experts have the same --lora_target: options for one LoRA of a pair may be wrong for the other.
    halves = [lora_of(opts.init_lora, each, experts) for each in experts if each != expert]
    pair_has_same_modules = all(read_lora(half).modules == lora.modules for half in halves if half is not None)
    if options is not None and pair_has_same_modules and _can_start(replace(opts, **options), lora, layout):
        raise UserError(f"{facts}\n{_typed(options, opts, expert if len(experts) > 1 else '')}")
    reads_control = opts.control_lora or PATCH in lora.input_shapes
    fusing = replace(opts, init_lora=None, fuse_lora=opts.init_lora, fuse_lora_weight=1.0, control_lora=reads_control)
    try:
        plan_adapter(fusing, copy.deepcopy(layout), expert, experts)
    except UserError as error:
        raise UserError(f"{facts}\nNo options fit, and it cannot be fused: {error}") from None
    flags = f"--fuse_lora {shlex.quote(str(opts.init_lora))}"
    flags += " --control_lora" if reads_control and not opts.control_lora else ""
    instead = "--init_lora" if opts.fuse_lora is None else f"--init_lora and of --fuse_lora {opts.fuse_lora}"
    raise UserError(f"{facts}\nPass {flags} instead of {instead}: it is added to the base model, and a new LoRA on top")


def _can_start(opts: AdapterOptions, lora: LoraFile, layout: WanModel) -> bool:
    """Whether an adapter with these options can start from the LoRA."""
    try:
        AdapterPlan(opts, init=lora).attach(copy.deepcopy(layout))
    except UserError:
        return False
    return True


def _typed(options: Mapping[str, object], opts: AdapterOptions, expert: str) -> str:
    """What to change on the command line, where the rank and alpha of an `expert` are options of its own."""
    side = f"{expert.removesuffix('_noise')}_" if expert else ""
    given, left_out = [], ""
    for name, value in options.items():
        if name == "lora_blocks" and value is None:
            left_out = ", and leave out --lora_blocks" if opts.lora_blocks is not None else ""
        elif isinstance(value, tuple):
            given.append(" ".join([f"--{name}", *(f'"{part}"' if "*" in part else part for part in value)]))
        elif value is True:
            given.append(f"--{name}")
        else:
            number = f"{value:.9g}" if isinstance(value, float) else value
            given.append(f"--{side if name in OF_EACH_EXPERT else ''}{name} {number}")
    return f"Pass {' '.join(given)}{left_out}"


def _note_on_other_base(lora: LoraFile, path: Path, plan: AdapterPlan) -> list[str]:
    """A sentence where the LoRA that a run starts from was trained on top of others than this run fuses."""
    theirs, damaged = readable_records(lora.metadata, path)
    if damaged:
        return damaged
    ours = read_records(plan.facts, path)
    if [(fused.sha256, fused.weight) for fused in theirs] == [(fused.sha256, fused.weight) for fused in ours]:
        return []
    return [f"note: --init_lora {path} was trained on top of {_listed(theirs)}; this run is on top of {_listed(ours)}"]


def _listed(fused: Sequence[FusedRecord]) -> str:
    return " and ".join(map(str, fused)) or "no LoRA"
