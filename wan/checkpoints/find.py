"""Where the files of a model are and which family they make. Nothing is read but config.json and headers.

    config.json, diffusion_pytorch_model*.safetensors (one file, or shards with their index)
    Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/

The last three are Wan 2.1's; the row of a release in `wan.configs` has the names of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wan.checkpoints.errors import CheckpointError, ModelNotFoundError
from wan.checkpoints.headers import CONFIG, Config, TransformerFiles, existing, read_config, read_transformer
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
    clip: Path | None = None  # the file of the vision encoder, for a model that reads given frames through one

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
    return _family_of(_read_configs(_transformer_folders(folder)))


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
    for name, place in given.items():
        if name not in (*folders, "vae", "text_encoder", "tokenizer"):
            raise CheckpointError(f"{place} cannot be used: the model has no part called {name}")
    if not folders:
        raise CheckpointError("no model is given: neither its folder nor its transformer")
    configs = _read_configs(folders)
    family = _family_of(configs)
    transformers = {name: _open_transformer(given.get(name, folders[name]), configs[name], family) for name in folders}
    names = {"vae": family.vae, "text_encoder": family.text_encoder, "tokenizer": family.tokenizer}
    parts = {name: _find_part(name, given, folder, file) for name, file in names.items()}
    existing(parts["tokenizer"] / "tokenizer.json")
    first = next(iter(transformers.values()))
    source = str(first.path if path is None else path)
    return ModelFiles(source, family, transformers, text_len=first.shape.text_len, **parts)


def clip_file(files: ModelFiles) -> Path:
    """The file of the model's vision encoder. Raises CheckpointError for a model that has none."""
    if files.clip is None:
        raise CheckpointError(f"{files.source} has no vision encoder: its transformer reads no image tokens")
    return files.clip


def _transformer_folders(folder: Path) -> dict[str, Path]:
    """The folders of a model's transformers by their names: those of the layout whose config files are all there."""
    for experts in dict.fromkeys(family.experts for family in FAMILIES.values()):
        folders = {expert.name: folder / expert.folder for expert in experts}
        if all((place / CONFIG).exists() for place in folders.values()):
            return folders
    raise CheckpointError(f"{folder / CONFIG} is missing: {folder} is not a model in the official layout")


def _own_folders(given: Mapping[str, Path]) -> dict[str, Path]:
    """The folders that the given transformers are in, by their names."""
    names = {expert.name for family in FAMILIES.values() for expert in family.experts}
    return {name: _folder_of(path) for name, path in given.items() if name in names}


def _read_configs(folders: Mapping[str, Path]) -> dict[str, Config]:
    return {name: read_config(folder) for name, folder in folders.items()}


def _family_of(configs: Mapping[str, Config]) -> Family:
    """The family of the transformers with these configs, which say the same."""
    config = next(iter(configs.values()))
    task, in_dim, dim = (config.values.get(name) for name in ("model_type", "in_dim", "dim"))
    family = match_family(task, in_dim, dim, configs)
    if family is None:
        known = ", ".join(sorted({f"{row.task} with {row.in_dim}" for row in FAMILIES.values()}))
        kind = f"a {task} model with {in_dim} input channels"
        raise CheckpointError(f"{config.path.parent} is {kind}; supported: {known}")
    return family


def _open_transformer(path: Path, config: Config, family: Family) -> TransformerFiles:
    """The transformer at `path`, by the config.json beside it, or else by the model's `config`."""
    folder = _folder_of(path)
    if folder != config.path.parent and (folder / CONFIG).exists():
        config = read_config(folder)
    files = read_transformer(path, config)
    found = config.values.get("model_type"), files.shape.in_dim, files.shape.out_dim
    expected = family.task, family.in_dim, family.out_dim
    if found != expected:
        kinds = ["{} model with {} input and {} output channels".format(*facts) for facts in (found, expected)]
        raise CheckpointError(f"{path} is of a {kinds[0]}, not of a {kinds[1]}")
    return files


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _find_part(name: str, given: Mapping[str, Path], folder: Path | None, file: str) -> Path:
    """Where a part of the model is: as given, or under the name `file` in the model's folder."""
    if name in given:
        return existing(given[name])
    if folder is None:
        raise CheckpointError(f"no {name} is given, and no model folder that has one")
    return existing(folder / file)
