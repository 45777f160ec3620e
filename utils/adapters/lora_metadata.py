"""Alphas and weight shapes in a LoRA file's metadata, for layouts whose tensors state neither.

    wan_lora_scaling        our own, for WanTraining's layout: {"alpha": {module: number}, "shapes": {module: [sizes]}}
    lora_adapter_metadata   diffusers': a PEFT LoraConfig, each of its fields prefixed with "transformer."

Both are JSON. Nothing of it is used before it is known to have the type that its use needs. Sources: LoraConfig and
`get_pattern_key` of PEFT 0.21, the Wan loader of diffusers 0.42.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.adapters.lora_file import FP32_MAX, MAX_DIMENSIONS, LoraError, LoraFile, shown
from wan.names import diffusers_name

DIFFUSERS_KEY = "lora_adapter_metadata"
OWN_KEY = "wan_lora_scaling"

# diffusers applies its key on top of alpha tensors: a converted file that kept it would be scaled twice.
SCALING_KEYS = (DIFFUSERS_KEY, OWN_KEY)

_PATTERN = re.compile(r"(?:\^|\.\*)?[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Scaling:
    """Alphas and shapes of widened weights by official module name; `shapes` is None where none can be stated."""

    alphas: dict[str, float]
    shapes: dict[str, list[int]] | None = None


def read_scaling(metadata: Mapping[str, str], ranks: Mapping[str, int], path: Path) -> Scaling:
    """What metadata states of the modules with these ranks. Our own key counts before that of diffusers.

    Raises LoraError, with the file's `path`, for JSON of another form than the two above.
    """
    key = OWN_KEY if OWN_KEY in metadata else DIFFUSERS_KEY
    if key not in metadata:
        return Scaling({})
    try:
        content = _table(json.loads(metadata[key]), "its content")
        return _own_scaling(content) if key == OWN_KEY else Scaling(_peft_alphas(content, ranks))
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{path}: the metadata {key} gives no usable alpha: {error}.") from error


def own_metadata(lora: LoraFile) -> dict[str, str]:
    """All that WanTraining's layout leaves unsaid."""
    alphas = {name: pair.alpha for name, pair in sorted(lora.pairs.items()) if pair.alpha is not None}
    return {OWN_KEY: json.dumps({"alpha": alphas, "shapes": lora.input_shapes})}


def diffusers_metadata(lora: LoraFile) -> dict[str, str]:
    """A LoraConfig as diffusers reads it. The patterns are anchored, because PEFT matches the end of a name."""
    ranks = {diffusers_name(name): pair.rank for name, pair in sorted(lora.pairs.items())}
    alphas = {diffusers_name(name): pair.effective_alpha for name, pair in sorted(lora.pairs.items())}
    (rank, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alphas.values()).most_common(1)[0]
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "target_modules": list(ranks),
    }
    return {DIFFUSERS_KEY: json.dumps({f"transformer.{key}": value for key, value in config.items()}, sort_keys=True)}


def _own_scaling(content: Mapping[str, object]) -> Scaling:
    alphas, shapes = _table(content.get("alpha"), "alpha"), _table(content.get("shapes"), "shapes")
    return Scaling(
        {name: _number(alpha, f"alpha of {shown(name)}") for name, alpha in alphas.items()},
        {name: _sizes(shape, f"shape of {shown(name)}") for name, shape in shapes.items()},
    )


def _peft_alphas(content: Mapping[str, object], ranks: Mapping[str, int]) -> dict[str, float]:
    """The alpha that a LoraConfig gives each module: that of the first pattern for its name, else `lora_alpha`."""
    config = {key.removeprefix("transformer."): value for key, value in content.items()}
    config = {key: value for key, value in config.items() if value is not None}
    stabilised = config.get("use_rslora", False)
    if not isinstance(stabilised, bool):
        raise ValueError(f"use_rslora is {shown(stabilised)}, not true or false")
    patterns: dict[str, tuple[int, float]] = {}  # in their canonical form, with their place in the file
    for pattern, alpha in _table(config.get("alpha_pattern", {}), "alpha_pattern").items():
        patterns.setdefault(_canonical(pattern), (len(patterns), _number(alpha, f"alpha of {shown(pattern)}")))
    alphas = dict.fromkeys(ranks, _number(config["lora_alpha"], "lora_alpha")) if "lora_alpha" in config else {}
    for name in ranks:
        if found := [patterns[pattern] for pattern in _patterns_of(name) if pattern in patterns]:
            alphas[name] = min(found)[1]
    # rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023), while a file can only state alpha / rank.
    return {name: alpha * math.sqrt(ranks[name]) if stabilised else alpha for name, alpha in alphas.items()}


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


def _canonical(pattern: str) -> str:
    """A pattern with its dots unescaped. Raises ValueError for one that is more than a name."""
    plain = pattern.replace(r"\.", ".").removesuffix("$")
    if not _PATTERN.fullmatch(plain):
        raise ValueError(
            f"alpha_pattern has {shown(pattern)}, a regular expression; name modules, such as ^blocks.0.attn1.to_q"
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
