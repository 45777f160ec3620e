"""The LoRAs of a model with two experts: whose a file is, and what the files on a command line mean for a model.

A pair is two files whose names differ in the expert alone: style_high_noise.safetensors, style_low_noise.safetensors.
Their common name, style.safetensors, means both.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.adapters.lora_file import LoraError
from utils.adapters.lora_header import EXPERT_KEY, lora_metadata_of
from utils.common.checkpoint_names import EXPERTS
from utils.common.errors import UserError
from wan.configs import FAMILIES

HIGH, LOW = EXPERTS
FAMILY_KEY = "family"  # of a LoRA file's metadata
DEFAULT_STRENGTH = 1.0

# Where a word begins: after anything but a letter, or at the capital of StyleHighNoise. So neither "flow" nor "thigh".
_START = r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[HL])|(?=[HL][a-z]))"
# "high" and "low" also describe pictures; before these words they name no expert.
_ADJECTIVE = r"[ _.-]?(?:angle|contrast|detail|end|fantasy|fps|heels|key|light|poly|quality|res|resolution|speed)s?"
_NOUN = rf"(?:[ _.-]?noise|(?!{_ADJECTIVE}(?![a-z])))(?![a-z])"
_EXPERT = rf"{_START}(?i:(?:high|low){_NOUN}|hi[ _.-]?noise(?![a-z]))"
_ANY_WORD = re.compile(rf"{_START}(?i:high|hi(?=[ _.-]?noise)|low)(?i:[ _.-]?noise)?(?![A-Za-z])")
_REMOVED = re.compile(rf"[ _.-]{_EXPERT}|{_EXPERT}[ _.-]?")

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def expert_of(path: Path, metadata: Mapping[str, str]) -> str | None:
    """The expert that a LoRA file is for, "high_noise" or "low_noise": by its metadata, else by its name.

    None where neither says so. A name says it with one of the two words, however they are written: high_noise,
    HighNoise, hinoise, HIGH.
    """
    stated = metadata.get(EXPERT_KEY)
    return stated if stated in (HIGH, LOW) else _named_expert(path)


def trained_for(path: Path, metadata: Mapping[str, str]) -> str | None:
    """As `expert_of`, but None for a LoRA whose metadata says that its model has no experts, whatever it is called."""
    family = FAMILIES.get(metadata.get(FAMILY_KEY, ""))
    return None if family is not None and not family.boundaries else expert_of(path, metadata)


def find_pair(path: Path) -> dict[str, Path]:
    """The two files that a pair's common name means, by expert from high to low.

    Empty where there are not exactly two, one for each expert, and where the name is that of an existing file.
    """
    if os.path.exists(path) or not os.path.isdir(path.parent):  # a name may be too long for Path.exists
        return {}
    halves = [file for file in sorted(path.parent.iterdir()) if _common_name(file) == path.name]
    found = {_named_expert(file): file for file in halves}
    return {expert: found[expert] for expert in (HIGH, LOW)} if len(halves) == len(found) == 2 else {}


def with_expert(path: Path, expert: str) -> Path:
    """The file of one expert in the pair of this common name. Raises UserError for a name that holds high or low."""
    if word := _ANY_WORD.search(path.stem):
        raise UserError(
            f"{path.name} holds {word[0]!r}, and it is the name of two files, to which _{HIGH} and _{LOW} are appended."
            "\nGive a name without the word."
        )
    return path.with_stem(f"{path.stem}_{expert}")


def resolve_experts(paths: Sequence[Path], experts: Sequence[str]) -> dict[str, Path]:
    """Which expert gets which LoRA file, in the order of `experts`, which are a model's transformers from high to low.

    Two files are high and low, unless they say otherwise themselves. One is a pair's common name, or the file of one
    expert, and then the other expert gets none. A model with a single transformer takes any single file. Raises
    UserError for anything else.
    """
    if len(paths) > len(experts):
        has = "one transformer, which takes one LoRA" if len(experts) == 1 else "two experts, which take one LoRA each"
        raise UserError(f"{len(paths)} LoRAs are given, but the model has {has}. Add others with --also_lora.")
    if len(paths) == 2:
        found = _resolve_two(*paths)
    else:
        found = {expert: path for path in paths for expert, path in _resolve(path, experts).items()}
        if len(found) < len(paths):
            raise UserError(
                f"{paths[0]} does not say which expert it is for. Give two files, that of the {HIGH} expert first, "
                f"or rename it to {paths[0].stem}_{HIGH}.safetensors or {paths[0].stem}_{LOW}.safetensors."
            )
    return {expert: found[expert] for expert in experts if expert in found}


def remarks(files: Mapping[str, Path], experts: Sequence[str]) -> list[str]:
    """What people should know of a choice of `resolve_experts`: one sentence for each expert that it leaves out."""
    if len(experts) > 1:
        return [f"no LoRA for the {expert} expert: it runs as the base" for expert in experts if expert not in files]
    stated = {path: trained_for(path, lora_metadata_of(path)) for path in files.values()}
    made_for = {path: f"{path} was trained for the {expert} expert of a Wan 2.2" for path, expert in stated.items()}
    return [f"{made_for[path]}; here it is used on all noise levels" for path, expert in stated.items() if expert]


def parse_also_lora(text: str) -> tuple[Path, float]:
    """The file and the strength of FILE[:STRENGTH]. The strength is a number after the last colon; else it is 1.

    Raises UserError where there is no file before the colon, and for a number that is too large.
    """
    name, colon, strength = text.rpartition(":")
    if not (colon and _NUMBER.fullmatch(strength)):
        return Path(text), DEFAULT_STRENGTH
    if not name or not math.isfinite(float(strength)):
        raise UserError(f"--also_lora {text}: write FILE or FILE:STRENGTH, such as speed.safetensors:0.8")
    return Path(name), float(strength)


def resolve_also_loras(texts: Sequence[str], experts: Sequence[str]) -> dict[str, list[tuple[Path, float]]]:
    """Which LoRAs, written FILE[:STRENGTH], are added to each expert, with their strengths and in their order.

    A pair's common name means one file for each expert. A file that says no expert is for all. Raises UserError for
    files that are not there, and for a pair where the model has one transformer.
    """
    chosen: dict[str, list[tuple[Path, float]]] = {expert: [] for expert in experts}
    for text in texts:
        path, strength = parse_also_lora(text)
        for expert in experts:
            if (file := lora_of(path, expert, experts)) is not None:
                chosen[expert].append((file, strength))
    return chosen


def lora_of(path: Path, expert: str, experts: Sequence[str]) -> Path | None:
    """The file that a name means for one expert: of a pair its own, any file that says no expert, else none.

    Raises UserError as `resolve_also_loras` does.
    """
    return (_resolve(path, experts) or dict.fromkeys(experts, path)).get(expert)


def _resolve(path: Path, experts: Sequence[str]) -> dict[str, Path]:
    """The files that one name means; none for a file that says no expert where the model has two."""
    pair = find_pair(path)
    if pair and len(experts) == 1:
        high, low = (file.name for file in pair.values())
        raise UserError(f"{path} means {high} and {low}, but this model has one transformer. Give one of the two.")
    if pair:
        return pair
    expert = _stated_expert(path)
    if len(experts) == 1:
        return {experts[0]: path}
    return {expert: path} if expert else {}


def _resolve_two(first: Path, second: Path) -> dict[str, Path]:
    for path in (first, second):
        if find_pair(path):
            raise UserError(f"{path} means two files already, one for each expert. Give it alone.")
    stated = _stated_expert(first), _stated_expert(second)
    if stated[0] is not None and stated[0] == stated[1]:
        raise UserError(f"{first} and {second} are both for the {stated[0]} expert. Give one for each.")
    swapped = stated[0] == LOW or stated[1] == HIGH
    return {LOW: first, HIGH: second} if swapped else {HIGH: first, LOW: second}


def _stated_expert(path: Path) -> str | None:
    """What `expert_of` says of a file. Raises LoraError if there is none."""
    if not os.path.exists(path):
        raise LoraError(f"{path}: there is no such file, and no pair of files that this is the common name of.")
    return expert_of(path, lora_metadata_of(path))


def _named_expert(path: Path) -> str | None:
    words = {match[0].lower()[0] for match in re.finditer(_EXPERT, path.stem)}
    return {"h": HIGH, "l": LOW}[words.pop()] if len(words) == 1 else None


def _common_name(path: Path) -> str | None:
    """The name of a file without its expert; None where it names none."""
    return None if _named_expert(path) is None else _REMOVED.sub("", path.stem) + path.suffix
