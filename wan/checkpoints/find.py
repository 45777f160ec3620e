"""Where the files of a model are and which family they make. Nothing is read but config.json and headers.

    config.json, diffusion_pytorch_model*.safetensors (one file, or shards with their index)
    Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/

This is Wan 2.1 T2V; the row of a release in `wan.configs` has the names of its own. Of two experts each is in a folder
with its own config.json.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from wan.checkpoints.errors import CheckpointError, ModelNotFoundError
from wan.checkpoints.headers import CONFIG, Config, TransformerFiles, existing, read_config, read_transformer
from wan.checkpoints.variants import refuse_variant_by_config
from wan.configs import FAMILIES, Family, match_family, named_family

LOCAL_MODELS = Path("models")
PARTS = ("transformer", "high_noise", "low_noise", "vae", "text_encoder", "clip", "tokenizer")
AnyPath = str | Path


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: which family it is of, and where its parts are. `open_model` makes it once per run."""

    source: str  # the name or path it was opened by
    family: Family
    transformers: Mapping[str, TransformerFiles]  # by the names of the family's experts
    vae: Path
    text_encoder: Path
    tokenizer: Path
    text_len: int  # text tokens that the transformers read
    clip: Path | None = None  # the vision encoder, where the family has one

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
    raise ModelNotFoundError(name, f"no model at {name} or {LOCAL_MODELS / name}")


def find_family(name_or_path: AnyPath) -> Family:
    """The family of a model's folder, or of a release by its name, which need not be there. A folder comes first.

    Raises ModelNotFoundError for neither, and CheckpointError for the folder of a model that is not supported.
    """
    try:
        folder = find_model(name_or_path)
    except ModelNotFoundError:
        if family := named_family(str(name_or_path)):
            return family
        raise
    return _family_of(_read_configs(_transformer_folders(folder)), folder)


def open_model(path: AnyPath | None = None, **files: AnyPath | None) -> ModelFiles:
    """The files of a model: those of its folder, any of which may be replaced, or single files that make one.

    `files` may name the PARTS of a model; None counts as not given. A transformer is a file or a folder, and is read by
    the config.json beside it, or else by that of the model's folder. Raises CheckpointError for a file that is missing
    or of another kind of model, for a part that the model does not have, and as `find_model` does.
    """
    if unknown := files.keys() - set(PARTS):
        raise TypeError(f"unknown parts of a model: {', '.join(sorted(unknown))}")
    given = {name: Path(place) for name, place in files.items() if place is not None}
    folder = None if path is None else find_model(path)
    folders = _transformer_folders(folder) if folder else _own_folders(given)
    if not folders:
        raise CheckpointError("no model is given: neither its folder nor its transformer")
    configs = _read_configs(folders)
    places = {name: given.get(name, place) for name, place in folders.items()}
    own = {name: _config_beside(place, configs[name]) for name, place in places.items()}
    # Read before the family is looked up: whatever config.json says, the tensors name a variant that is not supported.
    transformers = {name: read_transformer(place, own[name]) for name, place in places.items()}
    first = next(iter(transformers.values()))
    family = _family_of(configs, folder or _folder_of(first.path))
    names = _part_names(family)
    for name, place in given.items():
        if name not in (*folders, *names):
            raise CheckpointError(f"{place} cannot be used: the model has no part called {name}")
    for name, transformer in transformers.items():
        _check_kind(transformer, own[name], family)
        _check_same_widths(first, transformer)
    parts = {name: _find_part(name, given, folder, file) for name, file in names.items()}
    existing(parts["tokenizer"] / "tokenizer.json")
    source = str(first.path if path is None else path)
    return ModelFiles(source, family, transformers, text_len=first.shape.text_len, **parts)


def _part_names(family: Family) -> dict[str, str]:
    """The files of a family besides its transformers, by the names of the parts."""
    names = {"vae": family.vae, "text_encoder": family.text_encoder, "tokenizer": family.tokenizer}
    return names | ({"clip": family.clip} if family.clip else {})


def _layouts() -> list[dict[str, str]]:
    """Where the transformers of a model are, by their names: one for each way of laying them out."""
    layouts = [{expert.name: expert.folder for expert in family.experts} for family in FAMILIES.values()]
    return [layout for index, layout in enumerate(layouts) if layout not in layouts[:index]]


def _transformer_folders(folder: Path) -> dict[str, Path]:
    """The folders of a model's transformers by their names: those of the layout that is there."""
    for complete in (all, any):  # of one that is there in part, reading names what is missing
        for layout in _layouts():
            folders = {name: folder / place for name, place in layout.items()}
            if complete((place / CONFIG).exists() for place in folders.values()):
                return folders
    raise CheckpointError(f"{folder / CONFIG} is missing: {folder} is not a model in the official layout")


def _own_folders(given: Mapping[str, Path]) -> dict[str, Path]:
    """The folders that the given transformers are in, by their names; none without a transformer."""
    for layout in _layouts():
        if not given.keys().isdisjoint(layout):
            return {name: _folder_of(_given(name, given)) for name in layout}
    return {}


def _read_configs(folders: Mapping[str, Path]) -> dict[str, Config]:
    return {name: read_config(folder) for name, folder in folders.items()}


def _family_of(configs: Mapping[str, Config], folder: Path) -> Family:
    """The family of the transformers with these configs, which say the same, in a model's folder."""
    config = next(iter(configs.values()))
    refuse_variant_by_config(config.path, config.values, configs)
    task, in_dim, dim = (config.values.get(name) for name in ("model_type", "in_dim", "dim"))
    family = match_family(task, in_dim, dim, configs, folder.absolute().name)
    if family is None:
        rows = (_kind(row.task, row.in_dim, len(row.experts)) for row in FAMILIES.values())
        kind = _kind(task, in_dim, len(configs))
        known = ", ".join(dict.fromkeys(rows))
        raise CheckpointError(f"{config.path.parent} is of a kind that is not supported: {kind}\nsupported: {known}")
    return family


def _kind(task: object, in_dim: object, experts: int) -> str:
    return f"{task} with {in_dim} input channels" + (f" and {experts} experts" if experts > 1 else "")


def _config_beside(path: Path, config: Config) -> Config:
    """The config.json beside the transformer at `path`, or else the model's `config`."""
    folder = _folder_of(path)
    return read_config(folder) if folder != config.path.parent and (folder / CONFIG).exists() else config


def _check_kind(files: TransformerFiles, config: Config, family: Family) -> None:
    """Raises CheckpointError for a transformer that is of another kind than the family's."""
    shape = files.shape
    found = config.values.get("model_type"), shape.in_dim, shape.out_dim, shape.image_dim > 0
    expected = family.task, family.in_dim, family.out_dim, family.clip != ""
    if found != expected:
        raise CheckpointError(f"{files.path} is of a {_describe(*found)}, not of a {_describe(*expected)}")


def _describe(task: object, in_dim: int, out_dim: int, image: bool) -> str:
    tokens = " and image tokens" if image else ""
    return f"{task} model with {in_dim} input and {out_dim} output channels{tokens}"


def _check_same_widths(first: TransformerFiles, other: TransformerFiles) -> None:
    """Raises CheckpointError for experts that are not of one model."""
    ours, theirs = asdict(first.shape), asdict(other.shape)
    for name in ours:
        if ours[name] != theirs[name]:
            facts = f"{other.path} has {name} {theirs[name]}, but {first.path} has {ours[name]}"
            raise CheckpointError(f"{facts}: they are not experts of one model")


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _find_part(name: str, given: Mapping[str, Path], folder: Path | None, file: str) -> Path:
    """Where a part of the model is: as given, or under the name `file` in the model's folder."""
    return existing(folder / file) if folder and name not in given else _given(name, given)


def _given(name: str, given: Mapping[str, Path]) -> Path:
    """Where a part is that no model's folder has."""
    if name not in given:
        raise CheckpointError(f"no {name} is given, and no model folder that has one")
    return existing(given[name])
