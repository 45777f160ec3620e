"""The fastest setting that fits a GPU, by forecast."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from utils.common.errors import UserError
from utils.common.formatting import readable_size
from utils.training.calibration import Workload
from utils.training.cards import Card
from utils.training.checkpoint_plan import LADDER
from utils.training.forecast import SLOTS, Forecast, Setting, forecast

WEIGHTS = ("bf16", "int8", "nf4")  # in the order of preference. fp8 takes as much as int8 and is less exact
WITHOUT_LIBRARY = WEIGHTS[:-1]  # without bitsandbytes
AS_FAST = 1.02  # times the fastest: the forecast does not know better


@dataclass(frozen=True)
class Given:
    """The parts of a setting that the user has decided. None: not decided.

    Whether blocks are compiled is not chosen here: that depends on a working compiler, and on how long a run is.
    """

    weights: str | None = None
    streamed: int | None = None
    checkpointing: str | tuple[str, ...] | None = None
    compile: bool = False
    idle_on_disk: bool | None = None
    formats: tuple[str, ...] = WEIGHTS  # of which weights are chosen where they are not decided


@dataclass(frozen=True)
class Limits:
    """The memory that may be used, in bytes.

    Encoders may be on the device too: beside what a step takes there are their weights, which are not in `device` any
    more, and while one computes, `encoding` bytes of activations, when blocks keep nothing.
    """

    device: float
    host: float
    encoding: float = 0.0

    def hold(self, found: Forecast) -> bool:
        return self.needed(found) <= self.device and found.host.total <= self.host

    def needed(self, found: Forecast) -> float:
        """The bytes on the device, in a step or while an encoder computes."""
        return max(found.device.total, found.device.resident + self.encoding)


def choose(
    work: Workload,
    card: Card,
    limits: Limits,
    given: Given = Given(),
    progress: Callable[[list[Setting]], Iterable[Setting]] = iter,
) -> Forecast:
    """The fastest setting that fits, with its forecast; what is given stays.

    For each format of weights, and each number of streamed blocks, blocks keep as much as there is room for, which is
    the fastest: a position on the ladder of `_positions`, found by halving. Of what fits, all that is within 2 percent
    of the fastest counts as equal; the first of these is chosen, by format, then by fewer streamed blocks. Of two
    experts, the idle one is on disk only where nothing fits otherwise.

    Raises UserError, which says what would fit, where nothing does.
    """
    for on_disk in (False, True):
        bases = [base for base in _bases(work, given) if base.idle_on_disk == on_disk]
        tried = progress(bases) if bases else ()
        fitting = [found for base in tried if (found := _most_kept(work, card, limits, given, base))]
        if fitting:
            break
    else:
        raise UserError(_what_would_fit(work, card, limits, given))
    fastest = min(found.seconds.total for found in fitting)
    return next(found for found in fitting if found.seconds.total <= AS_FAST * fastest)


def _bases(work: Workload, given: Given) -> Iterator[Setting]:
    """What is tried of weights and streaming, in the order of preference."""
    depth = work.shape.num_layers
    # Fewer blocks than there are slots for would save nothing.
    streamed = (0, *range(SLOTS + 1, depth + 1)) if given.streamed is None else (given.streamed,)
    places = (False, True) if work.waiting else (False,)
    for weights in given.formats if given.weights is None else (given.weights,):
        for count in streamed:
            for on_disk in places if given.idle_on_disk is None else (given.idle_on_disk,):
                yield Setting(weights, count, compile=given.compile, idle_on_disk=on_disk)


def _positions(depth: int, given: Given) -> list[str | tuple[str, ...]]:
    """What blocks may keep, from the least to the most; the first blocks keep most."""
    if given.checkpointing is not None:
        return [given.checkpointing]
    steps = zip(LADDER, LADDER[1:], strict=False)
    mixed = [(upper,) * count + (lower,) * (depth - count) for lower, upper in steps for count in range(depth)]
    return [*mixed, (LADDER[-1],) * depth]


def _most_kept(work: Workload, card: Card, limits: Limits, given: Given, base: Setting) -> Forecast | None:
    """The forecast with the highest position that fits, None if none does."""
    positions = _positions(work.shape.num_layers, given)
    first, last, best = 0, len(positions) - 1, None
    while first <= last:
        middle = (first + last) // 2
        found = forecast(work, replace(base, checkpointing=positions[middle]), card)
        fits = limits.hold(found)
        if fits:
            best = found
        # Inputs that wait in main memory are fewer further up.
        if fits or (limits.needed(found) <= limits.device and found.host.total > limits.host):
            first = middle + 1
        else:
            last = middle - 1
    # With the last block of a kind the working memory of that kind goes: all of one kind may fit where a mixture of
    # the same level does not.
    for position in positions[first:]:
        if len(set(position)) == 1:
            found = forecast(work, replace(base, checkpointing=position), card)
            best = found if limits.hold(found) else best
    return best


def _what_would_fit(work: Workload, card: Card, limits: Limits, given: Given) -> str:
    """A sentence: what the least setting takes, and with how many tokens it fits."""
    least = _positions(work.shape.num_layers, given)[0]
    tried = [forecast(work, replace(base, checkpointing=least), card) for base in _bases(work, given)]
    found = min(tried, key=lambda each: max(limits.needed(each) / limits.device, each.host.total / limits.host))
    needed, available = (
        f"{readable_size(int(device))} of GPU memory and {readable_size(int(host))} of main memory"
        for device, host in ((limits.needed(found), found.host.total), (limits.device, limits.host))
    )
    return (
        f"{work.tokens:,} tokens do not fit into {available}\n"
        f"the least takes {needed}: {found.setting.describe(work.shape.num_layers)}\n"
        f"{_advice(work, card, limits, found)}"
    )


def _advice(work: Workload, card: Card, limits: Limits, found: Forecast) -> str:
    """Which options would make the least setting fit."""
    if limits.encoding and found.device.resident + limits.encoding > limits.device:
        return (
            f"of that the VAE takes {readable_size(int(limits.encoding))} while it computes: --cache_latents 1 without "
            "previews keeps it off the GPU"
        )
    half = forecast(replace(work, tokens=work.tokens // 2), found.setting, card)
    # Memory is linear in the number of tokens.
    slopes = [
        (limit - now, (now - before) / (work.tokens - half.work.tokens))
        for limit, now, before in (
            (limits.device, found.device.total, half.device.total),
            (limits.host, found.host.total, half.host.total),
        )
    ]
    tokens = int(work.tokens + min((left / slope if slope else left) for left, slope in slopes))
    return f"--token_limit {tokens // 10 * 10} would fit" if tokens > 100 else "nor do fewer tokens fit"
