"""What two LoRAs have in common, as a table and in sentences: whether one is likely to survive beside the other."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from utils.adapters.beside import Chosen
from utils.adapters.overlap import Overlap, overlaps
from utils.common.errors import UserError
from utils.common.formatting import counted, format_table

HEADER = (
    *("weights of", "in both", "LoRA only", "other only", "size: LoRA", "other", "cosine: mean", "largest"),
    *("inside %: mean", "largest", "inputs %", "outputs %"),
)
EXPLANATION = (
    "size: of the change of the weights, as a Frobenius norm\n"
    "cosine: 1 where both change a weight in the same way, -1 in opposite ways, 0 where they have nothing in common\n"
    "inside: the share of the LoRA's squared change that is in directions in which the other changes the weight too;\n"
    "inputs, outputs: the same for what a layer reads alone, and for what it writes (means)"
)
NAMED = 3  # parts of the model in a sentence

Progress = Callable[[Iterable[tuple[str, Overlap]]], Iterable[tuple[str, Overlap]]]


@dataclass(frozen=True)
class Part:
    """What two LoRAs change in a part of a model."""

    name: str
    overlaps: Sequence[Overlap]

    @property
    def both(self) -> list[Overlap]:
        """Those of the weights that both change."""
        return [overlap for overlap in self.overlaps if overlap.in_both]

    @property
    def sizes(self) -> tuple[float, float]:
        """The Frobenius norm of each LoRA's change of all weights."""
        return math.hypot(*(each.first for each in self.overlaps)), math.hypot(*(each.second for each in self.overlaps))

    @property
    def cosine(self) -> float:
        """That of the changes of all weights together."""
        return sum(each.inner for each in self.both) / math.prod(self.sizes) if self.both else 0.0

    @property
    def inside(self) -> float:
        """The share of the LoRA's squared change that is inside the directions of the other."""
        return self._share(lambda overlap: overlap.shares.inside if overlap.shares else 0.0)

    @property
    def chance(self) -> float:
        """What `inside` would be on average if the two had nothing to do with each other."""
        return self._share(lambda overlap: overlap.shares.chance if overlap.shares else 0.0)

    def row(self) -> tuple[str | float, ...]:
        """Its row of the table; a dash where there is nothing to compare."""
        both, shares = self.both, [each.shares for each in self.both if each.shares]
        first, second = (sum(size > 0 for size in sizes) - len(both) for sizes in self._columns())
        cosines, inside = [each.cosine for each in both], [100 * each.inside for each in shares]
        inputs, outputs = [100 * each.inputs for each in shares], [100 * each.outputs for each in shares]
        sizes = [float(f"{size:.3g}") for size in self.sizes]
        compared = *_mean_and_largest(cosines, "7.3f"), *_mean_and_largest(inside, "6.2f")
        means = _mean_and_largest(inputs, "6.2f")[0], _mean_and_largest(outputs, "6.2f")[0]
        return self.name, len(both), first, second, *sizes, *compared, *means

    def _columns(self) -> tuple[list[float], list[float]]:
        return [each.first for each in self.overlaps], [each.second for each in self.overlaps]

    def _share(self, of: Callable[[Overlap], float]) -> float:
        """The mean by squared size: what one LoRA changes alone counts as nothing."""
        whole = self.sizes[0] ** 2
        return sum(each.first**2 * of(each) for each in self.both) / whole if whole else 0.0


def reports(
    own: Mapping[str, Sequence[Chosen]], others: Mapping[str, Sequence[Chosen]], progress: Progress = iter
) -> list[str]:
    """For each transformer, what its LoRA of `own` and its LoRA of the `others` have in common.

    `progress` may wrap the weights in a bar. Raises UserError where a transformer has several of the others.
    """
    for loras in others.values():
        if len(loras) > 1:
            names = " and ".join(str(chosen.path) for chosen in loras)
            raise UserError(f"--check_lora compares with one LoRA of --also_lora, not with {names}: leave out one")
    texts = []
    for name in own:
        title = f"the {name} expert" if len(own) > 1 else "the transformer"
        if own[name] and others[name]:
            texts.append(f"{title}\n{report(own[name][0], others[name][0], progress)}")
        else:
            texts.append(f"{title}: not both LoRAs are for it, so there is nothing to compare")
    return texts


def report(first: Chosen, second: Chosen, progress: Progress = iter) -> str:
    """A table with a row for each block, what its columns mean, and sentences that say what it comes to."""
    found: dict[str, list[Overlap]] = {}
    for name, overlap in progress(overlaps(first, second)):
        block = re.match(r"blocks\.(\d+)\.", name)
        found.setdefault(f"block {block[1]}" if block else "other layers", []).append(overlap)
    parts = [Part(name, found[name]) for name in sorted(found, key=_order)]
    whole = Part("all", [overlap for part in parts for overlap in part.overlaps])
    table = format_table(HEADER, [part.row() for part in (*parts, whole)])
    return "\n".join([table, EXPLANATION, *_summary(parts, whole, first, second), *_notes(whole, first, second)])


def _summary(parts: Sequence[Part], whole: Part, first: Chosen, second: Chosen) -> list[str]:
    """What a table comes to."""
    if not whole.both:
        return [f"{first.path} and {second.path} change no weight in common: neither touches what the other changes"]
    most = sorted(parts, key=lambda part: part.inside, reverse=True)[:NAMED]
    named = ", ".join(f"{part.name} ({_percent(part.inside)})" for part in most if part.inside)
    size, other = whole.sizes
    return [
        f"{first.path} changes the weights {size / other:.2g} times as much as {second.path}, "
        f"with a cosine of {whole.cosine:.2g}",
        f"{_percent(whole.inside)} of its squared change is inside the directions of the other, where chance would "
        f"give {_percent(whole.chance)}{f'; most in {named}' if named else ''}",
        "what is inside is where one can disturb the other; what that does to a video is in the pictures",
    ]


def _notes(whole: Part, first: Chosen, second: Chosen) -> list[str]:
    """What a table leaves out."""
    dora = [chosen.path for chosen in (first, second) if chosen.lora.magnitudes]
    notes = [f"note: {path} is a DoRA, whose lengths of weights are left out here" for path in dora]
    if count := sum(overlap.shares is None for overlap in whole.both):
        changes = f"{counted(count, 'change')} of {second.path} are no product of two matrices and have all directions"
        notes.append(f"note: {changes}: they count in the cosine, and nothing is counted as inside of them")
    return notes


def _order(name: str) -> tuple[bool, int]:
    """Blocks by their number, then the rest."""
    number = name.removeprefix("block ")
    return not number.isdigit(), int(number) if number.isdigit() else 0


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _mean_and_largest(values: Sequence[float], form: str) -> tuple[str, str]:
    """The mean, and the largest magnitude, of some width, so that they are below each other; dashes for no values."""
    if not values:
        return (f"{'-':>{form[0]}}",) * 2
    return f"{sum(values) / len(values):{form}}", f"{max(values, key=abs):{form}}"
