"""The dataset as a run sees it: everything wrong with its files is told together, before a model is loaded."""

from dataclasses import dataclass
from pathlib import Path

from utils.dataset import Problem, SamplingOptions, Source, Window, largest_windows, scan, split_folders
from utils.errors import UserError
from utils.report import counted


@dataclass(frozen=True)
class Dataset:
    """The usable clips; `val` is empty where none are held out."""

    train: list[Source]
    val: list[Source]
    windows: list[Window]  # the most that is used of each training clip, at each resolution

    @property
    def captions(self) -> list[str]:
        return [source.caption for source in (*self.train, *self.val)]


def open_dataset(
    folder: Path, sampling: SamplingOptions, control_suffix: str | None = None, skip_bad_files: bool = False
) -> Dataset:
    """Finds the clips of a dataset folder; with a suffix, each with the control file that is named so.

    Raises UserError that lists every file that cannot be used and why, unless they are to be skipped; then they are
    printed. Raises it too where nothing is left, or a resolution or token limit makes no sense.
    """
    train_folder, held_out = split_folders(folder)
    control = {"load_control": True, "control_suffix": control_suffix} if control_suffix is not None else {}
    train, problems = scan(train_folder, exclude=held_out, **control)
    val: list[Source] = []
    if held_out:
        val, val_problems = scan(held_out[0], **control)
        problems += val_problems
    if problems:
        _tell(problems, skip_bad_files)
    if not train:
        raise UserError(f"no usable clip is left in {train_folder}")
    return Dataset(train, val, largest_windows(train, sampling))


def _tell(problems: list[Problem], skip_bad_files: bool) -> None:
    bad = counted(len({problem.path for problem in problems}), "file")
    listed = "\n".join(f"  {problem.path}: {problem.reason}" for problem in problems)
    if not skip_bad_files:
        raise UserError(f"{bad} cannot be used:\n{listed}\nmend what is wrong, or pass --skip_bad_files")
    print(f"going on without {bad}:\n{listed}")
