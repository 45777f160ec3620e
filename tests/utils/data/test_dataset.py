"""Fingerprints and reports of datasets that are put together by hand or found in small folders."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.described import Described
from tests.limits import limits
from tests.media import image, video
from utils.common.digests import DIGESTS, LATENTS
from utils.common.errors import UserError
from utils.common.options import option
from utils.data.dataset import Dataset, open_dataset
from utils.data.folders import Folder, Rules
from utils.data.scan import PairedFile, Source
from utils.media.description import Coverage, Look, MediaInfo
from wan.configs.grid import Grid

INFO, PLAIN = MediaInfo(64, 48, 9, 16.0), Look()


def source(folder: Path, name: str, rules: Rules, **changes) -> Source:
    """A clip whose content is its name: fingerprints depend on bytes, and nothing here decodes them."""
    clips = folder / "clips"
    (clips / name).parent.mkdir(parents=True, exist_ok=True)
    (clips / name).write_bytes(name.encode())
    return replace(Source(clips / name, ("a fox",), INFO, range(9), clips, rules), **changes)


def paired(path: Path, content: bytes) -> PairedFile:
    path.write_bytes(content)
    return PairedFile(path, INFO)


def fingerprint(folder: Path, *sources: Source) -> dict[str, str]:
    return Dataset([*sources], [], [], folder / "cache").fingerprint


def test_fingerprints_are_those_of_version_0_1(tmp_path):
    control, mask = paired(tmp_path / "control.mp4", b"edges"), paired(tmp_path / "mask.png", b"mask")
    shapes = {"base_res": (320, 624), "buckets": "fine", "min_ar": 0.7, "max_ar": 3.0, "enlarge": True}
    frames = {"fps": "auto", "random_frame_length": True, "frame_sampling": "chunks", "repeats": 2.5}
    captions = {"caption_per_line": True, "caption_prefix": "kelo's, ", "caption_dropout": 0.1}
    rich = Rules(**shapes, **frames, **captions, control_folder=tmp_path / "edges", mask_folder=tmp_path / "masks")
    suffixes = Rules(load_control=True, control_suffix=".edges", load_mask=True, mask_suffix="-m")
    hares = ("kelo's, a hare", 'kelo\'s, a "hare"\n')
    sources = [
        source(tmp_path, "fox.mp4", Rules()),
        source(tmp_path, "deep/hare.mp4", rich, captions=hares, frame_indices=(0, 2, 3), control=control, mask=mask),
        source(tmp_path, "owl.mp4", replace(suffixes, max_frame_stride=4, captions="filename"), control=control),
        source(tmp_path, "twice.mp4", Rules()),
        source(tmp_path, "twice.mp4", Rules(base_res=(320,))),
    ]
    assert fingerprint(tmp_path, *sources) == {
        str(Path("clips/fox.mp4")): "c7ba53ea57a05147",
        str(Path("clips/deep/hare.mp4")): "9fecf8b3278eea76",
        str(Path("clips/owl.mp4")): "040f738fb533ae60",
        str(Path("clips/twice.mp4")): "011a186031cca236",
    }


@dataclass(frozen=True)
class LaterRules(Rules):
    """Version 0.1's, and two that a later version adds."""

    speed: float = option(1.0, "playback speed")
    crop: str = option("random", "place of the cut")


def test_a_rule_added_later_changes_fingerprints_only_where_it_is_not_its_default(tmp_path):
    before = fingerprint(tmp_path, source(tmp_path, "fox.mp4", Rules()))
    assert fingerprint(tmp_path, source(tmp_path, "fox.mp4", LaterRules())) == before
    changed = [LaterRules(speed=2.0), LaterRules(speed=3.0), LaterRules(crop="middle"), LaterRules(2.0, crop="middle")]
    texts = [fingerprint(tmp_path, source(tmp_path, "fox.mp4", rules))[str(Path("clips/fox.mp4"))] for rules in changed]
    assert len({*texts, *before.values()}) == 5


def test_whatever_changes_a_clips_samples_changes_its_fingerprint(tmp_path):
    fox = source(tmp_path, "fox.mp4", Rules())
    control = paired(tmp_path / "control.mp4", b"edges")
    variants = [
        fox,
        replace(fox, captions=("a hare",)),
        replace(fox, frame_indices=range(8)),
        replace(fox, rules=Rules(repeats=2.0)),
        replace(fox, control=control),
        replace(fox, control=paired(tmp_path / "other.mp4", b"other edges")),
    ]
    assert len({tuple(fingerprint(tmp_path, variant).values()) for variant in variants}) == len(variants)
    first = paired(tmp_path / "first.png", b"a start")
    assert fingerprint(tmp_path, replace(fox, first=first)) != fingerprint(tmp_path, fox)
    moved = replace(control, path=(tmp_path / "control.mp4").rename(tmp_path / "moved.mp4"))
    moved_folder = Rules(control_folder=tmp_path / "elsewhere")
    same = fingerprint(tmp_path, replace(fox, control=moved, rules=moved_folder))
    assert same == fingerprint(tmp_path, replace(fox, control=moved))
    assert (tmp_path / "cache" / LATENTS / DIGESTS).exists()


def test_files_that_are_read_otherwise_than_before_change_their_clips_fingerprint(tmp_path):
    plain = source(tmp_path, "fox.mp4", Rules(), mask=paired(tmp_path / "mask.png", b"mask"))

    def seen(look: Look = PLAIN, rule: str = "brightness") -> str:
        mask = replace(plain.mask, info=replace(INFO, mask=Coverage(rule, 0.5, 0, 255, rule != "brightness")))
        (text,) = fingerprint(tmp_path, replace(plain, info=replace(INFO, look=look), mask=mask)).values()
        return text

    assert seen() == seen(Look(orientation=6)) == "eb6381085879adf9"  # that of version 0.2
    looks = [seen(Look(transfer=transfer)) for transfer in ("pq", "hlg")]
    others = [*looks, seen(rule="opacity"), seen(Look(transfer="pq"), "labels")]
    assert len({seen(), *others}) == 5


LIMITS = limits(token_limit=60)
SMALL = Rules(base_res=(64,))


def test_a_dataset_has_the_clips_of_all_folders_and_holds_out_the_first_validation_folder(tmp_path, capsys):
    video(tmp_path / "one" / "fox.mp4", caption="a fox")
    video(tmp_path / "one" / "val" / "owl.mp4", caption="an owl")
    video(tmp_path / "one" / "test" / "elk.mp4", caption="an elk")
    image(tmp_path / "two" / "train" / "hare.png", caption="a hare")
    video(tmp_path / "two" / "beside_train.mp4")
    prefixed = replace(SMALL, caption_prefix="kelo, ")
    data = open_dataset([Folder(tmp_path / "one", SMALL), Folder(tmp_path / "two", prefixed)], LIMITS, 16.0)
    assert [source.path.stem for source in data.train] == ["fox", "hare"]
    assert [source.path.stem for source in data.val] == ["owl"]
    assert [(window.source.path.stem, window.frames) for window in data.windows] == [("fox", 9), ("hare", 1)]
    assert data.cache_folder == tmp_path / "one" / ".wan_cache"
    assert data.captions == ["a fox", "kelo, a hare", "an owl"]
    said = capsys.readouterr().out
    assert "held out, ok" in said and "an epoch has 2 samples" in said


def test_the_clips_of_a_dataset_are_counted_under_the_name_of_its_folder(tmp_path):
    one, two = (source(tmp_path / place, "fox.mp4", Rules()) for place in ("a", "b"))
    train = replace(one, folder=tmp_path / "owls" / "train")
    data = Dataset([one, two, train], [one], [], tmp_path)
    assert data.clips_by_folder == {"clips": 2, "owls": 1}


def test_captions_include_the_empty_one_only_if_training_drops_captions(tmp_path):
    fox = source(tmp_path, "fox.mp4", Rules())
    dropping = replace(fox, rules=Rules(caption_dropout=0.1))
    assert Dataset([fox], [dropping], [], tmp_path).captions == ["a fox", "a fox"]
    assert Dataset([dropping], [fox], [], tmp_path).captions == ["a fox", "a fox", ""]


def test_bad_files_are_listed_together_and_skipped_only_on_request(tmp_path, capsys):
    video(tmp_path / "fox.mp4")
    video(tmp_path / "mute.mp4", caption=None)
    video(tmp_path / "short.mp4", frames=3, caption=None)
    video(tmp_path / "val" / "cut.mp4").write_bytes(b"cut")
    with pytest.raises(
        UserError, match=r"^3 files cannot be used:\n(  .*\n){4}fix what is listed, or pass --skip"
    ) as caught:
        open_dataset([Folder(tmp_path, SMALL)], LIMITS, 16.0)
    assert f"{tmp_path / 'val' / 'cut.mp4'}: not a readable video" in str(caught.value)
    capsys.readouterr()
    data = open_dataset([Folder(tmp_path, SMALL)], LIMITS, 16.0, tmp_path / "caches", skip_bad_files=True)
    said = capsys.readouterr().out
    assert "skipping 3 files:\n" in said and f"{tmp_path / 'short.mp4'}: it has 3 frames" in said
    assert [source.path.stem for source in data.train] == ["fox"] and data.cache_folder == tmp_path / "caches"


def test_a_dataset_without_a_usable_clip_is_refused(tmp_path):
    video(tmp_path / "mute.mp4", caption=None)
    with pytest.raises(UserError, match="no usable clip is left in "):
        open_dataset([Folder(tmp_path, SMALL)], LIMITS, 16.0, skip_bad_files=True)


def test_a_clip_that_does_not_fit_the_token_limit_is_named(tmp_path):
    video(tmp_path / "fox.mp4")
    with pytest.raises(
        UserError, match=r"fox\.mp4: one frame of 80x48 takes 15 tokens, more than the token_limit of 11"
    ):
        open_dataset([Folder(tmp_path, replace(SMALL, enlarge=True))], limits(token_limit=11), 16.0)


def test_a_number_of_frames_that_the_model_does_not_take_is_rounded_up_and_said_once(tmp_path, capsys):
    for name in ("one", "two", "three"):
        video(tmp_path / name / "fox.mp4", frames=30)
    frames = {"one": 8, "two": 8, "three": 5}
    folders = [Folder(tmp_path / name, replace(SMALL, max_frames=count)) for name, count in frames.items()]
    data = open_dataset(folders, LIMITS, 16.0)
    assert [window.frames for window in data.windows] == [9, 9, 5]
    assert capsys.readouterr().out.count("--max_frames") == 1
    open_dataset([Folder(tmp_path / "one", SMALL)], LIMITS, 16.0)
    assert "--max_frames" not in capsys.readouterr().out
    open_dataset(folders, replace(LIMITS, grid=Grid(frame=8, side=16)), 16.0)
    said = capsys.readouterr().out
    assert "--max_frames 8: 9 frames, as the model takes 8n + 1\n--max_frames 5: 9 frames, as" in said


def test_what_is_not_used_is_said_once_for_all_folders_before_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.data.dataset.Inspector", lambda cache, full: Described())
    files = {
        "one": "Train/a.mp4 Train/a.txt Train/x.psd VAL/b.mp4 VAL/b.txt captions/lost.txt test/c.mp4 d.mp4",
        "two": "e.mp4 E.txt x.psd",
        "one/part": "f.mp4 f.txt",
    }
    for folder, names in files.items():
        for name in names.split():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text("a clip")
    data = open_dataset([Folder(tmp_path / name, SMALL) for name in files], LIMITS, 16.0, tmp_path / "cache")
    assert [source.path.name for source in (*data.train, *data.val)] == ["a.mp4", "e.mp4", "f.mp4", "b.mp4"]
    assert capsys.readouterr().out.split("\n\n")[0].splitlines() == [
        "captions: 1 name differs in letter case, such as E.txt for e.mp4",
        "the folder Train/ is used as train/",
        "the folder VAL/ is used as val/",
        "the folder test/ is not used, as VAL/ is",
        "the file d.mp4 is not used, as only train/ is",
        "2 files such as Train/x.psd are not read, as no decoder here knows the format: "
        "convert pictures to PNG or JPEG, videos to MP4",
        "the caption file captions/lost.txt is not used, as no clip has this name",
    ]


def test_an_empty_part_is_refused_with_where_media_lie(tmp_path):
    (tmp_path / "train").mkdir()
    image(tmp_path / "a.png")
    with pytest.raises(UserError) as caught:
        open_dataset([Folder(tmp_path, SMALL)], LIMITS, 16.0)
    nothing = (
        f"there are no videos or images in {tmp_path / 'train'} or its subfolders: docs/formats.md lists what is read"
    )
    assert str(caught.value).splitlines() == [
        nothing,
        "1 file lies beside train/, such as a.png: move it in, or remove train/",
    ]
    (tmp_path / "masks").mkdir()
    image(tmp_path / "train" / "b.png")
    with pytest.raises(UserError, match=r"no videos or images in .*masks or its subfolders: [^\n]*$"):
        open_dataset([Folder(tmp_path, replace(SMALL, mask_folder=tmp_path / "masks"))], LIMITS, 16.0)


@pytest.mark.parametrize(
    ("decoded", "seconds", "line"),
    [
        (7, 8.64, "decoded every frame of 7 videos in 8.6 s (--decode_check fast does not)\n\nfile"),
        (1, 2.0, "decoded every frame of 1 video in 2.0 s (--decode_check fast does not)\n\nfile"),
        (0, 8.64, "file"),
        (7, 1.99, "file"),
    ],
)
def test_the_cost_of_decoding_is_said_where_it_was_notable(tmp_path, capsys, monkeypatch, decoded, seconds, line):
    class Slow(Described):
        def inspect(self, *args):
            self.decoded, self.seconds = decoded, seconds
            return super().inspect(*args)

    monkeypatch.setattr("utils.data.dataset.Inspector", lambda cache, full: Slow())
    for name in ("a.mp4", "a.txt"):
        (tmp_path / name).write_text("a clip")
    open_dataset([Folder(tmp_path, SMALL)], LIMITS, 16.0, tmp_path / "cache")
    assert capsys.readouterr().out.startswith(line)


def test_rows_are_in_natural_order_and_sources_in_that_of_paths(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.data.dataset.Inspector", lambda cache, full: Described())
    names = ("clip1", "clip10", "clip2")
    for name in [f"{name}.{ending}" for name in names for ending in ("mp4", "txt")]:
        (tmp_path / name).write_text("a clip")
    data = open_dataset([Folder(tmp_path, SMALL)], LIMITS, 16.0, tmp_path / "cache")
    assert [source.path.stem for source in data.train] == [window.source.path.stem for window in data.windows]
    assert [source.path.stem for source in data.train] == list(names)
    rows = capsys.readouterr().out.splitlines()[2:5]
    assert [row.split()[0] for row in rows] == ["clip1.mp4", "clip2.mp4", "clip10.mp4"]


def test_a_plain_folder_gets_no_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.data.dataset.Inspector", lambda cache, full: Described())
    for name in ("train/a.mp4", "train/a.txt", "val/b.png", "val/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a clip")
    open_dataset([Folder(tmp_path, SMALL)], LIMITS, 16.0, tmp_path / "cache")
    said = capsys.readouterr().out
    assert said.startswith("file   size ") and all(line.endswith("ok") for line in said.splitlines()[2:4])


def test_a_name_cannot_break_the_list_of_problems(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.dataset.Inspector", lambda cache, full: Described())
    (tmp_path / "a\nb\x1b.mp4").touch()
    with pytest.raises(UserError, match=r"^1 file cannot be used:\n  .*a\\nb\\x1b\.mp4: it has no caption") as caught:
        open_dataset([Folder(tmp_path, SMALL)], LIMITS, 16.0)
    assert len(str(caught.value).splitlines()) == 3


def test_a_token_limit_beside_sizes_is_refused_where_no_folder_would_heed_it(tmp_path):
    video(tmp_path / "a/fox.mp4")
    sized = Folder(tmp_path / "a", Rules(video_sample_size=64, max_frames=5))
    with pytest.raises(
        UserError, match="--token_limit has no effect with --video_sample_size: leave it out; for fewer"
    ):
        open_dataset([sized], limits(5_000), 16.0)
    plain = Folder(tmp_path / "a", Rules(base_res=(64,)))
    assert len(open_dataset([sized, plain], limits(5_000), 16.0, decode_check="fast").train) == 2
