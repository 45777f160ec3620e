"""Lists of clips: which files they choose, and rows that name nothing, a file again, or what lies elsewhere."""

import json
from pathlib import Path

import pytest

from tests.limits import limits
from tests.media import image, video
from utils.common.errors import UserError
from utils.data.clip_list import read_clip_list
from utils.data.dataset import Dataset, open_dataset
from utils.data.folders import Folder, Rules, resolve_folders
from utils.data.scan import survey

FOX, PICTURE = "train/fox.mp4", "train/deep/a picture.png"
ROWS = [
    {"file_path": FOX, "text": "a fox", "type": "video", "width": 64, "height": 48},
    {"file_path": PICTURE, "text": "a teal field", "type": "image"},
]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A dataset of VideoX-Fun's layout, with a file that the list does not name."""
    video(tmp_path / FOX, caption=None)
    image(tmp_path / PICTURE, caption=None)
    video(tmp_path / "train/hare.mp4", caption="a hare")
    video(tmp_path / "train/fox.mov", caption=None)  # shares its stem with a clip
    return tmp_path


def write(folder: Path, rows: object, name: str = "metadata.json") -> Path:
    (folder / name).write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return folder / name


def opened(clips: Path, rows: object = ROWS, name: str = "metadata.json", **rules) -> Dataset:
    listed = Rules(clip_list=write(clips, rows, name), base_res=(64,), **rules)
    return open_dataset([Folder(clips, listed)], limits(), 16.0, decode_check="fast")


def captions_of(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {source.path.name: source.captions for source in dataset.train}


TEXTS = {"fox.mp4": ("a fox",), "a picture.png": ("a teal field",)}
CSV = f"file_path,text,type\n{FOX},a fox,video\n{PICTURE},a teal field,image\n"
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize(("rows", "name"), [(ROWS, "m.json"), (CSV, "m.csv"), (LINES, "m.jsonl"), (ROWS, "m.txt")])
def test_a_list_says_which_clips_are_used_and_their_captions(clips, rows, name, capsys):
    assert captions_of(opened(clips, rows, name)) == TEXTS
    assert "2 files such as train/fox.mov are not used, as it is not in --clip_list" in capsys.readouterr().out


def test_a_list_may_lie_elsewhere_and_its_captions_win_over_caption_files(clips, tmp_path_factory):
    (clips / "train/fox.txt").write_text("another text", encoding="utf-8")
    elsewhere = write(tmp_path_factory.mktemp("lists"), ROWS)
    found = survey(Folder(clips, Rules(clip_list=elsewhere, caption_prefix="kelo, ")), 16.0)
    texts = {source.path.name: source.captions for source in found.sources}
    assert texts == {"fox.mp4": ("kelo, a fox",), "a picture.png": ("kelo, a teal field",)}


def test_paths_may_be_written_as_windows_does_or_in_another_letter_case(clips):
    rows = [{"file_path": ".\\train\\fox.mp4", "text": "a fox"}, {"file_path": "Train/Hare.MP4", "text": "a hare"}]
    assert captions_of(opened(clips, rows)) == {"fox.mp4": ("a fox",), "hare.mp4": ("a hare",)}


def test_what_is_held_out_stays_so_and_needs_no_row(clips):
    video(clips / "val/owl.mp4", caption="an owl")
    dataset = opened(clips)
    assert captions_of(dataset) == TEXTS and [source.captions for source in dataset.val] == [("an owl",)]
    with pytest.raises(UserError, match="row 3 names val/owl.mp4, which is no video or image that is trained on here"):
        opened(clips, [*ROWS, {"file_path": "val/owl.mp4", "text": "an owl"}])


def test_masks_and_start_pictures_belong_to_the_clips_of_a_list(clips):
    image(clips / "train/fox_mask.png", caption=None)
    image(clips / "train/fox_first.png", caption=None)
    (fox,) = opened(clips, ROWS[:1], load_mask=True, load_first_frame=True).train
    assert fox.mask and fox.first and fox.first.path.name == "fox_first.png"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"file_path": "train/gone.mp4", "text": "x"}, "row 3 names train/gone.mp4, which is not in "),
        ({"file_path": "metadata.json", "text": "x"}, "which is no video or image that is trained on here"),
        ({"file_path": "../{}/train/hare.mp4", "text": "x"}, "which may lie elsewhere: write the path from .* without"),
        ({"file_path": "train/../train/hare.mp4", "text": "x"}, "may lie elsewhere"),
        ({"file_path": "..\\train\\hare.mp4", "text": "x"}, "may lie elsewhere"),
        ({"file_path": "/etc/hare.mp4", "text": "x"}, "names /etc/hare.mp4, which may lie elsewhere"),
        ({"file_path": "C:\\hare.mp4", "text": "x"}, "may lie elsewhere"),
        ({"file_path": FOX, "text": "a fox"}, "row 3 names train/fox.mp4 again, as row 1 does: keep one"),
        ({"file_path": "./train/fox.mp4", "text": "x"}, "again, as row 1 does"),
        ({"file_path": "train/hare.mp4", "text": "x", "type": "audio"}, "row 3 has the type 'audio': it must be image"),
        ({"file_path": "train/hare.mp4", "text": "x", "type": 3}, "has the type '3'"),
        (
            {"file_path": "train/hare.mp4", "text": "x", "type": "image"},
            "it is a video, but metadata.json, row 3, says",
        ),
        ({"file_path": "train/hare.mp4", "text": " "}, "its caption in metadata.json, row 3, is empty: write one"),
    ],
)
def test_a_row_that_names_no_clip_of_the_folder_is_reported_with_its_place(clips, row, fault):
    row = row | {"file_path": row["file_path"].format(clips.name)}
    with pytest.raises(UserError, match=fault):
        opened(clips, [*ROWS, row])


def test_a_link_out_of_the_folder_is_the_users_own_and_no_row_can_make_one(clips, tmp_path_factory):
    outside = video(tmp_path_factory.mktemp("outside") / "owl.mp4", caption=None)
    (clips / "train/owl.mp4").symlink_to(outside)
    rows = [*ROWS, {"file_path": "train/owl.mp4", "text": "an owl"}]
    assert captions_of(opened(clips, rows)) == TEXTS | {"owl.mp4": ("an owl",)}
    with pytest.raises(UserError, match="may lie elsewhere"):
        opened(clips, [*ROWS, {"file_path": str(outside), "text": "an owl"}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"file_path": FOX, "text": "a fox"}, "it is not a list of rows"),
        ([{"file_path": FOX}], "row 1 needs a file name .* and a text"),
        ([{"file_path": FOX, "text": 3}], "row 1 needs a file name"),
        ([FOX], "row 1 needs a file name"),
        ([], "it has no rows"),
        ("[{", "it is not valid JSON"),
    ],
)
def test_a_list_that_cannot_be_read_ends_the_run(clips, rows, message):
    with pytest.raises(UserError, match=f"--clip_list .*metadata.json: {message}"):
        opened(clips, rows)
    with pytest.raises(UserError, match="--clip_list .*gone.json: it cannot be read: No such file"):
        read_clip_list(clips / "gone.json", clips, [])


def test_what_a_broken_link_hides_matters_only_where_a_row_names_it(clips):
    (clips / "train/lost.mp4").symlink_to(clips / "nowhere.mp4")
    assert captions_of(opened(clips)) == TEXTS
    with pytest.raises(UserError, match=r"lost.mp4: it is a link to .*, and nothing is there"):
        opened(clips, [*ROWS, {"file_path": "train/lost.mp4", "text": "x"}])


def test_bad_rows_can_be_skipped(clips):
    listed = Rules(clip_list=write(clips, [*ROWS, {"file_path": "gone.mp4", "text": "x"}]), base_res=(64,))
    dataset = open_dataset([Folder(clips, listed)], limits(), 16.0, skip_bad_files=True, decode_check="fast")
    assert captions_of(dataset) == TEXTS


def test_each_line_of_a_text_may_be_a_caption(clips):
    rows = [{"file_path": FOX, "text": "a fox\nred fur"}]
    assert captions_of(opened(clips, rows, caption_per_line=True)) == {"fox.mp4": ("a fox", "red fur")}


def test_a_run_may_resume_with_the_list_in_another_place():
    assert Rules(clip_list=Path("a.json")).identity == Rules().identity


def test_a_list_of_a_config_is_relative_to_it_and_needs_captions_of_its_own(tmp_path):
    (tmp_path / "sets.toml").write_text('[[dataset]]\npath = "a"\ntrain_data_meta = "a.json"\n', encoding="utf-8")
    (folder,) = resolve_folders(None, tmp_path / "sets.toml", Rules(), tables_only=True)
    assert folder.rules.clip_list == tmp_path / "a.json"
    with pytest.raises(UserError, match="--captions has no effect with --clip_list"):
        resolve_folders(tmp_path, None, Rules(captions="filename", clip_list=Path("a")), tables_only=True)
