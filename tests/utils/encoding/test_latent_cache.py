from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.encoders import family_encoders
from tests.limits import limits
from tests.media import image, video
from tests.tiny import FAMILY, tiny_shape
from utils.common.errors import RunError, UserError
from utils.data.folders import Folder, Rules
from utils.data.loading import load_clip
from utils.data.plan import Limits, Window, fixed_windows, flatten_windows, middle_window
from utils.data.scan import PairedFile, Source, scan
from utils.encoding import latent_cache
from utils.encoding.latent_cache import LatentCache, Layout, cached_bytes
from utils.media.controls import ControlSignal
from utils.media.description import Coverage, Look, MediaInfo
from wan.configs import FAMILIES, Family

LIMITS = limits(token_limit=60)


@pytest.fixture
def window(tmp_path) -> Window:
    video(tmp_path / "clips" / "a.mp4", frames=9)
    video(tmp_path / "clips" / "a_mask.mp4", frames=9, caption=None)
    sources, _ = scan(Folder(tmp_path / "clips", Rules(base_res=(32,), load_mask=True)), 16.0)
    return flatten_windows(fixed_windows(sources, LIMITS, 1))[0]


def cache(tmp_path: Path, fingerprint: str = "vae", control: str | None = None) -> LatentCache:
    found = LatentCache(tmp_path / "cache", fingerprint, Layout(control=control and ControlSignal(control)))
    found.check_disk_space(0)
    return found


PARTS = {"latents": torch.randn(16, 3, 4, 4), "mask": torch.rand(3, 4, 4)}


def test_what_is_stored_is_loaded_bit_for_bit_and_no_longer_missing(tmp_path, window):
    store = cache(tmp_path)
    assert store.missing([window, window]) == [window]
    with pytest.raises(UserError, match="--cache_latents again"):
        store.load(window)
    store.store(window, PARTS)
    again = cache(tmp_path)
    assert again.missing([window]) == [] and again.load(window).keys() == PARTS.keys()
    assert all(torch.equal(again.load(window)[name], part) for name, part in PARTS.items())


def test_the_name_depends_on_everything_that_the_latents_do_and_on_nothing_else(tmp_path, window):
    path = cache(tmp_path).path(window)
    changed = [
        replace(window, indices=window.indices[:5]),
        replace(window, width=48),
        replace(window, position=(0.5, 0.4)),
    ]
    names = {cache(tmp_path).path(other) for other in changed}
    names |= {cache(tmp_path, "other").path(window), cache(tmp_path, control="tile").path(window), path}
    assert len(names) == 6
    assert cache(tmp_path).path(replace(window, caption="another")) == path
    moved = tmp_path / "elsewhere.mp4"
    moved.write_bytes(window.source.path.read_bytes())
    assert cache(tmp_path).path(replace(window, source=replace(window.source, path=moved))) == path
    video(window.source.path, frames=10)
    assert cache(tmp_path).path(window) != path


def test_pictures_that_earlier_versions_read_otherwise_have_names_of_their_own(tmp_path, window):
    source = window.source
    mask = PairedFile(source.mask.path, replace(source.mask.info, mask=Coverage("opacity", 0.5, 0, 255)))
    others = [
        *(replace(source, info=replace(source.info, look=look)) for look in (Look(interlaced="all"), Look(icc=True))),
        replace(source, info=replace(source.info, renumbered=True)),
        replace(source, mask=mask),
    ]
    names = {cache(tmp_path).path(replace(window, source=other)) for other in (source, *others)}
    assert len(names) == 5
    turned = replace(source, info=replace(source.info, look=Look(orientation=6)))
    assert cache(tmp_path).path(replace(window, source=turned)) in names


def test_a_cache_file_that_was_cut_short_is_missing(tmp_path, window):
    store = cache(tmp_path)
    store.store(window, PARTS)
    whole = store.path(window).read_bytes()
    for content in (whole[:-1], whole[:10], b""):
        store.path(window).write_bytes(content)
        assert store.missing([window]) == [window]
    store.store(window, PARTS)
    assert store.missing([window]) == []


@pytest.mark.parametrize("control", [None, "tile"])
@pytest.mark.parametrize(
    "parts",
    [{"mask"}, {"latents"}, {"latents", "channels"}, {"latents", "mask", "image"}, {"latents", "context", "mask"}],
)
def test_a_file_with_other_parts_than_the_window_needs_is_missing_and_never_loaded(tmp_path, window, parts, control):
    store = cache(tmp_path, control=control)
    store.store(window, {name: torch.zeros(2) for name in parts})
    assert store.missing([window]) == [window]
    needed = "channels, latents, mask" if control else "latents, mask"
    with pytest.raises(UserError, match=f"holds .*, but {needed} is needed: run --cache_latents again"):
        store.load(window)


def test_a_run_continues_from_the_cache_if_the_clip_was_deleted(tmp_path, window):
    store = cache(tmp_path)
    store.store(window, PARTS)
    window.source.path.unlink()
    assert store.load(window).keys() == PARTS.keys()
    with pytest.raises(UserError, match="cannot read"):
        cache(tmp_path).path(window)


def test_pruning_removes_what_no_window_needs_also_of_other_vaes(tmp_path, window):
    store, old = cache(tmp_path), cache(tmp_path, "old")
    other = replace(window, width=48)
    for where, kept in ((store, window), (store, other), (old, window)):
        where.store(kept, PARTS)
    size = store.path(other).stat().st_size + old.path(window).stat().st_size
    assert store.prune([window]) == size
    assert store.missing([window, other]) == [other] and not list(old.folder.iterdir())


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache.shutil, "disk_usage", lambda path: FullDisk)
    with pytest.raises(UserError, match=r"the latents take 5\.00 GB, and .* has 1\.00 GB free"):
        LatentCache(tmp_path / "cache", "vae", Layout()).check_disk_space(5_000_000_000)


class FullDisk:
    free = 1_000_000_000


def test_a_folder_that_cannot_be_made_or_written_is_reported(tmp_path, window):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(UserError, match="--cache_dir"):
        LatentCache(tmp_path / "cache", "vae", Layout()).check_disk_space(0)
    with pytest.raises(RunError, match="cannot write latents"):
        LatentCache(tmp_path / "nowhere", "vae", Layout()).store(window, PARTS)


def test_the_size_that_is_printed_is_that_of_the_files(tmp_path, window):
    store = cache(tmp_path)
    window = replace(window, source=replace(window.source, mask=None))
    store.store(window, {name: torch.zeros(16, *shape(window)) for name in ("latents", "channels")})
    told = cached_bytes([window], FAMILY, has_control=True)
    assert told <= store.path(window).stat().st_size <= told + 1000


def shape(window: Window) -> tuple[int, int, int]:
    return (window.frames - 1) // 4 + 1, window.height // 8, window.width // 8


# ------------------------------------------------------------------------------------------------------------ families

I2V, FLF2V = FAMILIES["wan2.1-i2v-14B-480P"], FAMILIES["wan2.1-flf2v-14B-720P"]
TI2V = FAMILIES["wan2.2-ti2v-5B"]
TILE = ControlSignal("tile")


def written_window(folder: Path, *paired: str) -> Window:
    """A window of files whose bytes are their names."""
    for name in ("clip", *paired):
        (folder / name).write_bytes(name.encode())
    info = MediaInfo(64, 48, 10, 16.0)
    others = {name: PairedFile(folder / name, info) for name in paired}
    source = Source(folder / "clip", ("a clip",), info, range(2, 10), folder, Rules(), **others)
    return Window(source, "a clip", 64, 48, (2, 3, 4, 5, 6), (0.5, 0.25), LIMITS.grid)


@pytest.mark.parametrize(
    ("paired", "control", "name"),
    [
        ((), None, "cbc577a1331fd256652d644adf17d8d0"),
        ((), "tile", "fe12321c0717f3213966136de8c12f5f"),
        (("control", "mask"), "tile", "9d637a161ede6731be2bc0992e4770db"),
    ],
)
def test_latents_of_a_text_to_video_model_have_the_names_that_version_0_1_gave_them(tmp_path, paired, control, name):
    found = cache(tmp_path, control=control).path(written_window(tmp_path, *paired))
    assert found == tmp_path / "cache" / "vae" / f"{name}.safetensors"


def test_the_name_depends_on_what_the_model_is_given_and_through_what(tmp_path):
    layouts = [
        Layout(), Layout(control=TILE), Layout(control=ControlSignal("tile", keeps_first=True)),
        Layout((0,), "channels"), Layout((0, -1), "channels"), Layout((0,), "latents"),
        Layout((0,), "channels", "clip a"), Layout((0,), "channels", "clip b"), Layout((0, -1), "channels", "clip a"),
        Layout((0,), "channels", "clip a", TILE), Layout((0,), "latents", "", TILE),
        Layout((0,), "channels", given_alone=True), Layout((0,), "latents", given_alone=True),
    ]  # fmt: skip
    window = written_window(tmp_path)
    paths = [LatentCache(tmp_path, "vae", layout).path(window) for layout in layouts]
    assert len(set(paths)) == len(layouts)
    assert [LatentCache(tmp_path, "vae", replace(layout)).path(window) for layout in layouts] == paths


def test_the_name_depends_on_the_bytes_of_a_start_picture(tmp_path):
    layout, names = Layout((0,), "channels"), set()
    for content in (None, b"one", b"another"):
        window = written_window(tmp_path, *([] if content is None else ["first"]))
        (tmp_path / "first").write_bytes(content or b"")
        names.add(LatentCache(tmp_path, "vae", layout).path(window))
    assert len(names) == 3


@pytest.mark.parametrize(
    ("layout", "frames", "names"),
    [
        (Layout(), 5, set()),
        (Layout(control=TILE), 5, {"channels"}),
        (Layout((0,), "channels"), 5, {"channels"}),
        (Layout((0,), "channels", "clip"), 5, {"channels", "image"}),
        (Layout((0,), "channels", "clip"), 1, {"channels", "image"}),
        (Layout((0,), "latents"), 5, {"first"}),
        (Layout((0,), "latents"), 1, set()),
        (Layout((0,), "latents", control=TILE), 5, {"channels", "first"}),
    ],
)
def test_a_file_has_the_parts_that_its_family_reads(tmp_path, layout, frames, names):
    window = written_window(tmp_path)
    window = replace(window, indices=window.indices[:frames])
    assert layout.names(window) == {"latents"} | names
    masked = replace(window, source=written_window(tmp_path, "mask").source)
    assert layout.names(masked) == {"latents", "mask"} | names
    assert replace(layout, given_alone=True).names(masked) == names


@pytest.mark.parametrize("control", [None, TILE])
@pytest.mark.parametrize("family", [I2V, FLF2V, TI2V, FAMILIES["wan2.2-i2v-A14B"]], ids=lambda family: family.task)
def test_the_size_and_the_parts_are_those_of_what_the_encoders_make_of_clips_and_images(tmp_path, family, control):
    video(tmp_path / "clips" / "a.mp4", frames=9, size=(64, 64))
    image(tmp_path / "clips" / "b.png", size=(64, 64))
    sources, _ = scan(Folder(tmp_path / "clips", Rules(base_res=(64,))), family.fps)
    windows = [middle_window(source, 64, Limits(1000, 1, family.grid)) for source in sources]
    assert sorted(window.frames > 1 for window in windows) == [False, True]
    small: Family = replace(family, shape=tiny_shape(family))
    encoders = family_encoders(small, control)
    store = LatentCache(tmp_path, "vae", Layout(family.given, family.given_as, "clip" if family.clip else "", control))
    store.check_disk_space(0)
    for window in windows:
        store.store(window, encoders.encode(load_clip(window), torch.empty(0, 0)).parts())
    assert store.missing(windows) == []
    for window in windows:
        told = cached_bytes([window], small, has_control=control is not None)
        assert told <= store.path(window).stat().st_size <= told + 1000
