"""Samples fresh from the encoders and samples from the cache: the loop cannot tell them apart."""

import re
import threading
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

import train_wan_lora
import utils.encoding.samples
from tests.limits import limits
from tests.media import image, video
from tests.tiny import tiny_transformer, write_model
from utils.adapters.lora import add_lora, select_modules, widen_patch_embedding
from utils.common.decisions import Decisions
from utils.common.errors import UserError
from utils.data.folders import Folder, Rules
from utils.data.plan import Plan, Window, fixed_windows, flatten_windows, largest_window
from utils.data.scan import scan
from utils.encoding.samples import CachedSamples, Caches, FreshSamples, LatentEncoding, Samples, open_samples
from utils.encoding.text import TextEncoding
from utils.media.controls import ControlSignal
from wan.checkpoints import open_model, vae_fingerprint, vision_fingerprint
from wan.configs import FAMILIES

CPU = torch.device("cpu")
LIMITS = limits(token_limit=60)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def windows_of(folder: Path, **rules) -> list[Window]:
    sources, problems = scan(Folder(folder, Rules(base_res=(64,), enlarge=True, **rules)), 16.0)
    assert not problems
    return flatten_windows(fixed_windows(sources, LIMITS, 2))


def both(folder: Path, model: Path, windows: list[Window], control: str | None) -> tuple[FreshSamples, CachedSamples]:
    files = open_model(model)
    texts = TextEncoding(files, CPU)
    captions = texts.cache(folder / "text")
    texts.encode_missing({captions: [window.caption for window in windows]})
    encoding = LatentEncoding(files, CPU, control and ControlSignal(control))
    cache = encoding.encode_missing(folder / "latents", windows, num_workers=0)
    fresh = FreshSamples(encoding.load(), captions.load)
    return fresh, CachedSamples(cache, captions.load, CPU, encoding.load)


@pytest.mark.parametrize("control", [None, "tile"])
def test_the_loss_is_the_same_to_the_bit(tmp_path, model, control):
    video(tmp_path / "a.mp4", frames=9)
    video(tmp_path / "b.mp4", frames=13)
    image(tmp_path / "c.png")
    windows = windows_of(tmp_path)
    opts = train_wan_lora.parse_options(train_wan_lora.Options, [])
    torch.manual_seed(0)
    transformer = tiny_transformer()
    if control:
        widen_patch_embedding(transformer, 32)
        torch.nn.init.normal_(transformer.patch_embedding.weight)  # or the control would count for nothing
    add_lora(transformer, select_modules(transformer, ["attn"]), 4, 4)
    for window in windows:
        losses = []
        for samples in both(tmp_path, model, windows, control):
            batch = samples.load_batch([window])
            torch.manual_seed(1)
            losses.append(train_wan_lora.training_loss(batch, opts, (0.0, 1.0), transformer, None).value)
        assert torch.equal(*losses)


def test_control_and_mask_come_back_from_the_cache(tmp_path, model):
    video(tmp_path / "a.mp4", frames=9)
    video(tmp_path / "a_mask.mp4", frames=9, caption=None)
    windows = windows_of(tmp_path, load_mask=True)
    fresh, cached = both(tmp_path, model, windows, "tile")
    for window in windows:
        one, other = (samples.load_batch([window]) for samples in (fresh, cached))
        assert torch.equal(one.latents, other.latents) and torch.equal(one.cond.channels, other.cond.channels)
        assert torch.equal(one.mask, other.mask) and one.mask.shape == one.latents[:, 0].shape
        assert 0 <= one.mask.min() < one.mask.max() <= 1


def test_a_second_run_encodes_nothing_and_a_touched_clip_only_itself(tmp_path, model, capsys):
    video(tmp_path / "a.mp4", frames=9)
    video(tmp_path / "b.mp4", frames=9)
    both(tmp_path, model, windows_of(tmp_path), None)
    assert "latents: 4 to encode, 0 cached" in capsys.readouterr().out
    both(tmp_path, model, windows_of(tmp_path), None)
    assert "latents: 0 to encode, 4 cached" in capsys.readouterr().out
    video(tmp_path / "b.mp4", frames=10)
    (tmp_path / "a.txt").write_text("another caption")
    both(tmp_path, model, windows_of(tmp_path), None)
    said = capsys.readouterr().out
    assert "latents: 2 to encode, 2 cached" in said and "text: 1 to encode, 1 cached" in said


def test_a_mask_moves_the_loss_to_where_it_is_white(tmp_path):
    from utils.diffusion.objectives import squared_error

    target = torch.zeros(1, 16, 2, 4, 4)
    velocity = target.clone()
    velocity[..., :2] = 1
    left = torch.zeros(1, 2, 4, 4)
    left[..., :2] = 1
    assert squared_error(velocity, target, left) == 1 and squared_error(velocity, target, 1 - left) == 0
    assert squared_error(velocity, target, torch.ones_like(left)) == squared_error(velocity, target) == 0.5
    floored = squared_error(velocity, target, 0.1 + 0.9 * (1 - left))
    assert floored == pytest.approx(0.1 / 1.1)


def test_training_from_the_cache_loads_neither_the_vae_nor_the_text_encoder(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video(tmp_path / "clips" / "a.mp4", frames=9)
    flags = f"--dataset clips --pretrained_model_name_or_path {model} --base_res 64 --token_limit 60 --cache_latents"
    train_wan_lora.main([*flags.split(), "--cache_only"])
    assert not (tmp_path / "outputs").exists()
    for name in ("utils.encoding.samples.load_vae", "utils.encoding.text.load_text_encoder"):
        monkeypatch.setattr(name, None)
    train_wan_lora.main([*flags.split(), "--max_train_steps", "1"])
    assert len(list((tmp_path / "outputs").glob("*/checkpoints/wan-lora-*"))) == 1


def test_a_stream_gives_the_planned_batches_from_any_place_on(tmp_path, model):
    for name in "abc":
        video(tmp_path / f"{name}.mp4", frames=9)
    sources, _ = scan(Folder(tmp_path, Rules(base_res=(64,), enlarge=True)), 16.0)
    fixed = fixed_windows(sources, LIMITS, 2)
    plan = Plan(sources, LIMITS, seed=0, fixed=fixed)
    planned = [*plan.epoch(0), *plan.epoch(1)]
    for samples in both(tmp_path, model, flatten_windows(fixed), None):
        with closing(samples.stream(plan, start_batch=2)) as stream:
            for windows in planned[2:]:
                batch, expected = next(stream), samples.load_batch(windows)
                assert torch.equal(batch.latents, expected.latents) and torch.equal(batch.cond.text, expected.cond.text)


def test_closing_a_stream_ends_the_loading(tmp_path, model, monkeypatch):
    video(tmp_path / "a.mp4", frames=9)
    sources, _ = scan(Folder(tmp_path, Rules(base_res=(64,), enlarge=True)), 16.0)
    ended, original = [], utils.encoding.samples.batches

    def watched(*args):
        try:
            yield from original(*args)
        finally:
            ended.append(args[3])

    monkeypatch.setattr(utils.encoding.samples, "batches", watched)
    fresh, _ = both(tmp_path, model, windows_of(tmp_path), None)
    stream = replace(fresh, num_workers=1).stream(Plan(sources, LIMITS, 0))
    next(stream)
    assert not ended
    stream.close()
    assert ended == [1]


def test_cached_samples_are_loaded_by_a_thread_that_ends_with_their_stream(tmp_path, model):
    video(tmp_path / "a.mp4", frames=9)
    sources, _ = scan(Folder(tmp_path, Rules(base_res=(64,), enlarge=True)), 16.0)
    fixed, before = fixed_windows(sources, LIMITS, 2), threading.active_count()
    _, cached = both(tmp_path, model, flatten_windows(fixed), None)
    with closing(cached.stream(Plan(sources, LIMITS, 0, fixed=fixed))) as stream:
        next(stream)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_cached_file_that_is_lost_is_an_error_of_its_own_batch(tmp_path, model):
    video(tmp_path / "a.mp4", frames=9)
    video(tmp_path / "b.mp4", frames=13)
    sources, _ = scan(Folder(tmp_path, Rules(base_res=(64,), enlarge=True)), 16.0)
    fixed = fixed_windows(sources, LIMITS, 1)
    _, cached = both(tmp_path, model, flatten_windows(fixed), None)
    plan = Plan(sources, LIMITS, 0, fixed=fixed)
    (first,), (second,) = plan.epoch(0)
    cached.latents.path(second).unlink()
    with closing(cached.stream(plan)) as stream:
        assert torch.equal(next(stream).latents[0], cached.load(first).latents)
        with pytest.raises(UserError, match="is missing or corrupted .*: run --cache_latents again"):
            next(stream)


def test_the_encoders_of_cached_samples_are_loaded_when_they_are_asked_for(tmp_path, model, monkeypatch):
    video(tmp_path / "a.mp4", frames=9)
    _, cached = both(tmp_path, model, windows_of(tmp_path), None)
    loads, load_vae = [], utils.encoding.samples.load_vae
    monkeypatch.setattr(utils.encoding.samples, "load_vae", lambda *args: loads.append(args) or load_vae(*args))
    cached.load_batch(windows_of(tmp_path)[:1])
    assert not loads
    assert cached.open_encoders().vae.stride == (4, 8, 8) and len(loads) == 1


def test_samples_are_opened_as_the_options_say(tmp_path, model, capsys):
    video(tmp_path / "a.mp4", frames=9)
    windows, files = windows_of(tmp_path), open_model(model)
    texts = TextEncoding(files, CPU).cache(tmp_path / "text").load

    def opened(chosen: list[Window], **caches: object) -> Samples:
        options = Caches(**caches)
        return open_samples(options, LatentEncoding(files, CPU), chosen, texts, tmp_path / "cache", num_workers=0)

    assert isinstance(opened(windows), FreshSamples) and not (tmp_path / "cache").exists()
    cached = opened(windows, cache_latents=2)
    assert isinstance(cached, CachedSamples) and cached.latents.missing(windows) == []
    capsys.readouterr()
    pruned = opened(windows[:1], cache_latents=2, prune_cache=True)
    assert pruned.latents.missing(windows) == windows[1:]
    assert re.search(r"latents: removed \d\.\d+ MB that this run does not use", capsys.readouterr().out)


def test_latents_of_a_vae_in_bf16_have_a_place_of_their_own(tmp_path, model):
    video(tmp_path / "a.mp4", frames=9)
    windows, files = windows_of(tmp_path), open_model(model)
    exact, rough = (LatentEncoding(files, CPU, None, dtype) for dtype in (torch.float32, torch.bfloat16))
    first = exact.encode_missing(tmp_path / "latents", windows, num_workers=0)
    second = rough.encode_missing(tmp_path / "latents", windows, num_workers=0)
    assert first.folder != second.folder and first.folder.name == vae_fingerprint(files, torch.float32)
    assert first.missing(windows) == second.missing(windows) == []
    for window in windows:
        one, other = (cache.load(window)["latents"] for cache in (first, second))
        assert other.dtype == torch.float32 and not torch.equal(one, other)
        assert (one - other).norm() / one.norm() < 0.05


class Beside:
    """Stands for a stream of its own."""

    def encoded(self, loaded, encode):
        with closing(loaded):
            for clips in loaded:
                yield encode(clips)

    def hold_peak_of(self, make) -> torch.Tensor:
        return make().latents


def test_what_is_encoded_beside_a_step_is_the_same(tmp_path, model):
    video(tmp_path / "a.mp4", frames=9)
    video(tmp_path / "b.mp4", frames=13)
    windows = windows_of(tmp_path)
    fresh, cached = both(tmp_path, model, windows, None)
    overlapped = replace(fresh, beside=Beside())
    plan = Plan([window.source for window in windows], LIMITS, 7)
    with closing(overlapped.stream(plan)) as found, closing(fresh.stream(plan)) as expected:
        for one, other in islice(zip(found, expected, strict=True), 5):
            assert torch.equal(one.latents, other.latents)
    assert torch.equal(overlapped.hold(windows[:1]), fresh.load_batch(windows[:1]).latents)
    assert fresh.hold(windows) is None and cached.hold(windows) is None


def test_the_layout_of_the_vae_is_measured_on_a_gpu_when_a_run_begins(tmp_path, model, monkeypatch):
    """With a stand-in for the GPU."""
    video(tmp_path / "a.mp4", frames=9)
    video(tmp_path / "b.mp4", frames=5, size=(96, 64))
    windows, decisions, measured, used = windows_of(tmp_path), Decisions("GPU A"), [], []
    stand_ins = {
        "faster_layout": lambda vae, size: measured.append(size) or "channels_last",
        "use_layout": lambda vae, name: used.append(name),
        "load_vae": lambda files, device, dtype: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(utils.encoding.samples, name, stand_in)
    on_gpu = LatentEncoding(open_model(model), torch.device("cuda"), decisions=decisions)
    assert isinstance(open_samples(Caches(), on_gpu, windows, None, tmp_path, 0), FreshSamples)
    on_gpu.load_for(windows)
    assert measured == [largest_window(windows).bucket] and used == ["channels_last"] * 2
    for device, saved, layout in (
        ("GPU A", decisions.table(), "channels_last"),
        ("GPU B", decisions.table(), "channels_last"),
        ("GPU A", {"device": "GPU A"}, "contiguous"),  # of an earlier version
    ):
        resumed = Decisions(device, saved)
        replace(on_gpu, decisions=resumed).load_for(windows)
        assert used.pop() == layout == resumed.made["vae_layout"]
    with pytest.raises(UserError, match="the saved run's vae_layout is 'x': its state is damaged"):
        replace(on_gpu, decisions=Decisions("GPU A", decisions.table() | {"vae_layout": "x"})).load_for(windows)
    for unmeasured in (replace(on_gpu, device=CPU), replace(on_gpu, decisions=None)):
        unmeasured.load_for(windows)
    on_gpu.load()
    assert len(measured) == 1 and len(used) == 2


def test_a_cached_file_with_another_condition_ends_with_one_message(tmp_path, model):
    video(tmp_path / "a.mp4", frames=9)
    windows = windows_of(tmp_path)
    _, cached = both(tmp_path, model, windows, None)
    cached.latents.store(windows[0], cached.latents.load(windows[0]) | {"image": torch.zeros(2)})
    with pytest.raises(UserError, match="holds image, latents, but latents is needed: run --cache_latents again"):
        cached.load(windows[0])


# ------------------------------------------------------------------------------------------------------------ families


@pytest.mark.parametrize("name", ["wan2.1-i2v-14B-480P", "wan2.1-flf2v-14B-720P", "wan2.2-ti2v-5B"])
def test_what_a_family_is_given_comes_back_from_the_cache_and_needs_no_encoder_then(tmp_path, name, monkeypatch):
    files = open_model(write_model(tmp_path / "model", FAMILIES[name]))
    video(tmp_path / "clips" / "a.mp4", frames=9)
    sources, _ = scan(Folder(tmp_path / "clips", Rules(base_res=(64,), enlarge=True)), 16.0)
    windows = flatten_windows(fixed_windows(sources, replace(LIMITS, grid=files.family.grid), 1))
    encoding, text = LatentEncoding(files, CPU, ControlSignal("tile")), torch.ones(3, 32)
    expected = FreshSamples(encoding.load(), lambda caption: text).load_batch(windows)
    cached = encoding.encode_missing(tmp_path / "latents", windows, num_workers=0)
    for loader in ("load_vae", "load_vision_encoder"):
        monkeypatch.setattr(utils.encoding.samples, loader, None)
    found = CachedSamples(cached, lambda caption: text, CPU, encoding.load).load_batch(windows)
    assert torch.equal(found.latents, expected.latents)
    for part, tensor in vars(expected.cond).items():
        assert (tensor is None and getattr(found.cond, part) is None) or torch.equal(getattr(found.cond, part), tensor)
    layout = encoding.layout
    assert (layout.given, layout.given_as) == (files.family.given, files.family.given_as)
    assert layout.vision == (vision_fingerprint(files, torch.float32) if files.clip else "")
    assert layout.control == ControlSignal("tile")
