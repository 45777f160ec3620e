"""The dataset of a run: the clips to train on, the clips held out, and a report on every file before a model loads."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from utils.common.digests import DIGESTS, LATENTS, Digests
from utils.common.errors import UserError
from utils.common.formatting import counted
from utils.data.folders import Folder
from utils.data.plan import Limits, Plan, Window, full_length_windows
from utils.data.scan import Problem, Source, scan, split_folders
from utils.data.tables import format_buckets, format_clips


@dataclass(frozen=True)
class Dataset:
    """The usable clips; `val` is empty where none are held out."""

    train: list[Source]
    val: list[Source]
    windows: list[Window]  # the most that is used of each training clip, at each resolution
    cache_folder: Path

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """For each training clip what makes its samples what they are, its content included."""
        digests = Digests(self.cache_folder / LATENTS / DIGESTS)
        facts: dict[str, list] = defaultdict(list)
        for source in tqdm(self.train, "looking for changes", unit="clip", delay=2, leave=False):
            files = [source.path, *(other.path for other in (source.control, source.mask) if other)]
            rules = replace(source.rules, control_folder=None, mask_folder=None)
            name = source.folder.resolve().name / source.path.relative_to(source.folder)
            facts[str(name)] += [[digests.of(file) for file in files], source.captions, list(source.shown), rules]
        digests.save()
        return {name: hashlib.sha256(repr(fact).encode()).hexdigest()[:16] for name, fact in facts.items()}

    @property
    def captions(self) -> list[str]:
        """Every text that a sample may come with."""
        texts = [caption for source in (*self.train, *self.val) for caption in source.captions]
        dropped = any(source.rules.caption_dropout for source in self.train)
        return [*texts, ""] if dropped else texts


def open_dataset(
    folders: Sequence[Folder],
    limits: Limits,
    model_fps: float,
    cache_folder: Path | None = None,
    skip_bad_files: bool = False,
) -> Dataset:
    """Finds the clips of all folders and prints them as a table. Caches go to the first folder unless given another.

    Raises UserError with a list of the files that cannot be used, each with its reason; with `skip_bad_files` they are
    printed instead. Also raises it if no clip is left, or if a resolution does not fit the token limit.
    """
    train: list[Source] = []
    val: list[Source] = []
    problems: list[Problem] = []
    for folder in folders:
        train_path, val_paths = split_folders(folder.path)
        for path, exclude, part in ((train_path, val_paths, train), *((path, [], val) for path in val_paths[:1])):
            sources, found_problems = scan(Folder(path, folder.rules), model_fps, exclude, folder.path)
            part += sources
            problems += found_problems
    problems = list(dict.fromkeys(problems))
    windows, held_out = full_length_windows(train, limits), full_length_windows(val, limits)
    if train:
        print(format_clips(windows, held_out, problems, model_fps))
        print(f"\n{format_buckets(Plan(train, limits, seed=0).epoch(0))}")
        if not val:
            print("\nno clips are held out in val/: validation is on training clips, which says less")
    if problems:
        _report(problems, skip_bad_files)
    if not train:
        raise UserError(f"no usable clip is left in {' '.join(str(folder.path) for folder in folders)}")
    return Dataset(train, val, windows, cache_folder or folders[0].path / ".wan_cache")


def _report(problems: Sequence[Problem], skip_bad_files: bool) -> None:
    num_files = counted(len({problem.path for problem in problems}), "file")
    listing = "\n".join(f"  {problem.path}: {problem.reason}" for problem in problems)
    if not skip_bad_files:
        raise UserError(f"{num_files} cannot be used:\n{listing}\nfix what is listed, or pass --skip_bad_files")
    print(f"skipping {num_files}:\n{listing}")
