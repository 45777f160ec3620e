"""Models with several experts: which of them are trained, with which options, and which is on the device."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.attach import AdapterOptions, AdapterPlan, LoraAdapter, plan_adapter, plan_fusion
from utils.adapters.beside import Chosen, beside
from utils.adapters.lora import adapter_parameters
from utils.adapters.provenance import content_hash, files_of
from utils.common.checkpoint_names import LORA
from utils.common.console import say
from utils.common.errors import UserError
from utils.common.options import option
from utils.diffusion.flow import Predict
from utils.encoding.conditioning import Cond, make_predict
from utils.setup.base import BASE_HASH
from utils.storage.load import Store
from utils.storage.on_disk import OnDisk
from utils.storage.streaming import Stream
from utils.storage.weights import Storage
from utils.training.checkpoint_plan import CheckpointPlan
from utils.training.memory import Memory, prepare
from wan.checkpoints import ModelFiles, Place, Progress, build_transformer, cast_to, transformer_fingerprint
from wan.configs import Expert, Family
from wan.modules.model import WanModel
from wan.text2video import part_at

T = TypeVar("T")
Opts = TypeVar("Opts", bound=AdapterOptions)
CPU = torch.device("cpu")
NO_FILES: Mapping[str, Path | None] = MappingProxyType({})
SIDES = ("high", "low")
DISK = "disk"
PLACES = ("auto", "memory", DISK)  # where an expert waits
OWN_RANGE, OVERLAPPING, EVERYWHERE = RANGES = ("own", "overlap", "all")  # noise levels to train at
OVERLAP = 0.05  # of sigma, beyond the boundary
OWN = ("learning_rate", "lora_rank", "lora_alpha", "max_train_steps")  # options that each expert may have of its own


@dataclass(frozen=True)
class ExpertOptions:
    """experts of Wan 2.2 A14B"""

    expert: str = option(
        "both",
        "which expert to train; full: a model without experts",
        choices=("both", *SIDES, "full"),
        aliases=("boundary_type",),
    )
    expert_range: str = option(
        "own",
        f"noise levels that each expert trains at; own: those at which it answers; overlap: those and {OVERLAP:g} of "
        "sigma beyond the boundary; all: every level",
        choices=RANGES,
    )
    expert_phase_steps: int = option(200, "with both, steps of one expert before the other takes its turn", minimum=1)
    idle_expert: str = option(
        "auto",
        "where the weights of the expert wait that does not run; auto: in main memory, on disk where --vram finds that "
        "they do not fit",
        choices=PLACES,
        affects_training=False,
    )
    high_learning_rate: float | None = option(None, "learning rate of the high-noise expert", minimum=0)
    low_learning_rate: float | None = option(None, "learning rate of the low-noise expert", minimum=0)
    high_lora_rank: int | None = option(None, "rank of the high-noise expert's LoRA", minimum=1)
    low_lora_rank: int | None = option(None, "rank of the low-noise expert's LoRA", minimum=1)
    high_lora_alpha: float | None = option(None, "alpha of the high-noise expert's LoRA", minimum=0.001)
    low_lora_alpha: float | None = option(None, "alpha of the low-noise expert's LoRA", minimum=0.001)
    high_max_train_steps: int | None = option(None, "steps of the high-noise expert", minimum=1)
    low_max_train_steps: int | None = option(None, "steps of the low-noise expert", minimum=1)

    def roles(self, family: Family) -> "list[Role[Self]]":
        """The experts of a family that are trained, from high noise to low; the only transformer of most families.

        Raises UserError where the family has no such expert, and for options of an expert that is not trained.
        """
        several = len(family.experts) > 1
        if several and self.expert == "full":
            raise UserError("--expert full means a model without experts, but this one has two: high, low or both")
        if not several and self.expert in ("high", "low"):
            raise UserError(f"--expert {self.expert}: this model has no experts, leave it out")
        names = [expert.name for expert in family.experts if self.expert in ("both", "full", _side(expert.name))]
        for side in SIDES:
            given = next((name for name in OWN if getattr(self, f"{side}_{name}") is not None), None)
            if given and side not in map(_side, names):
                raise UserError(f"--{side}_{given} would be ignored: no {side}-noise expert is trained")
        if not several and self.expert_range != ExpertOptions.expert_range:
            raise UserError(f"--expert_range {self.expert_range} would be ignored: this model has no experts")
        if len(names) == 1 and self.expert_phase_steps != ExpertOptions.expert_phase_steps:
            raise UserError("--expert_phase_steps would be ignored: it is for training both experts")
        trained = [expert for expert in family.experts if expert.name in names]
        return [Role(each, self._options_of(each), self._levels_of(each), alone=not several) for each in trained]

    def check_idle_expert(self, num_loaded: int) -> None:
        """Raises UserError where --idle_expert would be ignored: fewer than two transformers are loaded together."""
        if self.idle_expert != "auto" and num_loaded < 2:
            raise UserError(
                f"--idle_expert {self.idle_expert} would be ignored: no second transformer is loaded beside the one "
                "that runs"
            )

    def _levels_of(self, expert: Expert) -> tuple[float, float]:
        """The noise levels that an expert is trained at. It is validated at those at which it answers."""
        low, high = expert.sigmas
        beyond = {OWN_RANGE: 0.0, OVERLAPPING: OVERLAP, EVERYWHERE: 1.0}[self.expert_range]
        return max(low - beyond, 0.0), min(high + beyond, 1.0)

    def _options_of(self, expert: Expert) -> Self:
        """The options of one expert: the run's, with its own values where it has any."""
        own = {name: getattr(self, f"{_side(expert.name)}_{name}", None) for name in OWN}
        changes = {name: value for name, value in own.items() if value is not None}
        if "max_train_steps" in changes:
            changes["epochs"] = 0  # the length of the other expert's training
        return replace(self, **changes)


def _side(name: str) -> str:
    """What the options of an expert begin with: "high" for "high_noise"."""
    return name.removesuffix("_noise")


@dataclass(frozen=True)
class Role(Generic[T]):
    """One transformer in training: its row, its options, and how its results are named."""

    expert: Expert
    opts: T
    sigmas: tuple[float, float]  # the noise levels that it is trained at, after the shift
    alone: bool = True  # whether the family has no other

    @property
    def name(self) -> str:
        """The transformer's name in its family."""
        return self.expert.name

    @property
    def trainable(self) -> str:
        """The name that tells its files from those of another."""
        return LORA if self.alone else self.name

    @property
    def phase(self) -> str:
        """The name that its metrics appear under."""
        return "train" if self.alone else self.name

    def named(self, part: str) -> str:
        """The name of a part of it, such as its critic."""
        return part if self.alone else f"{self.name}_{part}"

    @property
    def label(self) -> str:
        """What a line about it begins with."""
        return "" if self.alone else f"{self.name}: "


class Experts:
    """The transformers of a model, one of which is on the device while the base weights of others wait on the CPU.

    Those of blocks may wait on disk instead.
    Trained parameters stay on the device, so optimizers never notice. A model with one transformer is never moved.
    """

    def __init__(
        self,
        models: Mapping[str, WanModel],
        boundaries: tuple[float, ...],
        device: torch.device,
        streams: Sequence[Stream] = (),
        on_disk: Sequence[OnDisk] = (),
    ) -> None:
        """`models` by the names of the family's experts, from high noise to low; the first is on the device.

        Weights that are in `streams` are not moved: they come when they are needed. `on_disk` has one for each model
        where weights of those that wait are on disk; otherwise none.
        """
        self.models = dict(models)
        self.boundaries = boundaries
        self.device = device
        self._streams = streams
        self._on_disk = dict(zip(models, on_disk, strict=bool(on_disk)))
        self.active: str | None = next(iter(models))  # None: experts were being exchanged, which was interrupted
        self._further: Mapping[str, Sequence[Chosen]] = {}
        self._undo = ExitStack()  # of those that act on the active expert
        adapters = [p for model in models.values() for p in adapter_parameters(model, None).values()]
        for parameter in adapters:
            parameter.data = parameter.data.to(device)
        self._stay = {id(parameter) for parameter in adapters}

    def activate(self, name: str) -> None:
        """Brings an expert's base weights to the device, and those of the other to where they wait.

        Raises UserError for files that cannot be read again, and RunError for those of experts that do not fit the same
        memory.
        """
        if name != self.active:
            self._undo.close()
            self.active = None
            self._exchange(name)
            self.active = name
            self._act()

    @contextmanager
    def speaking(self, name: str, adapter: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """A span in which this expert is on the device and answers with its adapter."""
        self.activate(name)
        with adapter():
            yield

    @contextmanager
    def answering(self, name: str, adapter: Callable[[], AbstractContextManager[None]]) -> Iterator[Predict[Cond]]:
        """A span in which this expert answers with an adapter; afterwards the one before is on the device again."""
        before = self.active
        with self.speaking(name, adapter):
            yield make_predict(self.models[name])
        if before is not None:
            self.activate(before)

    @contextmanager
    def beside(self, loras: Mapping[str, Sequence[Chosen]]) -> Iterator[None]:
        """A span in which further LoRAs act beside each expert's own, by the experts' names."""
        self._further = loras
        try:
            self._act()
            yield
        finally:
            self._undo.close()
            self._further = {}

    def _act(self) -> None:
        if self.active is not None:
            further = self._further.get(self.active, ())
            self._undo.enter_context(beside(self.models[self.active], further, self.device))

    def _exchange(self, coming: str) -> None:
        """Moves the base weights of the others to the CPU and those of one model to the device, in turns.

        Neither the CPU nor the device ever holds more than the weights of one model and one tensor. What may be on disk
        is dropped first, and read last. After an interrupt, all of this can be done again, for either model.
        """
        others = [name for name in self.models if name != coming]
        for name in others:
            if self._on_disk:
                self._on_disk[name].drop()
        for old, new in zip_longest(chain.from_iterable(map(self._base, others)), self._base(coming)):
            if old is not None:
                old.data = old.data.to(CPU)
            if new is not None:
                new.data = new.data.to(self.device)
        if self._on_disk:
            self._on_disk[coming].read(_progress(f"reading the {coming} expert"))

    def _base(self, name: str) -> Iterator[Tensor]:
        """The parameters of the base, and the buffers, without what is in a stream, or may be on disk."""
        model = self.models[name]
        on_disk = {id(tensor) for tensor in self._on_disk[name].tensors} if self._on_disk else set[int]()
        for tensor in chain(model.parameters(), model.buffers()):
            if id(tensor) not in self._stay | on_disk and not any(stream.holds(tensor) for stream in self._streams):
                yield tensor

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """How many latent frames, rows and columns make a token."""
        return next(iter(self.models.values())).shape.patch_size

    @property
    def predict(self) -> Predict[Cond]:
        """The answer of whichever expert a timestep belongs to; all samples must share it."""
        if len(self.models) == 1:
            return make_predict(next(iter(self.models.values())))
        return self._predict

    def _predict(self, latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        name = list(self.models)[part_at(self.boundaries, timestep)]
        self.activate(name)
        return make_predict(self.models[name])(latents, timestep, cond)


def plan_experts(roles: Sequence[Role[Opts]], files: ModelFiles) -> dict[str, AdapterPlan]:
    """What is done to each transformer, tried on models without weights: those in training get an adapter.

    What of --fuse_lora is not used, or not unchanged, is reported. Raises UserError as `plan_adapter` does, and where
    --fuse_lora is for none of those in training.
    """
    # A LoRA may be for an expert whose file is not given.
    opts, names = {role.name: role.opts for role in roles}, [expert.name for expert in files.family.experts]
    plans = {}
    for name, transformer in files.transformers.items():
        layout = build_transformer(transformer)
        plan = plan_adapter if name in opts else plan_fusion
        planned = plan(opts.get(name, roles[0].opts), layout, name, names)
        plans[name] = replace(planned, facts={BASE_HASH: transformer_fingerprint(transformer), **planned.facts})
    if roles[0].opts.fuse_lora is not None:
        bare = [name for name, plan in plans.items() if plan.fusion is None]
        if set(opts) <= set(bare):
            raise UserError(f"--fuse_lora {roles[0].opts.fuse_lora} is not for the {' and '.join(opts)} expert")
        for name in bare:
            say(f"no --fuse_lora for the {name} expert: it is not changed")
    for note in dict.fromkeys(note for plan in plans.values() for note in plan.notes):
        say(note)
    return plans


def base_contents(
    roles: Sequence[Role[Opts]], files: ModelFiles, others: Mapping[str, Path | None] = NO_FILES
) -> dict[str, str]:
    """What is trained on, by content: a hash for each transformer in training, and for each file of --fuse_lora.

    And for those of `others`, LoRAs of experts that are not trained, by the names of their options; where there is one,
    all transformers count. What a LoRA was itself trained on top of is recorded in it. Raises UserError for a file that
    cannot be read.
    """
    given = {"fuse_lora": roles[0].opts.fuse_lora, **others}
    read = [(name, each) for name, path in given.items() if path is not None for each in files_of(path)]
    fused = {f"--{name} {path.name}": content_hash(path) for name, path in read}
    names = list(files.transformers) if any(others.values()) else [role.name for role in roles]
    return {f"the base model's {name}": transformer_fingerprint(files.transformers[name]) for name in names} | fused


def load_experts(
    roles: Sequence[Role[Opts]],
    plans: Mapping[str, AdapterPlan],
    files: ModelFiles,
    memory: Memory,
    kept: CheckpointPlan,
    storage: Storage,
    with_others: bool,
) -> tuple[Experts, dict[str, LoraAdapter]]:
    """The transformers, and the adapters of those in training, both by name. The first is on the device.

    By the plan `kept` the blocks of all are checkpointed; `storage` says how their weights are held.

    One that is not trained is loaded `with_others`: it answers without an adapter, in previews and for samples that go
    through both. Raises UserError where main memory is too small for those that wait in it.
    """
    trained = [role.name for role in roles]
    names = [name for name in files.transformers if name in trained or with_others]
    store = Store(storage, takes_turns=len(names) > 1)
    models: dict[str, WanModel] = {}
    adapters: dict[str, LoraAdapter] = {}
    streams: list[Stream] = []
    for name in names:
        model, plan = build_transformer(files.transformers[name]), plans[name]
        plan.widen(model)

        # Each tensor goes through this when it is read: it is moved and cast, and a fused LoRA is added. Memory never
        # holds a second copy of the weights.
        def cast(dtype: torch.dtype, device: torch.device, plan: AdapterPlan = plan) -> Place:
            return plan.place(cast_to(dtype, device))

        progress = _progress("loading the transformer")
        stream = store.load(model, files.transformers[name], cast, plan.changed, progress, waits=bool(models))
        attach = plan.attach if name in trained else lambda _: None
        adapter = prepare(model, memory, attach, kept, stream)
        models[name] = model
        if adapter is not None:
            adapters[name] = adapter
        streams += [stream] if stream else []
    return Experts(models, files.family.boundaries, storage.device, streams, store.on_disk), adapters


def _progress(description: str) -> Progress:
    return partial(tqdm, desc=description, unit="tensor", leave=False)
