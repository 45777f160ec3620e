from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.limits import limits
from tests.media import video
from tests.tiny import FAMILY
from utils.common.errors import RunError, UserError
from utils.data.folders import Folder, Rules
from utils.data.plan import Window, fixed_windows, flatten_windows
from utils.data.scan import scan
from utils.encoding import latent_cache
from utils.encoding.latent_cache import LatentCache, Layout, cached_bytes
from utils.media.controls import ControlSignal

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
