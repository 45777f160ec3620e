"""Where the files of a model are and which family they make. Of weights only names and shapes are read.

Official folder        config.json, diffusion_pytorch_model*.safetensors (one file, or shards with their index),
                       Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/. Of two experts each is in a
                       folder with its own config.json. The row of a release in `wan.configs` has the names of its own.
diffusers folder       transformer/, transformer_2/ (the low-noise expert), vae/, text_encoder/, tokenizer/,
                       image_encoder/
Single files           given by the names of the PARTS, beside a folder or instead of one, such as those for ComfyUI
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from wan.checkpoints.errors import CheckpointError, MissingPartsError, ModelNotFoundError, shown
from wan.checkpoints.families import ALONE, EXPERTS, TRANSFORMERS, family_of, find_named, mismatch
from wan.checkpoints.files import LOCAL_MODELS, broken_link, existing, is_named, read_json
from wan.checkpoints.parts import (
    build_text_encoder,
    build_transformer,
    build_vae,
    check_module,
    check_vision,
    shape_of_vision,
)
from wan.checkpoints.tokenizer import check_tokenizer, find_tokenizer_folder
from wan.checkpoints.transformer import CONFIG, Config, TransformerFiles, read_config, read_transformer
from wan.checkpoints.variants import refuse_variant_by_config
from wan.checkpoints.weights import Weights, read_weights
from wan.configs import FAMILIES, Family, named_family
from wan.modules.model import WanShape

PARTS = (*TRANSFORMERS, "vae", "text_encoder", "clip", "tokenizer")
_SECOND = f"{ALONE}_2"
_INDEX_OF_DIFFUSERS = "model_index.json"
_IN_DIFFUSERS = {"vae": "vae", "text_encoder": "text_encoder", "clip": "image_encoder", "tokenizer": "tokenizer"}
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
    def shape(self) -> WanShape:
        """That of the transformers."""
        return next(iter(self.transformers.values())).shape

    @property
    def weights(self) -> list[Path]:
        """The files that hold the weights of all parts."""
        parts = [*self.transformers.values(), self.vae, self.text_encoder, *([self.clip] if self.clip else [])]
        return sorted({file for part in parts for file in part.files})

    @property
    def transformer(self) -> TransformerFiles:
        """The transformer of a model that has only one."""
        (transformer,) = self.transformers.values()
        return transformer


def find_model(name_or_path: AnyPath) -> Path:
    """The folder of a model: a path, or a hub name under ./models/.

    Raises ModelNotFoundError where there is none, and CheckpointError for a file.
    """
    for folder in (Path(name_or_path), LOCAL_MODELS / name_or_path):
        if os.path.isdir(folder):  # unlike Path.is_dir it raises nothing for a name that is too long
            return folder
    name = str(name_or_path)
    if os.path.isfile(name):
        if name.endswith(".json"):
            raise CheckpointError(f"{name} is a file of a model: give the folder that it is in")
        raise CheckpointError(f"{name} is a file, not a model's folder: give it as what it holds: --transformer, --vae")
    places = dict.fromkeys((name, str(LOCAL_MODELS / name)))  # one for an absolute path
    raise ModelNotFoundError(name, f"no model at {' or '.join(map(shown, places))}")


def find_family(path: AnyPath | None = None, family: str = "", **files: AnyPath | None) -> Family:
    """The family of a model as `open_model` finds it. Only its transformers are needed; of a folder, config.json.

    A release, or the one named `family`, need not be there at all; a folder comes first. Raises ModelNotFoundError
    where there is nothing, and CheckpointError for a model that is not supported.
    """
    given, named = _given_files(files), find_named(family)
    try:
        folder = None if path is None else find_model(path)
    except ModelNotFoundError:
        if given.keys().isdisjoint(TRANSFORMERS) and (released := named or named_family(str(path))):
            return released
        raise
    if named and folder is None and given.keys().isdisjoint(TRANSFORMERS):
        return named
    paths = _transformer_paths(folder, given, named)
    configs = _configs(paths)
    if configs and given.keys().isdisjoint(paths):
        _refuse_variants(configs)
        config = next(iter(configs.values()))
        if config.task is None and config.values.get("in_dim") is None:
            raise CheckpointError(f"{config.path} is not that of a Wan: it has neither model_type nor in_dim")
        return family_of(config.traits(is_alone=ALONE in paths), paths, folder, named)
    return _read_transformers(folder, paths, named)[0]


def open_model(path: AnyPath | None = None, family: str = "", **files: AnyPath | None) -> ModelFiles:
    """The files of a model: those of its folder, any of which may be replaced, or single files that make one.

    `files` may name the PARTS of a model; None counts as not given. Its transformers say which family it is, as far as
    tensors can; `family` names it where several have the same. Names and shapes of all parts are checked. Raises
    CheckpointError for a file that is missing or damaged, of another kind of model, or that does not fit the others,
    MissingPartsError for parts that are nowhere, and as `find_model` does.
    """
    given, named = _given_files(files), find_named(family)
    folder = None if path is None else find_model(path)
    if folder is not None and _is_of_diffusers(folder):
        _need_subfolders(folder, given)
    found, transformers = _read_transformers(folder, _transformer_paths(folder, given, named), named)
    if "clip" in given and not found.clip:
        raise CheckpointError(f"{given['clip']} cannot be used: {found.name} reads no image tokens, leave clip out")
    paths = _part_paths(found, given, folder)
    tokenizer = paths.pop("tokenizer")
    weights = {name: read_weights(place, name) for name, place in paths.items()}
    first = next(iter(transformers.values()))
    source = str(first.path if path is None else path)
    model = ModelFiles(source, found, transformers, tokenizer=tokenizer, text_len=first.shape.text_len, **weights)
    _check_parts(model)
    return model


def find_tokenizer(path: AnyPath | None = None, **files: AnyPath | None) -> tuple[Path, int] | None:
    """The tokenizer's folder as `open_model` finds it, and how many tokens the transformers read by their config.json.

    Nothing else of the model needs to be there. None where there is no tokenizer. Raises CheckpointError for files that
    are given but missing or damaged.
    """
    given = _given_files(files)
    try:
        folder = None if path is None else find_model(path)
    except ModelNotFoundError:
        folder = None
    if (tokenizer := find_tokenizer_folder(given.get("tokenizer"), folder)) is None:
        return None
    transformers = {name: given[name] for name in TRANSFORMERS if name in given}
    configs = _configs(transformers or (_transformers_in(folder) if folder else {}))
    lengths = [config.values.get("text_len", WanShape.text_len) for config in configs.values()]
    return tokenizer, min((length for length in lengths if type(length) is int), default=WanShape.text_len)


def clip_weights(files: ModelFiles) -> Weights:
    """The weights of the model's vision encoder. Raises CheckpointError for a model that has none."""
    if files.clip is None:
        raise CheckpointError(f"{files.source} has no vision encoder: its transformer reads no image tokens")
    return files.clip


def _given_files(files: Mapping[str, AnyPath | None]) -> dict[str, Path]:
    if unknown := files.keys() - set(PARTS):
        raise TypeError(f"unknown parts of a model: {', '.join(sorted(unknown))}")
    given = {name: Path(path) for name, path in files.items() if path is not None}
    experts = [name for name in EXPERTS if name in given]
    if ALONE in given and experts:
        raise CheckpointError(f"{ALONE} and {experts[0]} exclude each other: a model has one, or two experts")
    for name, path in given.items():
        existing(path, f"it was given as {name}")
    if len({given[name].resolve() for name in experts}) < len(experts):
        raise CheckpointError(f"{given[experts[0]]} is given as {experts[0]} and as {experts[1]}: they are two files")
    return given


# ---------------------------------------------------------------------------------------------------- the transformers


def _transformer_paths(folder: Path | None, given: Mapping[str, Path], named: Family | None) -> dict[str, Path]:
    """Where the transformers are, by their names.

    A given one replaces that of the same name in the folder. One that the folder does not have makes another model: the
    folder then has only the other parts.
    """
    own = _transformers_in(folder) if folder else {}
    chosen = {name: given[name] for name in TRANSFORMERS if name in given}
    if not own and not chosen:
        if folder is None:
            raise CheckpointError("no model is given: neither its folder nor its transformer")
        _refuse_cache(folder)
        fault = f"{folder} is not a model: it has no transformer in the official layout or in that of diffusers"
        raise CheckpointError(f"{fault}\nsingle files, such as ComfyUI's, are given one by one: docs/models.md")
    if ALONE in chosen and len(own) > 1 and named is None:
        raise CheckpointError(f"{chosen[ALONE]} cannot be used: {folder} has two experts, {' and '.join(own)}")
    if not chosen.keys() <= own.keys():
        return chosen
    return {name: chosen.get(name) or existing(path) for name, path in own.items()}


def _transformers_in(folder: Path) -> dict[str, Path]:
    """The folders of a model's transformers by their names, in whichever layout is there; none where there is none."""
    if _is_of_diffusers(folder):
        first, second = folder / ALONE, folder / _SECOND
        return {EXPERTS[0]: first, EXPERTS[1]: second} if _has_second(folder) else {ALONE: first}
    layouts = [{expert.name: folder / expert.folder for expert in family.experts} for family in FAMILIES.values()]
    for layout in layouts:
        if all(is_named(path / CONFIG) for path in layout.values()):
            return layout
    for layout in layouts:  # of one that is there in part, what is missing is named
        if any(is_named(path / CONFIG) or (path != folder and is_named(path)) for path in layout.values()):
            return layout
    if is_named(folder / _INDEX_OF_DIFFUSERS):
        return {ALONE: folder / ALONE}
    # What is no safetensors file is among them, so that it is refused by what it is.
    return {ALONE: folder} if any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "*.gguf")) else {}


def _refuse_cache(folder: Path) -> None:
    """Raises CheckpointError for a folder of the hub's cache, in which models lie deeper, with where that is."""
    for pattern in ("snapshots/*/", "models--*/snapshots/*/"):
        if snapshots := sorted(folder.glob(pattern)):
            fact = f"is a folder of the hub's cache, and the model is deeper in it: give {snapshots[0]}"
            others = f", one of its {len(snapshots)} snapshots" if len(snapshots) > 1 else ""
            raise CheckpointError(f"{folder} {fact}{others}")


def _is_of_diffusers(folder: Path) -> bool:
    return (folder / ALONE).is_dir() and not any(folder.glob("diffusion_pytorch_model*"))


def _has_second(folder: Path) -> bool:
    """Whether a diffusers folder has a second transformer, or should have: by its index, or as a release."""
    released = named_family(folder.absolute().name)
    try:
        listed = read_json(folder / _INDEX_OF_DIFFUSERS).get(_SECOND)
    except CheckpointError:
        listed = None
    says = isinstance(listed, list) and any(listed)
    return (folder / _SECOND).exists() or says or (released is not None and len(released.experts) > 1)


def _configs(paths: Mapping[str, Path]) -> dict[str, Config]:
    """The config.json of each transformer that has one. One beside a single file may be that of another part."""
    configs = {}
    for name, path in paths.items():
        folder = path if path.is_dir() else path.parent
        if is_named(folder / CONFIG):
            config = read_config(folder)
            if path.is_dir() or config.is_of_transformer:
                configs[name] = config
    return configs


def _refuse_variants(configs: Mapping[str, Config]) -> None:
    for config in configs.values():
        refuse_variant_by_config(config.path, config.values, config.traits(is_alone=ALONE in configs))


def _read_transformers(
    folder: Path | None, paths: Mapping[str, Path], named: Family | None
) -> tuple[Family, dict[str, TransformerFiles]]:
    """The family of the transformers at these paths, and what is known of each of them."""
    configs = _configs(paths)
    # A given file without a config.json may be another version of the folder's own transformer.
    others = _configs(_transformers_in(folder)).values() if folder and len(configs) < len(paths) else ()
    found = {name: read_transformer(path, configs.get(name), others) for name, path in paths.items()}
    _refuse_variants(configs)
    tasks = {name: config.task for name, config in configs.items()}
    traits = {name: replace(files.traits, task=tasks.get(name)) for name, files in found.items()}
    first = next(iter(found.values()))
    family = family_of(next(iter(traits.values())), paths, folder, named)
    for name, files in found.items():
        if not family.agrees(traits[name]):
            raise CheckpointError(f"{files.path} {mismatch(traits[name], family)}")
        _check_same_widths(first, files)
        check_module(build_transformer(files), files)
    return family, found


def _check_same_widths(first: TransformerFiles, other: TransformerFiles) -> None:
    """Raises CheckpointError for experts that are not of one model."""
    ours, theirs = asdict(first.shape), asdict(other.shape)
    for name in ours:
        if ours[name] != theirs[name]:
            facts = f"{other.path} has {name} {theirs[name]}, but {first.path} has {ours[name]}"
            raise CheckpointError(f"{facts}: they are not experts of one model")


# ----------------------------------------------------------------------------------------------------- the other parts


def _part_paths(family: Family, given: Mapping[str, Path], folder: Path | None) -> dict[str, Path]:
    """Where the other parts of the model are. Raises MissingPartsError for all that are nowhere."""
    needed = [name for name in _IN_DIFFUSERS if name != "clip" or family.clip]
    found = {name: _find_part(name, family, given.get(name), folder) for name in needed}
    if not (missing := [name for name in needed if found[name] is None]):
        return {name: path for name, path in found.items() if path is not None}
    nothing = f"no {', no '.join(missing)} is given"
    if folder is None:
        raise MissingPartsError(missing, f"{nothing}, and no model folder that has it")
    usual = folder / (_IN_DIFFUSERS[missing[0]] if _is_of_diffusers(folder) else getattr(family, missing[0]))
    usual = usual / "tokenizer.json" if missing[0] == "tokenizer" else usual
    if broken_link(usual):
        existing(usual)
    raise MissingPartsError(missing, f"{usual} is missing, and {nothing} instead")


def _need_subfolders(folder: Path, given: Mapping[str, Path]) -> None:
    """Raises MissingPartsError with every part that a diffusers folder lacks. Which model it is, is not needed."""
    lacking = [name for name in ("vae", "text_encoder") if name not in given and not _has_part(folder, name)]
    if find_tokenizer_folder(given.get("tokenizer"), folder) is None:
        lacking.append("tokenizer")
    if lacking:
        fact = f"is a diffusers folder without files of its {', '.join(lacking)}"
        raise MissingPartsError(lacking, f"{folder} {fact}")


def _has_part(folder: Path, name: str) -> bool:
    """Whether a folder has something in the place of a part, in the layout of any family."""
    found = [_part_in(folder, name, family) for family in FAMILIES.values()]
    return any(not place.is_dir() or any(place.iterdir()) for place in found if place is not None)


def _find_part(name: str, family: Family, given: Path | None, folder: Path | None) -> Path | None:
    """A part where it is given, or else in the model's folder; None where it is in neither."""
    if name == "tokenizer":
        return find_tokenizer_folder(given, folder)
    if given is not None:
        return (_part_in(given, name, family) if given.is_dir() else None) or given
    return _part_in(folder, name, family) if folder else None


def _part_in(folder: Path, name: str, family: Family) -> Path | None:
    """A part in the folder of a model, whose layout says what it is called there; None where it is not."""
    official = folder / getattr(family, name)
    known = (official, official.with_suffix(".safetensors"), folder / _IN_DIFFUSERS[name])
    there = (next(filter(is_there, known), None) for is_there in (Path.exists, is_named))
    return next(filter(None, there), None)


def _check_parts(files: ModelFiles) -> None:
    """Raises CheckpointError for parts that are damaged, or that do not fit the transformers."""
    needed, transformer = files.family.out_dim, next(iter(files.transformers.values()))
    vae = build_vae(files.vae)
    if vae.z_dim != needed:
        kind = f"the {vae.release} VAE, which has {vae.z_dim} latent channels"
        raise CheckpointError(
            f"{files.vae.path} is {kind}; the model has {needed}: give it {files.family.vae} or another file of it"
        )
    check_module(vae, files.vae)
    encoder = build_text_encoder(files.text_encoder)
    check_module(encoder, files.text_encoder)
    check_tokenizer(files.tokenizer, encoder.token_embedding.num_embeddings)
    widths = [(files.text_encoder.path, encoder.token_embedding.embedding_dim, transformer.shape.text_dim)]
    if files.clip is not None:
        vision = shape_of_vision(files.clip)
        check_vision(files.clip, vision)
        widths.append((files.clip.path, vision.dim, transformer.shape.image_dim))
    for path, given, read in widths:
        if given != read:
            raise CheckpointError(f"{path} has the width {given}, but {transformer.path} reads {read}")
