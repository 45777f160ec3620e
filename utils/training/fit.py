"""The setting with which a run fits into memory, by forecast, before anything is loaded; and the next one after it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TypeVar

from tqdm import tqdm

from utils.common.console import say
from utils.common.decisions import Decisions
from utils.common.errors import UserError
from utils.storage.weights import FORMATS
from utils.training.calibration import Workload
from utils.training.checkpoint_plan import AUTO, LADDER
from utils.training.choice import WITHOUT_LIBRARY, Given, choose
from utils.training.experts import DISK, PLACES
from utils.training.forecast import CONTEXT, Forecast, Setting, forecast
from utils.training.phases import TrainingOptions
from utils.training.planning import ASSUMED_HOST, Budget

T = TypeVar("T", bound=TrainingOptions)
TRY_IT = "this is a forecast: --vram off tries it nevertheless"
LESS = 0.9  # times what a setting takes by forecast, beside CUDA: what the next one may take


@dataclass(frozen=True)
class Fit:
    """What was chosen by forecast, within which budget, and what the user had decided."""

    work: Workload
    budget: Budget
    given: Given
    forecast: Forecast
    tries: int = 0  # settings that were too much

    def applied(self, opts: T, decisions: Decisions) -> T:
        """The options with the setting, which becomes part of the run's state.

        bf16 is what --weight_dtype auto means on a GPU anyway, and no swapped block is the default: what is no choice
        does not appear in the commands that the run prints.
        """
        setting = self.forecast.setting
        weights = opts.weight_dtype if setting.weights == "bf16" else setting.weights
        streamed = setting.streamed or opts.blocks_to_swap
        idle = DISK if setting.idle_on_disk else opts.idle_expert
        decisions.record("weight_dtype", setting.weights)
        decisions.record("blocks_to_swap", str(setting.streamed))
        if self.work.waiting:
            decisions.record("idle_expert", DISK if setting.idle_on_disk else "memory")
        return replace(
            opts, weight_dtype=weights, blocks_to_swap=streamed, layer_offload_fraction=None, idle_expert=idle
        )

    @property
    def spare(self) -> float:
        """The share of the room that blocks leave unused: more with each try: something takes more than foreseen."""
        return 1 - LESS**self.tries

    def less(self, keeps_weights: bool) -> "Fit":
        """The fastest setting that takes less than this one, by forecast; with the same numbers if `keeps_weights`.

        Raises UserError where there is none.
        """
        setting, limits = self.forecast.setting, self.budget.limits
        # A run measures what blocks may keep. Where memory is full nevertheless, they keep the least already.
        least = setting if self.given.checkpointing else replace(setting, checkpointing=LADDER[0])
        taken = forecast(self.work, least, self.budget.card).device.total
        limits = replace(limits, device=CONTEXT + LESS * (min(taken, limits.device) - CONTEXT))
        given = replace(self.given, weights=setting.weights) if keeps_weights else self.given
        found = choose(self.work, self.budget.card, limits, given, _progress)
        return replace(self, budget=replace(self.budget, limits=limits), forecast=found, tries=self.tries + 1)

    @property
    def flags(self) -> str:
        """The options of the setting. How much blocks keep is left to the run, which measures it."""
        setting = self.forecast.setting
        parts = (f"--weight_dtype {setting.weights}", self.exact_flags, "--compile on" * setting.compile)
        return " ".join(part for part in parts if part)

    @property
    def exact_flags(self) -> str:
        """Those of them that change no numbers, with which a run can be resumed."""
        setting = self.forecast.setting
        swapped, disk = f"--blocks_to_swap {setting.streamed}", f"--idle_expert {DISK}"
        return " ".join([swapped] * bool(setting.streamed) + [disk] * setting.idle_on_disk)

    def say(self) -> None:
        """Prints the forecast, and its options."""
        budget = self.budget
        say(f"\n{self.forecast.describe(budget.limits.device + budget.encoders, budget.encoders)}")
        say(f"options: {self.flags}")
        assumed = "" if budget.is_here else f"{ASSUMED_HOST / 1e9:.0f} GB of main memory are assumed; "
        say(f"{assumed}nothing of this is measured: rates are nominal, and times optimistic by perhaps 20 to 30 %")


def find_fit(work: Workload, budget: Budget, given: Given, decisions: Decisions) -> Fit:
    """The fastest setting that fits, by forecast; what is given stays, and so does what a resumed run has had.

    Where the user has decided how weights are stored and how many blocks are swapped, that is the setting, whether it
    fits or not. Raises UserError where nothing fits, and where weights would be others than in the resumed run.
    """
    if budget.is_here and find_spec("bitsandbytes") is None:
        given = replace(given, formats=WITHOUT_LIBRARY)
    found = _kept(work, budget, given, decisions) or _chosen(work, budget, given, decisions)
    if given.weights is None:
        decisions.take("weight_dtype", lambda: found.setting.weights)
    return Fit(work, budget, given, found)


def _kept(work: Workload, budget: Budget, given: Given, decisions: Decisions) -> Forecast | None:
    """The setting that the resumed run has had, within what is given now; None where that is none, or does not fit."""
    counts = {str(count) for count in range(work.shape.num_layers + 1)}
    streamed = decisions.kept("blocks_to_swap", counts.__contains__)
    place = decisions.kept("idle_expert", PLACES.__contains__)
    if streamed is None or given.streamed is not None:
        return None
    had = replace(_with_weights(given, decisions), streamed=int(streamed))
    if given.idle_on_disk is None and place == DISK:
        had = replace(had, idle_on_disk=True)
    try:
        found = choose(work, budget.card, budget.limits, had, _progress)
    except UserError:
        say(f"--blocks_to_swap {streamed}, as in the saved run, does not fit any more by forecast")
        return None
    say(f"--blocks_to_swap {streamed}, as in the saved run")
    return found


def _chosen(work: Workload, budget: Budget, given: Given, decisions: Decisions) -> Forecast:
    """The fastest setting within what is given."""
    given, limits = _with_weights(given, decisions), budget.limits
    try:
        return choose(work, budget.card, limits, given, _progress)
    except UserError as error:
        if given.weights is None or given.streamed is None:
            raise UserError(f"{error}\n{TRY_IT}" if budget.is_here else str(error)) from None
    available = f"{limits.device / 1e9:.2f} GB of the GPU and {limits.host / 1e9:.2f} GB of main memory"
    say(f"by forecast this does not fit into {available}; options that are given are kept")
    kept = given.checkpointing or LADDER[0]
    setting = Setting(given.weights, given.streamed, kept, given.compile, bool(given.idle_on_disk))
    return forecast(work, setting, budget.card)


def _with_weights(given: Given, decisions: Decisions) -> Given:
    """With the weights of the resumed run, where they are not given now."""
    return replace(given, weights=given.weights or decisions.kept("weight_dtype", FORMATS.__contains__))


def given_of(opts: TrainingOptions, num_blocks: int, compiled: bool) -> Given:
    """What the user has decided; `compiled` as `MemoryOptions.compiles` says."""
    return Given(
        weights=None if opts.weight_dtype == "auto" else opts.weight_dtype,
        streamed=opts.count_streamed(num_blocks) if opts.says_what_is_swapped else None,
        checkpointing=None if opts.gradient_checkpointing == AUTO else opts.gradient_checkpointing,
        compile=compiled,
        idle_on_disk=None if opts.idle_expert == "auto" else opts.idle_expert == DISK,
    )


def _progress(settings: list[Setting]) -> Iterable[Setting]:
    return tqdm(settings, desc="forecasting", unit="setting", leave=False)
