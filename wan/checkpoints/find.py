"""Where the files of a model are and which family they make. Of weights only names and shapes are read.

Official folder        config.json, diffusion_pytorch_model*.safetensors (one file, or shards with their index),
                       Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/. Of two experts each is in a
                       folder with its own config.json. The row of a release in `wan.configs` has the names of its own.
diffusers folder       transformer/, transformer_2/ (the low-noise expert), vae/, text_encoder/, tokenizer/,
                       image_encoder/
Single files           given by the names of the PARTS, beside a folder or instead of one, such as those for ComfyUI
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from wan.checkpoints.errors import CheckpointError, ModelNotFoundError, shown
from wan.checkpoints.parts import (
    build_text_encoder,
    build_transformer,
    build_vae,
    check_module,
    check_vision,
    shape_of_vision,
)
from wan.checkpoints.tensors import existing
from wan.checkpoints.transformer import CONFIG, Config, TransformerFiles, read_config, read_transformer
from wan.checkpoints.variants import refuse_variant_by_config
from wan.checkpoints.weights import Weights, read_weights
from wan.configs import FAMILIES, Family, Traits, match_family, named_family

LOCAL_MODELS = Path("models")
TOKENIZER = Path("google", "umt5-xxl")  # of every release; alone it is looked for below LOCAL_MODELS
ALONE, EXPERTS = "transformer", ("high_noise", "low_noise")
PARTS = (ALONE, *EXPERTS, "vae", "text_encoder", "clip", "tokenizer")
_DIFFUSERS = {"vae": "vae", "text_encoder": "text_encoder", "clip": "image_encoder", "tokenizer": "tokenizer"}
AnyPath = str | Path


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: which family it is of, and where its parts are. `open_model` makes it once per run."""

    source: str  # the name or path it was opened by
    family: Family
    transformers: Mapping[str, TransformerFiles]  # by the names of the family's experts, one of which may be missing
    vae: Weights
    text_encoder: Weights
    tokenizer: Path  # the folder of tokenizer.json
    text_len: int  # text tokens that the transformers read
    clip: Weights | None = None  # the vision encoder, where the family has one

    @property
    def transformer(self) -> TransformerFiles:
        """The transformer of a model that has only one."""
        (transformer,) = self.transformers.values()
        return transformer


def find_model(name_or_path: AnyPath) -> Path:
    """The folder of a model: a path, or a hub name under ./models/. Raises ModelNotFoundError."""
    for folder in (Path(name_or_path), LOCAL_MODELS / name_or_path):
        if folder.is_dir():
            return folder
    name = str(name_or_path)
    if Path(name).is_file():
        raise CheckpointError(f"{name} is a file, not the folder of a model: give it as the part that it holds")
    raise ModelNotFoundError(name, f"no model at {name} or {LOCAL_MODELS / name}")


def find_family(path: AnyPath | None = None, family: str = "", **files: AnyPath | None) -> Family:
    """The family of a model as `open_model` finds it. Only its transformers are needed; of a folder, config.json.

    A release, or the row named `family`, need not be there at all; a folder comes first. Raises ModelNotFoundError
    where there is nothing, and CheckpointError for a model that is not supported.
    """
    given, row = _given_files(files), named_row(family)
    try:
        folder = None if path is None else find_model(path)
    except ModelNotFoundError:
        if not given and (released := row or named_family(str(path))):
            return released
        raise
    if row and not given and folder is None:
        return row
    places = _places(folder, given, row)
    configs = _configs(places)
    if given.keys().isdisjoint(places) and configs:
        traits = next(iter(configs.values())).traits(is_alone=len(places) == 1)
        for config in configs.values():
            refuse_variant_by_config(config.path, config.values, places)
        return _family_of(traits, places, folder, row)
    return _read_transformers(folder, places, row)[0]


def open_model(path: AnyPath | None = None, family: str = "", **files: AnyPath | None) -> ModelFiles:
    """The files of a model: those of its folder, any of which may be replaced, or single files that make one.

    `files` may name the PARTS of a model; None counts as not given. Its transformers say which family it is, as far as
    tensors can; `family` names the row where several have the same. Names and shapes of all parts are checked. Raises
    CheckpointError for a file that is missing or damaged, of another kind of model, or that does not fit the others,
    for a part that the model does not have, and as `find_model` does.
    """
    given, row = _given_files(files), named_row(family)
    folder = None if path is None else find_model(path)
    row, transformers = _read_transformers(folder, _places(folder, given, row), row)
    first = next(iter(transformers.values()))
    if "clip" in given and not row.clip:
        raise CheckpointError(f"{given['clip']} cannot be used: the model has no part called clip")
    places = {name: _find_part(name, row, given, folder) for name in _DIFFUSERS if name != "clip" or row.clip}
    tokenizer = _find_tokenizer(places.pop("tokenizer"))
    weights = {name: read_weights(place, name) for name, place in places.items()}
    source = str(first.path if path is None else path)
    found = ModelFiles(source, row, transformers, tokenizer=tokenizer, text_len=first.shape.text_len, **weights)
    _check_parts(found)
    return found


def need_transformers(files: ModelFiles, names: Iterable[str]) -> None:
    """Raises CheckpointError unless the model has these transformers: of two experts one may not have been given."""
    for name in names:
        if name not in files.transformers:
            raise CheckpointError(f"no {name} is given, and no model folder that has one")


def clip_weights(files: ModelFiles) -> Weights:
    """The weights of the model's vision encoder. Raises CheckpointError for a model that has none."""
    if files.clip is None:
        raise CheckpointError(f"{files.source} has no vision encoder: its transformer reads no image tokens")
    return files.clip


def named_row(name: str) -> Family | None:
    """The row of this name; None for an empty one. Raises CheckpointError for a name that no row has."""
    row = named_family(name)
    if name and row is None:
        raise CheckpointError(f"there is no family {name}\nthere are: {', '.join(FAMILIES)}")
    return row


# ---------------------------------------------------------------------------------------------------- the transformers


def _given_files(files: Mapping[str, AnyPath | None]) -> dict[str, Path]:
    if unknown := files.keys() - set(PARTS):
        raise TypeError(f"unknown parts of a model: {', '.join(sorted(unknown))}")
    given = {name: Path(place) for name, place in files.items() if place is not None}
    experts = [name for name in EXPERTS if name in given]
    if ALONE in given and experts:
        raise CheckpointError(f"{ALONE} and {experts[0]} exclude each other: a model has one, or two experts")
    return given


def _places(folder: Path | None, given: Mapping[str, Path], row: Family | None) -> dict[str, Path]:
    """Where the transformers are, by their names: the folder's, of which given ones replace some, or given ones alone.

    Given ones that the folder does not have replace all of its own: the folder then has the other parts.
    """
    own = _transformers_in(folder) if folder else {}
    chosen = {name: given[name] for name in (ALONE, *EXPERTS) if name in given}
    if not own and not chosen:
        faults = f"{folder} is not a model: it has no transformer in the official layout or in that of diffusers"
        raise CheckpointError(faults if folder else "no model is given: neither its folder nor its transformer")
    if ALONE in chosen and len(own) > 1 and row is None:
        raise CheckpointError(f"{chosen[ALONE]} cannot be used: {folder} has two experts, {' and '.join(own)}")
    return own | chosen if chosen.keys() <= own.keys() else chosen


def _transformers_in(folder: Path) -> dict[str, Path]:
    """The folders of a model's transformers by their names, in whichever layout is there; none where there is none."""
    if (folder / ALONE).is_dir() and not (folder / CONFIG).exists():
        pair = folder / ALONE, folder / f"{ALONE}_2"
        return dict(zip(EXPERTS, pair, strict=True)) if pair[1].is_dir() else {ALONE: pair[0]}
    layouts = [{expert.name: folder / expert.folder for expert in family.experts} for family in FAMILIES.values()]
    for layout in layouts:
        if all((place / CONFIG).exists() for place in layout.values()):
            return layout
    for layout in layouts:  # of one that is there in part, what is missing is named
        if any((place / CONFIG).exists() or (place != folder and place.exists()) for place in layout.values()):
            return {name: existing(place) for name, place in layout.items()}
    return {ALONE: folder} if any(folder.glob("*.safetensors*")) else {}


def _configs(places: Mapping[str, Path]) -> dict[str, Config]:
    """The config.json of each transformer that has one. One beside a single file may be that of another part."""
    configs = {}
    for name, place in places.items():
        folder = place if place.is_dir() else place.parent
        if (folder / CONFIG).exists():
            config = read_config(folder)
            if place.is_dir() or config.is_of_transformer:
                configs[name] = config
    return configs


def _read_transformers(
    folder: Path | None, places: Mapping[str, Path], row: Family | None
) -> tuple[Family, dict[str, TransformerFiles]]:
    """The family of the transformers at these places, and what is known of each of them."""
    configs = _configs(places)
    # A given file without a config.json may be another version of the folder's own transformer.
    others = _configs(_transformers_in(folder)).values() if folder and len(configs) < len(places) else ()
    found = {name: read_transformer(place, configs.get(name), others) for name, place in places.items()}
    for config in configs.values():
        refuse_variant_by_config(config.path, config.values, places)
    tasks = {name: config.values.get("model_type") for name, config in configs.items()}
    traits = {name: replace(files.traits, task=tasks.get(name)) for name, files in found.items()}
    first = next(iter(found.values()))
    family = _family_of(next(iter(traits.values())), places, folder or first.path.parent, row)
    for name, files in found.items():
        if not family.agrees(traits[name]):
            raise CheckpointError(f"{files.path} {_otherwise(traits[name], family)}")
        _check_same_widths(first, files)
        check_module(build_transformer(files), files)
    return family, found


def _family_of(traits: Traits, places: Mapping[str, Path], folder: Path | None, row: Family | None) -> Family:
    """The family of transformers with these traits: the `row` that they are said to be of, or the one they tell."""
    place = next(iter(places.values()))
    if row is not None:
        _check_row(row, traits, places)
        return row
    if found := match_family(traits, places, folder.absolute().name if folder else ""):
        return found
    names = ", ".join(family.name for family in FAMILIES.values() if family.agrees(traits))
    if names and ALONE in places:
        raise CheckpointError(f"{place} is one of two experts ({names}): give it as high_noise or low_noise")
    if names:
        raise CheckpointError(f"{place} is no expert, but the only transformer of {names}: give it as transformer")
    known = dict.fromkeys(_describe(family.traits) for family in FAMILIES.values())
    kind = _describe(traits)
    raise CheckpointError(f"{place} is of a kind that is not supported: {kind}\nsupported: {', '.join(known)}")


def _check_row(row: Family, traits: Traits, places: Mapping[str, Path]) -> None:
    """Raises CheckpointError where transformers with these traits are not of the family that they are said to be of."""
    place = next(iter(places.values()))
    if not row.has_transformers(places):
        experts = " and ".join(expert.name for expert in row.experts)
        raise CheckpointError(f"{row.name} has {experts}, but {place} is given as {next(iter(places))}")
    if not row.agrees(traits):
        raise CheckpointError(f"{place} {_otherwise(traits, row)}")
    released = {family.shape.dim for family in FAMILIES.values()}
    if traits.dim in released and traits.dim != row.shape.dim:
        raise CheckpointError(f"{place} has the width {traits.dim}, but {row.name} has {row.shape.dim}")


def _otherwise(traits: Traits, family: Family) -> str:
    return f"has {_describe(traits)}, but {family.name} has {_describe(family.traits)}"


def _describe(traits: Traits) -> str:
    task = f"{shown(traits.task)} with " if traits.task else ""
    outputs = f" and {shown(traits.out_dim)} output" if traits.out_dim else ""
    tokens = (" and image tokens" if traits.image else "") + (" and image positions" if traits.positions else "")
    return f"{task}{shown(traits.in_dim)} input{outputs} channels{tokens}"


def _check_same_widths(first: TransformerFiles, other: TransformerFiles) -> None:
    """Raises CheckpointError for experts that are not of one model."""
    ours, theirs = asdict(first.shape), asdict(other.shape)
    for name in ours:
        if ours[name] != theirs[name]:
            facts = f"{other.path} has {name} {theirs[name]}, but {first.path} has {ours[name]}"
            raise CheckpointError(f"{facts}: they are not experts of one model")


# ----------------------------------------------------------------------------------------------------- the other parts


def _find_part(name: str, row: Family, given: Mapping[str, Path], folder: Path | None) -> Path:
    """Where a part of the model is: as given, or in the model's folder, whose layout says what it is called there."""
    if name in given:
        return existing(given[name])
    alone = LOCAL_MODELS / TOKENIZER if name == "tokenizer" else None
    if folder is None:
        if alone and alone.exists():
            return alone
        raise CheckpointError(f"no {name} is given, and no model folder that has one")
    official = folder / getattr(row, name)
    known = [official, official.with_suffix(".safetensors"), folder / _DIFFUSERS[name], *([alone] if alone else [])]
    usual = folder / _DIFFUSERS[name] if (folder / ALONE).is_dir() else official
    if found := next((place for place in known if place.exists()), None):
        return found
    gone = ", a link to a file that is gone" if usual.is_symlink() else ""
    raise CheckpointError(f"{usual} is missing{gone}, and no {name} is given instead")


def _find_tokenizer(place: Path) -> Path:
    """The folder of tokenizer.json: the place itself, that of the file, or below a model's folder."""
    if place.name == "tokenizer.json":
        return place.parent
    known = (place, place / TOKENIZER, place / _DIFFUSERS["tokenizer"])
    found = next((folder for folder in known if (folder / "tokenizer.json").exists()), None)
    return found or existing(place / "tokenizer.json").parent


def _check_parts(files: ModelFiles) -> None:
    """Raises CheckpointError for parts that are damaged, or that do not fit the transformers."""
    needed, transformer = files.family.out_dim, next(iter(files.transformers.values()))
    vae = build_vae(files.vae)
    if vae.z_dim != needed:
        kind = f"the {vae.release} VAE, which has {vae.z_dim} latent channels"
        raise CheckpointError(f"{files.vae.path} is {kind}; the model has {needed}: give it {files.family.vae}")
    check_module(vae, files.vae)
    encoder = build_text_encoder(files.text_encoder)
    check_module(encoder, files.text_encoder)
    widths = [(files.text_encoder.path, encoder.token_embedding.embedding_dim, transformer.shape.text_dim)]
    if files.clip is not None:
        vision = shape_of_vision(files.clip)
        check_vision(files.clip, vision)
        widths.append((files.clip.path, vision.dim, transformer.shape.image_dim))
    for path, given, read in widths:
        if given != read:
            raise CheckpointError(f"{path} has the width {given}, but {transformer.path} reads {read}")
