"""The options that turn the files of a folder into samples; each folder of a dataset config can override them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from utils.common.errors import UserError
from utils.common.options import convert_table, expand_home, option
from utils.common.toml import check_paths, read_toml
from utils.data.buckets import BUCKETS, Shapes
from utils.data.captions import CAPTION_SOURCES
from utils.data.sample_sizes import SampleSizes

FULL, FAST = "full", "fast"
FRAME_SAMPLINGS = ("random", "head", "middle", "uniform", "chunks", "slide")

# The rules of version 0.1, which every state holds a hash of, in its order.
_RULES_OF_0_1 = (
    *("base_res", "buckets", "min_ar", "max_ar", "enlarge", "fps", "max_frame_stride", "random_frame_length"),
    *("frame_sampling", "repeats", "captions", "caption_per_line", "caption_prefix", "caption_dropout"),
    *("load_control", "control_suffix", "control_folder", "load_mask", "mask_suffix", "mask_folder"),
)


@dataclass(frozen=True)
class DatasetOptions:
    """dataset"""

    dataset: Path | None = option(
        None,
        "folder with your clips and captions; may hold train/ and val/",
        affects_training=False,
        aliases=("train_data_dir",),
    )
    dataset_config: Path | None = option(
        None, "TOML file with a [[dataset]] table for each of several folders", affects_training=False
    )
    check_dataset: bool = option(
        False, "check every file, print what would be trained on, then stop", affects_training=False
    )
    skip_bad_files: bool = option(
        False, "train without the files that cannot be used, instead of stopping", affects_training=False
    )
    decode_check: str = option(
        FULL,
        "full: decode every video to its end once, so that damage is found before a run; fast: trust the file's index",
        choices=(FULL, FAST),
        affects_training=False,
    )

    def folders(self, rules: "Rules", config: Path | None) -> "list[Folder]":
        """The folders to train on, each with its rules, as `resolve_folders` finds them. `config` is that of --config.

        A dataset config holds nothing but [[dataset]] tables, unless it is the file of --config too.
        """
        return resolve_folders(self.dataset, self.dataset_config, rules, tables_only=self.dataset_config != config)


@dataclass(frozen=True)
class Rules(SampleSizes):
    """samples (a dataset config can set these for each folder)"""

    base_res: tuple[int, ...] = option(
        (624,), "side in pixels of a square of the bucket's area; several: one is drawn per sample"
    )
    buckets: str = option(
        "wan",
        "wan: 16:9, 4:3, 1:1 and portrait; fine: nine shapes between --min_ar and --max_ar",
        choices=BUCKETS,
    )
    min_ar: float = option(0.5, "smallest width / height of --buckets fine", minimum=0.1, maximum=1)
    max_ar: float = option(2.0, "largest width / height of --buckets fine", minimum=1, maximum=10)
    enlarge: bool = option(False, "upscale clips that are smaller than their bucket")
    fps: str = option(
        "native", "native: the file's own frames; auto: resampled to the model's rate; or frames per second"
    )
    max_frame_stride: int = option(
        2, "with --fps native, use every 1st to Nth frame; drawn at random per sample", minimum=1
    )
    frame_stride: int = option(
        0, "use exactly every Nth frame; 0: see --max_frame_stride", minimum=0, aliases=("video_sample_stride",)
    )
    max_frames: int = option(
        0,
        "most frames of a sample, rounded up to 4n + 1; 0: as many as --token_limit allows",
        minimum=0,
        aliases=("video_sample_n_frames",),
    )
    max_duration: float = option(0.0, "use only the first N seconds of each clip; 0: all of it", minimum=0)
    random_frame_length: bool = option(False, "draw the number of frames at random too, up to the most that fits")
    random_frame_crop: bool = option(False, "draw a smaller number of frames for one in ten samples")
    frame_sampling: str = option(
        "random",
        "which frames of a clip that is too long; chunks and slide: all, in several samples",
        choices=FRAME_SAMPLINGS,
    )
    repeats: float = option(1.0, "how often an epoch uses each clip; 0.5: every other one", minimum=0.001)
    video_repeat: int = option(
        1, "how often an epoch uses each video, beside --repeats; images once; 0: the same as 1", minimum=0
    )
    clip_list: Path | None = option(
        None,
        "JSON or CSV file of the clips to use, below the dataset's folder, and their captions (see docs/datasets.md)",
        affects_training=False,
        aliases=("train_data_meta",),
    )
    captions: str = option(
        "files", "where captions come from: caption files or the clip's file name", choices=CAPTION_SOURCES
    )
    caption_per_line: bool = option(False, "treat each line of a caption file as a caption; one is drawn per sample")
    caption_prefix: str = option("", "text before every caption, such as a trigger word")
    caption_dropout: float = option(0.0, "share of samples trained with an empty caption", minimum=0, maximum=1)
    load_control: bool = option(
        False, "read the control of clip.mp4 from clip_control.mp4 instead of generating it", requires="control_lora"
    )
    control_suffix: str = option("_control", "what a control file's name adds to the clip's")
    control_folder: Path | None = option(
        None, "folder of control files, named like their clips", requires="control_lora"
    )
    load_mask: bool = option(
        False,
        "weight the loss by clip_mask.mp4 or .png: white, opaque or labelled parts count 1, the rest --mask_floor"
        " (see docs/formats.md)",
    )
    mask_suffix: str = option("_mask", "what a mask file's name adds to the clip's")
    mask_folder: Path | None = option(None, "folder of mask files, named like their clips")
    load_first_frame: bool = option(
        False, "give the model clip_first.png (or .jpg) as the first frame of clip.mp4, where there is one"
    )

    @classmethod
    def of(cls, options: "Rules") -> "Rules":
        """The rules among a run's options."""
        return cls(**{spec.name: getattr(options, spec.name) for spec in fields(cls)})

    @property
    def identity(self) -> str:
        """These rules as text for a fingerprint: two runs with the same text treat a clip alike.

        A rule that version 0.1 did not have is listed only if it differs from its default, so that a state from before
        can be resumed. The folders of controls and masks are not listed: the content of their files counts. Nor is the
        list of clips: its captions count.
        """
        values = vars(self) | {"control_folder": None, "mask_folder": None, "clip_list": None}
        later = sorted(spec.name for spec in fields(self) if spec.name not in _RULES_OF_0_1)
        changed = [name for name in later if values[name] != getattr(type(self), name)]
        return f"Rules({', '.join(f'{name}={values[name]!r}' for name in (*_RULES_OF_0_1, *changed))})"

    def sides(self, is_image: bool) -> tuple[int, ...]:
        """The sides in pixels of the squares whose area a sample may have: one is drawn."""
        return self.sample_sides(is_image) if self.has_sizes else self.base_res

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
    def reads_first(self) -> bool:
        """Whether a start picture beside a clip is used: only a model that is given frames can use one."""
        return self.load_first_frame

    @property
    def covers_clip(self) -> bool:
        """Whether a long clip becomes several samples that together use all of its frames."""
        return self.frame_sampling in ("chunks", "slide")

    def rate(self, model_fps: float) -> float | None:
        """Frames per second to sample at; None for a clip's own rate. Raises UserError if `fps` is no such value."""
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


def resolve_folders(dataset: Path | None, config: Path | None, rules: Rules, tables_only: bool) -> list[Folder]:
    """The folders to train on: `dataset` with these rules, or the folders of a config, where the rules are defaults.

    Raises UserError for neither or both, for a rule that would have no effect, and as `read_folders` does.
    """
    if config is not None:
        if dataset is not None:
            raise UserError("--dataset and --dataset_config both say what to train on: give one of them")
        return read_folders(config, rules, tables_only)
    if dataset is None:
        raise UserError("--dataset is missing: the folder with your clips and captions (--dataset_config: several)")
    check_ignored(rules, vars(rules))
    return [Folder(dataset, rules)]


def check_paired_files(folders: Sequence[Folder], uses_controls: bool, needs_masks: bool) -> None:
    """Raises UserError if a folder's controls would not be used, or if masks are needed and no folder has any."""
    for folder in folders:
        if folder.rules.reads_control and not uses_controls:
            raise UserError(f"load_control and control_folder require --control_lora (folder {folder.path})")
    if needs_masks and not any(folder.rules.reads_mask for folder in folders):
        raise UserError("--mask_floor requires masks: see --load_mask and --mask_folder")


def check_ignored(rules: Rules, given: Iterable[str]) -> None:
    """Raises UserError if one of the `given` rules differs from its default but has no effect beside the others.

    Also for sizes that contradict each other.
    """
    strided = rules.fps == "native" and rules.frame_sampling in ("random", "head", "middle")
    ignored = {
        "base_res": (rules.has_sizes, "and --video_sample_size both say how large samples are: give one of them"),
        "max_frame_stride": (not strided, "has no effect with this --fps or --frame_sampling"),
        "frame_stride": (
            not strided or rules.max_frame_stride != Rules.max_frame_stride,
            "has no effect with this --fps, --frame_sampling or --max_frame_stride",
        ),
        "random_frame_crop": (rules.random_frame_length, "and --random_frame_length both draw: give one of them"),
        "captions": (rules.clip_list is not None, "has no effect with --clip_list, which has the captions"),
        "min_ar": (rules.buckets != "fine", "requires --buckets fine"),
        "max_ar": (rules.buckets != "fine", "requires --buckets fine"),
        "caption_per_line": (rules.captions == "filename", "has no effect with --captions filename"),
        "control_suffix": (not rules.load_control, "requires --load_control"),
        "mask_suffix": (not rules.load_mask, "requires --load_mask"),
    }
    for name, (is_ignored, reason) in ignored.items():
        if is_ignored and name in given and getattr(rules, name) != getattr(Rules, name):
            raise UserError(f"--{name} {reason}")
    rules.check_sizes(rules.max_frames)


def read_folders(config: Path, defaults: Rules, tables_only: bool) -> list[Folder]:
    """The `[[dataset]]` tables of a TOML file: a `path` each, relative to the file, and rules that override `defaults`.

    With `tables_only` the file may hold nothing else; otherwise it is also the file of --config. Raises UserError for
    an unknown key, naming the nearest known one, for a table without a path, and for a rule that would have no effect.
    """
    values = read_toml(config)
    tables = values.pop("dataset", [])
    if values and tables_only:
        name = next(iter(values))
        raise UserError(f"unknown option {name!r} in {config}: it holds [[dataset]] tables, options are for --config")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{config} has no [[dataset]] table: write one for each folder, with its path")
    return [_folder(config, number, table, defaults) for number, table in enumerate(tables, 1)]


def _folder(config: Path, number: int, table: dict[str, Any], defaults: Rules) -> Folder:
    where = f"[[dataset]] {number} of {config}"
    values = dict(table)
    path = values.pop("path", None)
    if not isinstance(path, str) or not path:
        raise UserError(f"{where} needs a path: the folder with the clips")
    check_paths(path, "path", config)
    changes = convert_table(Rules, values, where, config)
    for name in ("control_folder", "mask_folder", "clip_list"):
        if name in changes:
            changes[name] = config.parent / changes[name]
    rules = replace(defaults, **changes)
    try:
        check_ignored(rules, changes)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Folder(config.parent / expand_home(path), rules)
