"""How the files of one folder become samples: options of a run, which each folder of a dataset config may change."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from utils.common.errors import UserError
from utils.common.options import convert_table, option, read_toml
from utils.data.buckets import BUCKETS, Shapes
from utils.data.captions import CAPTION_SOURCES

FRAME_SAMPLINGS = ("random", "head", "middle", "uniform", "chunks", "slide")


@dataclass(frozen=True)
class Rules:
    """samples (a dataset config may give each folder its own)"""

    base_res: tuple[int, ...] = option((624,), "side of the square of equal area; several: one is drawn per sample")
    buckets: str = option(
        "wan", "shapes to cut to: the released three and their upright forms, or fine steps", choices=BUCKETS
    )
    min_ar: float = option(0.5, "narrowest width / height of --buckets fine", minimum=0.1, maximum=1)
    max_ar: float = option(2.0, "widest width / height of --buckets fine", minimum=1, maximum=10)
    enlarge: bool = option(False, "make clips larger than they are where a resolution asks for it")
    fps: str = option("native", "native: count frames as they are; auto: the model's rate; or frames per second")
    max_frame_stride: int = option(
        2, "with --fps native each clip takes every 1st to Nth frame, drawn at random", minimum=1
    )
    random_frame_length: bool = option(False, "draw the number of frames too, up to what fits")
    frame_sampling: str = option("random", "which part of a clip that is too long", choices=FRAME_SAMPLINGS)
    repeats: float = option(1.0, "how often an epoch shows each clip; 0.5: every other one", minimum=0.001)
    captions: str = option("files", "where captions are: in files, or the file name itself", choices=CAPTION_SOURCES)
    caption_per_line: bool = option(False, "every line of a caption file is a caption, one is drawn per sample")
    caption_prefix: str = option("", "put before every caption, such as a trigger word")
    caption_dropout: float = option(
        0.0, "share of samples that are trained without their caption", minimum=0, maximum=1
    )
    load_control: bool = option(
        False, "read the control of clip.mp4 from clip_control.mp4 instead of making it", requires="control_lora"
    )
    control_suffix: str = option("_control", "what the control file's name adds to the clip's")
    control_folder: Path | None = option(None, "folder of control files, named as their clips", requires="control_lora")
    load_mask: bool = option(False, "read clip_mask.mp4 or .png: the loss counts where it is white")
    mask_suffix: str = option("_mask", "what the mask file's name adds to the clip's")
    mask_folder: Path | None = option(None, "folder of mask files, named as their clips")

    @classmethod
    def of(cls, options: "Rules") -> "Rules":
        """The rules alone of options that hold more."""
        return cls(**{spec.name: getattr(options, spec.name) for spec in fields(cls)})

    @property
    def shapes(self) -> Shapes:
        return Shapes(self.buckets, self.min_ar, self.max_ar, self.enlarge)

    @property
    def reads_control(self) -> bool:
        return self.load_control or self.control_folder is not None

    @property
    def reads_mask(self) -> bool:
        return self.load_mask or self.mask_folder is not None

    @property
    def uses_all(self) -> bool:
        """Whether one showing of a long clip is several samples."""
        return self.frame_sampling in ("chunks", "slide")

    def rate(self, model_fps: float) -> float | None:
        """Frames per second to sample at; None for a clip's own. Raises UserError for what is neither."""
        if self.fps in ("native", "auto"):
            return None if self.fps == "native" else model_fps
        try:
            rate = float(self.fps)
        except ValueError:
            rate = 0.0
        if not 0 < rate < 1000:
            raise UserError(f"--fps must be native, auto or a number of frames per second, not {self.fps!r}")
        return rate


@dataclass(frozen=True)
class Folder:
    """One folder of clips and its rules."""

    path: Path
    rules: Rules


def resolve_folders(dataset: Path | None, config: Path | None, rules: Rules, alone: bool) -> list[Folder]:
    """The folders to train on: the one `dataset` with these rules, or those of a config, where rules are defaults.

    Raises UserError for none or both, as `read_folders` does, and for a rule that would be ignored.
    """
    if dataset is None and config is None:
        raise UserError("--dataset is missing: the folder with your clips and captions (--dataset_config: several)")
    if config is None:
        _check_ignored(rules, vars(rules))
        return [Folder(dataset, rules)]
    if dataset is not None:
        raise UserError("--dataset and --dataset_config both say what to train on: give one of them")
    return read_folders(config, rules, alone)


def _check_ignored(rules: Rules, given: Iterable[str]) -> None:
    """Raises UserError where one of the `given` rules is not its default and means nothing beside the others."""
    strided = rules.fps == "native" and rules.frame_sampling in ("random", "head", "middle")
    ignored = {
        "max_frame_stride": (not strided, "with this --fps or --frame_sampling"),
        "min_ar": (rules.buckets != "fine", "without --buckets fine"),
        "max_ar": (rules.buckets != "fine", "without --buckets fine"),
        "caption_per_line": (rules.captions == "filename", "with --captions filename"),
        "control_suffix": (not rules.load_control, "without --load_control"),
        "mask_suffix": (not rules.load_mask, "without --load_mask"),
    }
    for name, (is_ignored, why) in ignored.items():
        if is_ignored and name in given and getattr(rules, name) != getattr(Rules, name):
            raise UserError(f"--{name} means nothing {why}")


def read_folders(config: Path, defaults: Rules, alone: bool) -> list[Folder]:
    """The `[[dataset]]` tables of a TOML file: a `path` each, relative to the file, and what differs from `defaults`.

    Raises UserError for an unknown key, which names the nearest known one, for a table without a path, and for what is
    outside of the tables, where the file should hold them `alone`.
    """
    values = read_toml(config)
    tables = values.pop("dataset", [])
    if values and alone:
        name = next(iter(values))
        raise UserError(f"unknown option {name!r} in {config}: it holds [[dataset]] tables, options are for --config")
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{config} has no [[dataset]] table: write one for each folder, with its path")
    return [_folder(config, number, table, defaults) for number, table in enumerate(tables, 1)]


def _folder(config: Path, number: int, table: dict[str, Any], defaults: Rules) -> Folder:
    where = f"[[dataset]] {number} of {config}"
    values = dict(table)
    path = values.pop("path", None)
    if not isinstance(path, str) or not path:
        raise UserError(f"{where} needs a path: the folder with the clips")
    changes = convert_table(Rules, values, where)
    for name in ("control_folder", "mask_folder"):
        if name in changes:
            changes[name] = config.parent / changes[name]
    rules = replace(defaults, **changes)
    try:
        _check_ignored(rules, changes)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Folder(config.parent / path, rules)
