"""Alphas and weight shapes that a LoRA file states outside of its tensors.

    adapter_config.json     of a PEFT folder (`peft_folder`)
    wan_lora_scaling        our own, for WanTraining's layout: {"alpha": {module: number}, "shapes": {module: [sizes]}}
    lora_adapter_metadata   diffusers': a PEFT LoraConfig, each of its fields prefixed with "transformer."
    lora_alpha, network_alpha, ss_network_alpha    one number for all modules

All but the first are in the metadata; what is no plain number is JSON. Nothing of it is used before it is known to have
the type that its use needs. Sources: LoraConfig and `get_pattern_key` of PEFT 0.21, the Wan loader of diffusers 0.42,
`network_alpha` of kohya's scripts.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.adapters.lora_file import FP32_MAX, MAX_DIMENSIONS, LoraError, LoraFile, LoraPair, shown
from utils.adapters.pairs import EXPERT_KEY, LOW
from wan.names import diffusers_name

DIFFUSERS_KEY = "lora_adapter_metadata"
OWN_KEY = "wan_lora_scaling"
NUMBER_KEYS = ("lora_alpha", "network_alpha", "ss_network_alpha")

# A converted file states its alphas in its own way: diffusers applies its key on top of alpha tensors, for instance.
SCALING_KEYS = (DIFFUSERS_KEY, OWN_KEY, "lora_alpha", "network_alpha")

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_PATTERN = re.compile(r"(?:\^|\.\*)?[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Statement:
    """Where a file states alphas, for people, and the alphas by official module name; whether by one number for all."""

    source: str
    alphas: Mapping[str, float]
    is_of_all: bool = False


def read_statements(metadata: Mapping[str, str], ranks: Mapping[str, int], where: str) -> list[Statement]:
    """What metadata states of the modules with these ranks, the statement that counts first.

    Raises LoraError, with `where` in the file's place, for JSON of another form than the above.
    """
    statements = []
    for key in (OWN_KEY, DIFFUSERS_KEY):
        if key in metadata:
            try:
                content = _table(json.loads(metadata[key]), "its content")
                alphas = _own_alphas(content) if key == OWN_KEY else _diffusers_alphas(content, metadata, ranks)
            except (ValueError, RecursionError) as error:
                raise LoraError(f"{where}: the metadata {key} gives no usable alpha: {error}.") from error
            statements.append(Statement(f"the metadata {key}", alphas))
    for key in NUMBER_KEYS:
        if (alpha := _plain_number(metadata.get(key, ""))) is not None:
            statements.append(Statement(f"the metadata {key}", dict.fromkeys(ranks, alpha), is_of_all=True))
    return statements


def read_shapes(metadata: Mapping[str, str], path: Path) -> dict[str, list[int]] | None:
    """The shapes of widened weights that our own key states; None where there is no such key. Raises LoraError."""
    if OWN_KEY not in metadata:
        return None
    try:
        shapes = _table(_table(json.loads(metadata[OWN_KEY]), "its content").get("shapes"), "shapes")
        return {name: _sizes(shape, f"shape of {shown(name)}") for name, shape in shapes.items()}
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{path}: the metadata {OWN_KEY} gives no usable shape: {error}.") from error


def reconcile(
    statements: Sequence[Statement], tensors: Mapping[str, float], names: Sequence[str], path: Path
) -> tuple[dict[str, float], list[str]]:
    """The alphas of the modules of these names, and a sentence for what is not as the file's metadata says.

    Alphas in tensors count first: ComfyUI reads no others, and files that were resized keep their old metadata. One
    number for all modules that is not that of some is not taken for the others either. A module of which nothing is
    stated gets none. Raises LoraError where statements outside of the tensors disagree about a module that has no alpha
    among them.
    """
    alphas, notes, trusted = dict(tensors), [], []
    for statement in statements:
        differing = [name for name in names if name in tensors and _differ(tensors, statement.alphas, name)]
        if differing:
            said, counted = statement.alphas[differing[0]], tensors[differing[0]]
            where = differing[0] if len(differing) == 1 else f"{differing[0]} and {len(differing) - 1} more"
            notes.append(
                f"{path}: {statement.source} says alpha {said:g}, the tensors {counted:g} ({where}): these count"
            )
        if not (differing and statement.is_of_all):
            trusted.append(statement)
    for name in names:
        if name in tensors:
            continue
        stating = [statement for statement in trusted if name in statement.alphas]
        for other in stating[1:]:
            if _differ(stating[0].alphas, other.alphas, name):
                first = f"{stating[0].source} says {stating[0].alphas[name]:g}"
                raise LoraError(
                    f"{path}: the alpha of {name} is stated twice, and differently: {first}, {other.source} says "
                    f"{other.alphas[name]:g}. Remove the wrong statement from the file."
                )
        if stating:
            alphas[name] = stating[0].alphas[name]
    return alphas, notes


def _differ(first: Mapping[str, float], other: Mapping[str, float], name: str) -> bool:
    """Whether both state an alpha, and not the same: to the precision of bf16, in which some tools store it."""
    return name in first and name in other and not math.isclose(first[name], other[name], rel_tol=2**-8)


def restated(lora: LoraFile) -> dict[str, str]:
    """A LoRA's metadata, in which kohya's rank and alpha, where they are stated, are those that it has.

    Programs that resize LoRAs write "Dynamic" for ranks that differ from module to module.
    """
    scaled = [each for each in lora.factors.values() if each.rank]
    found: dict[str, set[float | None]] = {"ss_network_dim": {each.rank for each in scaled}}
    found["ss_network_alpha"] = {each.alpha for each in scaled}
    metadata = dict(lora.metadata)
    for key in found.keys() & metadata.keys():
        values = found[key] or {None}  # of none: whole factors and full changes have neither rank nor alpha
        (first,) = values if len(values) == 1 else ("Dynamic",)
        metadata[key] = first if isinstance(first, str) else "" if first is None else f"{first:.9g}"
    return {key: value for key, value in metadata.items() if value or key not in found}


def own_metadata(lora: LoraFile) -> dict[str, str]:
    """All that WanTraining's layout leaves unsaid, of what is known."""
    alphas = {name: pair.alpha for name, pair in sorted(lora.pairs.items()) if pair.alpha is not None}
    return {OWN_KEY: json.dumps({"alpha": alphas, "shapes": lora.input_shapes})}


def diffusers_metadata(lora: LoraFile) -> dict[str, str]:
    """A LoraConfig as diffusers reads it; none where no alpha is known and diffusers takes the rank by itself."""
    pairs = {diffusers_name(name): pair for name, pair in sorted(lora.pairs.items())}
    if all(pair.alpha is None for pair in pairs.values()) and len({pair.rank for pair in pairs.values()}) == 1:
        return {}
    # diffusers looks for biases by itself only where there is no such key.
    biased = {"lora_bias": True} if any(key.endswith(".diff_b") for key in lora.diffs) else {}
    config = {f"transformer.{key}": value for key, value in {**peft_scales(pairs), **biased}.items()}
    return {DIFFUSERS_KEY: json.dumps(config, sort_keys=True)}


def peft_scales(pairs: Mapping[str, LoraPair]) -> dict[str, object]:
    """The fields of a LoraConfig that give these modules their ranks and alphas.

    The patterns are anchored, because PEFT matches the end of a name.
    """
    ranks = {name: pair.rank for name, pair in pairs.items()}
    alphas = {name: pair.effective_alpha for name, pair in pairs.items()}
    (rank, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alphas.values()).most_common(1)[0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "target_modules": list(ranks),
    }


def _own_alphas(content: Mapping[str, object]) -> dict[str, float]:
    alphas = _table(content.get("alpha"), "alpha")
    return {name: _number(alpha, f"alpha of {shown(name)}") for name, alpha in alphas.items()}


def _diffusers_alphas(
    content: Mapping[str, object], metadata: Mapping[str, str], ranks: Mapping[str, int]
) -> dict[str, float]:
    return peft_alphas(_of_transformer(content, metadata.get(EXPERT_KEY)), ranks)


def _of_transformer(content: Mapping[str, object], expert: str | None) -> dict[str, object]:
    """diffusers' fields without the name of the model before them: a second expert's are "transformer_2."."""
    second = {
        key.removeprefix("transformer_2."): value for key, value in content.items() if key.startswith("transformer_2.")
    }
    if second and (expert == LOW or not any(key.startswith("transformer.") for key in content)):
        return second
    return {key.removeprefix("transformer."): value for key, value in content.items()}


def peft_alphas(config: Mapping[str, object], ranks: Mapping[str, int]) -> dict[str, float]:
    """The alpha that a LoraConfig gives each module: that of the first pattern for its name, else `lora_alpha`.

    Raises ValueError for fields of another type.
    """
    config = {key: value for key, value in config.items() if value is not None}
    stabilised = config.get("use_rslora", False)
    if not isinstance(stabilised, bool):
        raise ValueError(f"use_rslora is {shown(stabilised)}, not true or false")
    alphas = by_pattern(config, "lora_alpha", "alpha_pattern", ranks)
    # rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023), while a file can only state alpha / rank.
    return {name: alpha * math.sqrt(ranks[name]) if stabilised else alpha for name, alpha in alphas.items()}


def by_pattern(config: Mapping[str, object], default: str, patterns: str, names: Iterable[str]) -> dict[str, float]:
    """What a field of a LoraConfig and the patterns that go before it give each module, where they give anything.

    Raises ValueError for fields of another type.
    """
    table: dict[str, tuple[int, float]] = {}  # patterns in their canonical form, with their place in the file
    for pattern, number in _table(config.get(patterns, {}), patterns).items():
        place = len(table), _number(number, f"the number of {shown(pattern)} in {patterns}")
        table.setdefault(_canonical(pattern, patterns), place)
    numbers = dict.fromkeys(names, _number(config[default], default)) if default in config else {}
    for name in names:
        if found := [table[pattern] for pattern in _patterns_of(name) if pattern in table]:
            numbers[name] = min(found)[1]
    return numbers


def _plain_number(text: str) -> float | None:
    """A number that metadata hold as text; None for what is none, such as the "Dynamic" of resized files."""
    number = float(text) if _NUMBER.fullmatch(text.strip()) else math.nan
    return number if abs(number) <= FP32_MAX else None


def _patterns_of(name: str) -> Iterator[str]:
    """Every canonical pattern that means this module.

    PEFT runs a pattern as a regular expression on the end of a name. A file must not choose an expression, which can
    take forever, so the three forms that tools write are looked up instead: "^name", "name", and ".*name".
    """
    for known in {name, diffusers_name(name)}:
        parts = known.split(".")
        yield f"^{known}"
        yield from (".".join(parts[start:]) for start in range(len(parts)))
        yield from (f".*{known[start:]}" for start in range(len(known)))


def _canonical(pattern: str, field: str) -> str:
    """A pattern with its dots unescaped. Raises ValueError for one that is more than a name."""
    plain = pattern.replace(r"\.", ".").removesuffix("$")
    if not _PATTERN.fullmatch(plain):
        raise ValueError(
            f"{field} has {shown(pattern)}, a regular expression; name modules, such as ^blocks.0.attn1.to_q"
        )
    return plain


def _table(value: object, what: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}, not a JSON object")
    return value


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FP32_MAX:
        raise ValueError(f"{what} is {shown(value)}, not a finite number")
    return float(value)


def _sizes(value: object, what: str) -> list[int]:
    sizes = value if isinstance(value, list) and 2 <= len(value) <= MAX_DIMENSIONS else []
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{what} is {shown(value)}, not a list of 2 to {MAX_DIMENSIONS} positive integers")
    return sizes
