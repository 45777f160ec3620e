"""Which family transformers are of: by their tensors, by how they are given, and by name where these do not tell."""

from collections.abc import Mapping
from pathlib import Path

from wan.checkpoints.errors import CheckpointError, shown
from wan.configs import FAMILIES, Family, Traits, match_family, named_family

ALONE, EXPERTS = "transformer", ("high_noise", "low_noise")
TRANSFORMERS = (ALONE, *EXPERTS)


def find_named(name: str) -> Family | None:
    """The family of this name; None for an empty one. Raises CheckpointError for a name that none has."""
    family = named_family(name)
    if name and family is None:
        raise CheckpointError(f"there is no family {name}\nthere are: {', '.join(FAMILIES)}")
    return family


def family_of(traits: Traits, paths: Mapping[str, Path], folder: Path | None, named: Family | None) -> Family:
    """The family of transformers with these traits: the `named` one, or the one they tell.

    Of families with the same tensors the name of the model's `folder` decides. Raises CheckpointError for a kind that
    is not supported, for transformers that are not of the named family, and for an expert that is given alone as
    `transformer`, or the other way round.
    """
    path = next(iter(paths.values()))
    if named is not None:
        _check_named(named, traits, paths)
        return named
    if found := match_family(traits, paths, folder.absolute().name if folder else ""):
        return found
    alike = [family for family in FAMILIES.values() if family.agrees(traits)]
    if same := [family for family in alike if family.allows_transformers(paths)]:
        widths = " and ".join(f"{family.name} has {family.shape.dim}" for family in same)
        raise CheckpointError(f"{path} has the width {traits.dim}, but {widths}")
    names = ", ".join(family.name for family in alike)
    if names and ALONE in paths:
        raise CheckpointError(f"{path} is one of two experts ({names}): give it as high_noise or low_noise")
    if names:
        raise CheckpointError(f"{path} is no expert, but the only transformer of {names}: give it as transformer")
    known = dict.fromkeys(_describe(family.traits) for family in FAMILIES.values())
    kind = _describe(traits)
    raise CheckpointError(f"{path} is of a kind that is not supported: {kind}\nsupported: {', '.join(known)}")


def _check_named(named: Family, traits: Traits, paths: Mapping[str, Path]) -> None:
    """Raises CheckpointError where transformers with these traits are not of the family that is named."""
    path = next(iter(paths.values()))
    if not named.allows_transformers(paths):
        experts = " and ".join(expert.name for expert in named.experts)
        raise CheckpointError(f"{named.name} has {experts}, but {path} is given as {next(iter(paths))}")
    if not named.agrees(traits):
        raise CheckpointError(f"{path} {mismatch(traits, named)}")
    released = [family.shape.dim for family in FAMILIES.values()]
    if traits.dim in released and traits.dim != named.shape.dim:
        raise CheckpointError(f"{path} has the width {traits.dim}, but {named.name} has {named.shape.dim}")


def mismatch(traits: Traits, family: Family) -> str:
    """What transformers have otherwise than a family, for a message."""
    return f"has {_describe(traits)}, but {family.name} has {_describe(family.traits)}"


def _describe(traits: Traits) -> str:
    task = f"{shown(traits.task)} with " if traits.task else ""
    outputs = f" and {shown(traits.out_dim)} output" if traits.out_dim else ""
    tokens = (" and image tokens" if traits.image else "") + (" and image positions" if traits.positions else "")
    return f"{task}{shown(traits.in_dim)} input{outputs} channels{tokens}"
