"""The dataset of a run: the clips to train on, the clips held out, and a report on every file before a model loads."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from utils.common.console import say
from utils.common.digests import DIGESTS, LATENTS, Digests
from utils.common.errors import UserError
from utils.common.formatting import counted, one_line
from utils.data.buckets import round_up_frames
from utils.data.folders import FULL, DatasetOptions, Folder, Rules
from utils.data.notices import Notice, format_notices
from utils.data.parts import Parts, dataset_name, media_elsewhere, notices_of, split_folders
from utils.data.plan import Batching, Limits, Plan, Window, full_length_windows
from utils.data.prompts import PromptOptions, prompt_sources, stand_for_videos
from utils.data.scan import Problem, Scan, Source, survey
from utils.data.tables import format_buckets, format_clips, format_prompts
from utils.data.walking import NoMediaError
from utils.media.inspection import Inspector
from wan.configs import Family
from wan.configs.grid import Grid

CACHE = ".wan_cache"
NOTICED = 2.0  # seconds


@dataclass(frozen=True)
class DataOptions(DatasetOptions, Rules, Batching):
    """data"""


@dataclass(frozen=True)
class Dataset:
    """The usable clips: those to train on, and those held out for validation, if any."""

    train: list[Source]
    val: list[Source]
    windows: list[Window]  # the longest of each training clip at each resolution
    cache_folder: Path

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """16 hex digits per training clip, which change if its samples would: content, captions, frames or rules."""
        digests = Digests(self.cache_folder / LATENTS / DIGESTS)
        facts: dict[str, list[str]] = defaultdict(list)
        for source in tqdm(self.train, "looking for changes", unit="clip", delay=2, leave=False):
            contents = [digests.of(file) for file in source.files]
            name = source.folder.resolve().name / source.path.relative_to(source.folder)
            frames = list(source.frame_indices)
            facts[str(name)] += [repr(contents), repr(source.captions), repr(frames), source.rules.identity]
            facts[str(name)] += [repr(sorted(reading.items())) for reading in source.readings.values()]
        digests.save()
        texts = {name: f"[{', '.join(parts)}]" for name, parts in facts.items()}  # the text that version 0.1 hashed
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}

    @property
    def num_images(self) -> int:
        """How many of the training clips are images."""
        return sum(source.info.is_image for source in self.train)

    @property
    def clips_by_folder(self) -> dict[str, int]:
        """How many clips are trained on of each dataset, by the name of its folder."""
        return Counter(dataset_name(source.folder) for source in self.train)

    @property
    def captions(self) -> list[str]:
        """Every caption that a sample may have."""
        texts = [caption for source in (*self.train, *self.val) for caption in source.captions]
        dropped = any(source.rules.caption_dropout for source in self.train)
        return [*texts, ""] if dropped else texts


def open_dataset(
    folders: Sequence[Folder],
    limits: Limits,
    model_fps: float,
    cache_folder: Path | None = None,
    skip_bad_files: bool = False,
    decode_check: str = FULL,
    student: Family | None = None,
) -> Dataset:
    """Finds the clips of all folders and prints them as a table, after a line for each kind of file that is not used.

    The caches' default folder is in the first folder. For a `student` that starts from its own samples, given by its
    family, images stand for videos, as `stand_for_videos` says.

    Raises UserError with a list of the files that cannot be used, each with its reason; with `skip_bad_files` they are
    printed instead. Also raises it if a part holds no media, no clip is left, one frame exceeds the token limit, or the
    limit has no effect.
    """
    _check_token_limit(folders, limits)
    _say_rounded_frames(folders, limits.grid)
    cache = cache_folder or folders[0].path / CACHE
    inspector = Inspector(cache, full=decode_check == FULL)
    train: list[Source] = []
    val: list[Source] = []
    problems: list[Problem] = []
    notices: list[Notice] = []
    notes: list[str] = []
    used = _other_folders(folders)
    for folder in folders:
        parts = split_folders(folder.path, is_listed=folder.rules.clip_list is not None)
        notices += notices_of(parts, used)
        for path, kept in ((parts.train, train), (parts.held_out, val)):
            if path is not None:
                rules = folder.rules if kept is train else replace(folder.rules, clip_list=None)
                found = _survey(parts, Folder(path, rules), model_fps, used, inspector)
                found = found if student is None else stand_for_videos(found, student)
                kept += found.sources
                problems += found.problems
                notices += found.notices
                notes += found.notes
    if lines := [*dict.fromkeys(notes), *format_notices(notices)]:
        say("\n".join([*lines, ""]))
    _say_cost(inspector)
    problems = list(dict.fromkeys(problems))  # a caption file beside train/ and val/ is read for both
    windows, held_out = full_length_windows(train, limits), full_length_windows(val, limits)
    if train:
        say(format_clips(windows, held_out, problems, model_fps))
        say(f"\n{format_buckets(Plan(train, limits, seed=0).epoch(0))}")
    if problems:
        _report(problems, skip_bad_files)
    if not train:
        raise UserError(f"no usable clip is left in {' '.join(str(folder.path) for folder in folders)}")
    return Dataset(train, val, windows, cache)


def open_prompts(
    options: PromptOptions, rules: Rules, limits: Limits, family: Family, cache_folder: Path | None = None
) -> Dataset:
    """The dataset that --prompts are, printed as a table. Nothing of it is held out.

    The caches' default folder is beside the list. Raises UserError as `prompt_sources` does, and if one frame exceeds
    the token limit.
    """
    sources = prompt_sources(options, rules, family)
    _say_rounded_frames([Folder(sources[0].folder, rules)], limits.grid)
    windows = full_length_windows(sources, limits)
    say(format_prompts(windows))
    say(f"\n{format_buckets(Plan(sources, limits, seed=0).epoch(0))}")
    return Dataset(sources, [], windows, cache_folder or sources[0].path.parent / CACHE)


def _survey(parts: Parts, part: Folder, model_fps: float, used: Sequence[Path], inspector: Inspector) -> Scan:
    """What one of the parts holds. Raises UserError if that is nothing, and says where else media lie."""
    exclude = parts.not_trained if part.path == parts.train else []
    try:
        return survey(part, model_fps, exclude, parts.dataset, inspector)
    except NoMediaError as error:
        lines = media_elsewhere(parts, part.path, used) if error.folder == part.path else []
        raise UserError("\n".join([str(error), *lines])) from None


def _other_folders(folders: Sequence[Folder]) -> list[Path]:
    """All folders that a run reads: its datasets, and those of controls and masks."""
    rules = [folder.rules for folder in folders]
    paired = [path for rule in rules for path in (rule.control_folder, rule.mask_folder) if path]
    return [*(folder.path for folder in folders), *paired]


def _check_token_limit(folders: Sequence[Folder], limits: Limits) -> None:
    """Raises UserError for a limit beside sizes that have their own in all folders."""
    if limits.token_limit != Batching.token_limit and all(folder.rules.has_sizes for folder in folders):
        fewer = "for fewer tokens lower the sizes or --video_sample_n_frames"
        raise UserError(f"--token_limit has no effect with --video_sample_size: leave it out; {fewer}")


def _say_cost(inspector: Inspector) -> None:
    """Says what decoding every frame took, if anyone could have noticed it."""
    if inspector.decoded and inspector.seconds >= NOTICED:
        videos = counted(inspector.decoded, "video")
        say(f"decoded every frame of {videos} in {inspector.seconds:.1f} s (--decode_check fast does not)\n")


def _say_rounded_frames(folders: Sequence[Folder], grid: Grid) -> None:
    """Says once for each --max_frames how many frames that are, if the model does not take that number."""
    for given in dict.fromkeys(folder.rules.max_frames for folder in folders):
        if given and (frames := round_up_frames(given, grid)) != given:
            say(f"--max_frames {given}: {frames} frames, as the model takes {grid.frame}n + 1")


def _report(problems: Sequence[Problem], skip_bad_files: bool) -> None:
    num_files = counted(len({problem.path for problem in problems}), "file")
    listing = "\n".join(f"  {one_line(f'{problem.path}: {problem.reason}')}" for problem in problems)
    if not skip_bad_files:
        raise UserError(f"{num_files} cannot be used:\n{listing}\nfix what is listed, or pass --skip_bad_files")
    say(f"skipping {num_files}:\n{listing}")
