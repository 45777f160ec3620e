"""Which folders a run trains on, and with which rules; bad configs are also tested through the command line."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from utils.common.errors import UserError
from utils.common.options import option
from utils.data.folders import Folder, Rules, check_paired_files, resolve_folders

CLIPS = Path("clips")


def config(folder: Path, text: str) -> Path:
    (folder / "sets.toml").write_text(text, encoding="utf-8")
    return folder / "sets.toml"


def test_one_folder_has_the_rules_of_the_run():
    rules = Rules(repeats=2.0)
    assert resolve_folders(CLIPS, None, rules, tables_only=True) == [Folder(CLIPS, rules)]


def test_tables_override_the_rules_of_the_run_and_are_relative_to_their_file(tmp_path):
    tables = (
        '[[dataset]]\npath = "a"\nrepeats = 3\ncontrol_folder = "edges"\n[[dataset]]\npath = "/b"\nbase_res = 320\n'
    )
    run_rules = Rules(repeats=2.0, mask_folder=Path("masks"))
    first, second = resolve_folders(None, config(tmp_path, tables), run_rules, tables_only=True)
    assert first == Folder(tmp_path / "a", replace(run_rules, repeats=3.0, control_folder=tmp_path / "edges"))
    assert second == Folder(Path("/b"), replace(run_rules, base_res=(320,)))


def test_paths_of_tables_may_begin_with_the_home_folder_and_may_hold_no_escapes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    path = config(tmp_path, '\ufeff[[dataset]]\npath = "~/a"\nmask_folder = "~/m"\n')
    (folder,) = resolve_folders(None, path, Rules(), tables_only=True)
    assert folder == Folder(tmp_path / "home" / "a", Rules(mask_folder=tmp_path / "home" / "m"))
    for wrong in ('path = "D:\\tapes"', 'path = "a"\nmask_folder = "D:\\tapes"'):
        with pytest.raises(UserError, match="write 'D:.tapes' in single quotes, or \"D:/tapes\""):
            resolve_folders(None, config(tmp_path, f"[[dataset]]\n{wrong}\n"), Rules(), tables_only=True)


def test_a_file_with_other_options_is_read_only_if_it_is_the_config_of_the_run_too(tmp_path):
    path = config(tmp_path, 'seed = 3\n[[dataset]]\npath = "a"\n')
    assert resolve_folders(None, path, Rules(), tables_only=False) == [Folder(tmp_path / "a", Rules())]
    with pytest.raises(UserError, match="unknown option 'seed' in .*: it holds"):
        resolve_folders(None, path, Rules(), tables_only=True)


@pytest.mark.parametrize("dataset", ["3", "[]", "[3]", '["clips"]', '"clips"', "[[]]"])
def test_what_is_no_list_of_tables_is_refused(tmp_path, dataset):
    with pytest.raises(UserError, match=r"has no \[\[dataset\]\] table"):
        resolve_folders(None, config(tmp_path, f"dataset = {dataset}"), Rules(), tables_only=True)


def test_a_dataset_or_a_config_is_needed_but_not_both(tmp_path):
    with pytest.raises(UserError, match="--dataset is missing"):
        resolve_folders(None, None, Rules(), tables_only=True)
    with pytest.raises(UserError, match="give one of them"):
        resolve_folders(CLIPS, config(tmp_path, '[[dataset]]\npath = "a"'), Rules(), tables_only=True)


IGNORED = {
    "--max_frame_stride has no effect with this --fps or --frame_sampling": [
        {"max_frame_stride": 3, "fps": "auto"},
        {"max_frame_stride": 3, "frame_sampling": "uniform"},
    ],
    "--frame_stride has no effect with this --fps, --frame_sampling or --max_frame_stride": [
        {"frame_stride": 2, "fps": "auto"},
        {"frame_stride": 1, "frame_sampling": "chunks"},
        {"frame_stride": 2, "max_frame_stride": 3},
    ],
    "--random_frame_crop and --random_frame_length both draw": [
        {"random_frame_crop": True, "random_frame_length": True}
    ],
    "--min_ar requires --buckets fine": [{"min_ar": 0.7}],
    "--max_ar requires --buckets fine": [{"max_ar": 3.0}],
    "--caption_per_line has no effect with --captions filename": [{"caption_per_line": True, "captions": "filename"}],
    "--control_suffix requires --load_control": [{"control_suffix": "_c"}],
    "--mask_suffix requires --load_mask": [{"mask_suffix": "_m", "mask_folder": CLIPS}],
}


@pytest.mark.parametrize(
    ("message", "rules"), [(message, rules) for message, each in IGNORED.items() for rules in each]
)
def test_a_rule_without_effect_is_refused(message, rules):
    with pytest.raises(UserError, match=message):
        resolve_folders(CLIPS, None, Rules(**rules), tables_only=True)


def test_a_rule_of_the_run_may_have_no_effect_in_one_of_several_folders(tmp_path):
    path = config(tmp_path, '[[dataset]]\npath = "a"\nfps = "auto"\n[[dataset]]\npath = "b"\n')
    assert len(resolve_folders(None, path, Rules(max_frame_stride=4), tables_only=True)) == 2


def test_controls_need_a_control_lora_and_a_mask_floor_needs_masks():
    plain, control, mask = (
        Folder(CLIPS, Rules()),
        Folder(CLIPS, Rules(load_control=True)),
        Folder(CLIPS, Rules(load_mask=True)),
    )
    check_paired_files([plain, mask], uses_controls=False, needs_masks=True)
    check_paired_files([plain, control], uses_controls=True, needs_masks=False)
    with pytest.raises(UserError, match=r"require --control_lora \(folder clips\)"):
        check_paired_files([plain, control], uses_controls=False, needs_masks=False)
    with pytest.raises(UserError, match="--mask_floor requires masks"):
        check_paired_files([plain, control], uses_controls=True, needs_masks=True)


def test_start_pictures_are_read_where_a_folder_asks_for_them(tmp_path):
    path = config(tmp_path, '[[dataset]]\npath = "a"\n[[dataset]]\npath = "b"\nload_first_frame = true\n')
    folders = resolve_folders(None, path, Rules(), tables_only=True)
    assert [folder.rules.reads_first for folder in folders] == [False, True]


def test_rules_that_are_later_than_0_1_are_in_the_identity_only_where_they_are_given():
    changed = Rules(max_frames=8, max_duration=2.5, load_first_frame=True)
    added = ", load_first_frame=True, max_duration=2.5, max_frames=8)"
    assert changed.identity == Rules().identity.removesuffix(")") + added
    assert not any(name in Rules().identity for name in ("first", "max_frames", "max_duration"))


def test_a_rate_is_native_the_models_or_a_number():
    rates = {fps: Rules(fps=fps).rate(16.0) for fps in ("native", "auto", "24", "23.976")}
    assert rates == {"native": None, "auto": 16.0, "24": 24.0, "23.976": 23.976}
    for wrong in ("often", "0", "-8", "nan", "inf", "1000", ""):
        with pytest.raises(UserError, match="--fps must be native, auto or a number"):
            Rules(fps=wrong).rate(16.0)


@dataclass(frozen=True)
class RunOptions(Rules):
    seed: int = option(42, "seed")


def test_the_rules_are_taken_out_of_a_runs_options():
    rules = Rules.of(RunOptions(repeats=2.0, seed=3))
    assert type(rules) is Rules and rules == Rules(repeats=2.0)
